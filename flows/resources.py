"""From a step's resources (the config's `resources`) to the job variables of a work pool.

    process      threads and ranks only: a process takes what its machine has, nobody hands out shares
    slurm        gpus, cpus, memory, time_limit of infra/pools/slurm.json
    kubernetes   gpus, cpu, memory, time_limit_seconds of infra/pools/kubernetes.json

How many processes share a step travels as STAGEDIFF_RANKS in the job's environment, so a run that is retried or started again in the UI keeps it.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal, get_args

from stagediff.errors import UserError
from stagediff.ranks import RANKS, SHARD
from stagediff.resources import StepResources

__all__ = ["PoolType", "check_variables", "job_variables"]

PoolType = Literal["process", "slurm", "kubernetes"]


def job_variables(resources: StepResources | Mapping[str, Any], pool_type: str) -> dict[str, Any]:
    """The job variables that ask a pool of that type for these resources; what is not asked for is left to the pool's defaults.

    Raises UserError for names or values that are not known.
    """
    if pool_type not in get_args(PoolType):
        raise UserError(f"{pool_type!r} is not a type of work pool; expected one of: {', '.join(get_args(PoolType))}.")
    wanted = resources if isinstance(resources, StepResources) else _parsed(resources)
    variables: dict[str, Any] = {}
    env: dict[str, str] = {}
    if (wanted.gpus or 0) > 1:
        env[RANKS] = str(wanted.gpus)
        if wanted.shard == "features":
            env[SHARD] = wanted.shard
    if wanted.cpus is not None:
        env["OMP_NUM_THREADS"] = str(max(1, wanted.cpus // max(1, wanted.gpus or 1)))
    if env:
        variables["env"] = env
    if pool_type == "slurm":
        _put(variables, gpus=wanted.gpus, cpus=wanted.cpus, memory=_text(wanted.memory, "M"))
        _put(variables, time_limit=None if wanted.time_limit is None else str(-(-wanted.time_limit // 60)))  # sbatch counts in minutes
    elif pool_type == "kubernetes":
        _put(
            variables, gpus=wanted.gpus, cpu=_text(wanted.cpus, ""), memory=_text(wanted.memory, "Mi"), time_limit_seconds=wanted.time_limit
        )
    return variables


def check_variables(variables: Mapping[str, Any], template: Mapping[str, Any], pool: str) -> None:
    """Compares job variables with a pool's base job template: raises UserError for unknown names and for more than the pool has.

    The most a pool gives to one job stands as `maximum` in its template (gpus: 8); where it stands nowhere it is not known here.
    """
    known: Mapping[str, Mapping[str, Any]] = template.get("variables", {}).get("properties", {})
    for name, value in variables.items():
        if name not in known:
            alike = get_close_matches(name, known, 1)
            meant = f" Did you mean {alike[0]}?" if alike else ""
            raise UserError(f"The work pool {pool!r} has no job variable {name!r}.{meant} It has: {', '.join(sorted(known))}.")
        most = known[name].get("maximum")
        if most is not None and isinstance(value, int | float) and value > most:
            raise UserError(
                f"{name} is {value}, but the work pool {pool!r} gives a job at most {most}. Ask for less in the config's `resources`, or name a "
                f"larger pool there (`pool`). If the pool's nodes have more, raise its template's `maximum` (infra/pools)."
            )


def _parsed(resources: Mapping[str, Any]) -> StepResources:
    from pydantic import ValidationError

    known = ", ".join(StepResources.model_fields)
    try:
        return StepResources.model_validate(dict(resources))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg'].removeprefix('Value error, ')}" for f in error.errors())
        raise UserError(f"These resources are not valid: {faults}. Known names: {known}.") from None


def _text(value: int | None, unit: str) -> str | None:
    return None if value is None else f"{value}{unit}"


def _put(variables: dict[str, Any], **found: Any) -> None:
    variables.update({name: value for name, value in found.items() if value is not None})
