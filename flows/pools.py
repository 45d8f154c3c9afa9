"""Work pools as this project sets them up: their type and job template, queues, and the limit that counts GPUs.

Every pool has three queues: `default` for what computes nothing (pipelines, watch, janitor), `cpu` and `gpu` for steps. On a process pool the last two are
limited, so that no more steps are started than the machine can hold; a pipeline waits for its steps and so must never take one of their places.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import WorkPool
from prefect.exceptions import ObjectNotFound

from flows.resources import PoolType
from flows.slots import limit_of
from stagediff.errors import UserError

__all__ = ["CPU", "GPU", "Wanted", "gpus_of", "install", "template_for", "type_of"]

CPU, GPU = "cpu", "gpu"
"""The queues that steps go to."""
TEMPLATES = Path(__file__).parents[1] / "infra" / "pools"


@dataclass(frozen=True)
class Wanted:
    """A pool that steps are to be deployed to."""

    name: str
    kind: str | None = None
    """process | slurm | kubernetes; None: the pool must be there."""
    gpus: int | None = None
    """Of a process pool: how many it has, over all its machines. Of a cluster's: how many one job may ask for. None: as it is."""
    cpu_steps: int | None = None
    """Of a process pool: how many steps without a GPU may run at once. None: as it is; 2 for a new pool."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Job variables of all steps deployed there (image, partition)."""
    directory: str | None = None
    """Where this project lies on the machines of its workers or jobs; None: where it lies here."""


def type_of(pool: WorkPool) -> str:
    """process | slurm | kubernetes: a Slurm pool is one of Prefect's type process whose command is the launcher."""
    return "slurm" if "infra.slurm.launch" in json.dumps(pool.base_job_template) else pool.type


def template_for(wanted: Wanted, there: Mapping[str, WorkPool]) -> dict[str, Any]:
    """The base job template that the pool has or will have; raises UserError where it is neither there nor can be made."""
    kinds = ", ".join(get_args(PoolType))
    known = ", ".join(sorted(there)) or "none"
    pool = there.get(wanted.name)
    if wanted.kind is not None and wanted.kind not in get_args(PoolType):
        raise UserError(f"{wanted.kind!r} is not a type of work pool; expected one of: {kinds}.")
    if pool is None and wanted.kind is None:
        raise UserError(
            f"There is no work pool {wanted.name!r} (there are: {known}). To have it made, say of what type: {wanted.name}=TYPE ({kinds})."
        )
    if pool is not None and wanted.kind not in (None, type_of(pool)):
        raise UserError(
            f"The work pool {wanted.name!r} is of type {type_of(pool)}, not {wanted.kind}. Take another name, or delete the pool."
        )
    template = pool.base_job_template if pool is not None else _new_template(wanted.kind or "")
    gpus = template.get("variables", {}).get("properties", {}).get("gpus")
    if wanted.gpus is not None and gpus is not None:
        gpus["maximum"] = wanted.gpus
    return template


def install(client: SyncPrefectClient, wanted: Wanted, template: dict[str, Any], there: Mapping[str, WorkPool]) -> str:
    """Makes the pool or brings it up to date, with its queues and limits; returns its type."""
    pool = there.get(wanted.name)
    if pool is None:
        kind = "process" if wanted.kind == "slurm" else str(wanted.kind)
        pool = client.create_work_pool(WorkPoolCreate(name=wanted.name, type=kind, base_job_template=template))
    elif pool.base_job_template != template or wanted.gpus is not None:
        client.update_work_pool(wanted.name, WorkPoolUpdate(base_job_template=template))
    kind = wanted.kind or type_of(pool)
    is_new = wanted.name not in there
    queues = {queue.name: queue for queue in client.read_work_queues(work_pool_name=wanted.name)}
    limits: dict[str, int | None] = {CPU: None, GPU: None}
    if kind == "process":
        cpu_steps = wanted.cpu_steps or (2 if is_new else None)
        gpus = gpus_of_machine() if wanted.gpus is None and is_new else wanted.gpus
        # without a GPU the steps that would take one run on the CPU, and must not all start at once either
        limits = {CPU: cpu_steps, GPU: cpu_steps or 2 if gpus == 0 else gpus}
        if gpus is not None:
            _limit(client, limit_of(wanted.name), gpus)
    for name, limit in limits.items():
        if name not in queues:
            queues[name] = client.create_work_queue(name=name, work_pool_name=wanted.name)
        if limit:
            client.update_work_queue(queues[name].id, concurrency_limit=limit)
    return kind


def gpus_of(client: SyncPrefectClient, pool: str) -> int | None:
    """How many GPUs a process pool counts; None where it counts none."""
    try:
        return client.read_global_concurrency_limit_by_name(limit_of(pool)).limit
    except ObjectNotFound:
        return None


def gpus_of_machine() -> int:
    import torch

    return torch.cuda.device_count()


def _new_template(kind: str) -> dict[str, Any]:
    return json.loads((TEMPLATES / f"{kind}.json").read_text())


def _limit(client: SyncPrefectClient, name: str, limit: int) -> None:
    """Makes, changes or (0) removes the limit that counts GPUs."""
    try:
        client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        if limit:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=limit))
    else:
        if limit:
            client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(limit=limit))
        else:
            client.delete_global_concurrency_limit_by_name(name)
