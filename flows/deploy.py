"""`make deploy`: registers everything with the Prefect API that PREFECT_API_URL names. Called again, it brings it up to date.

    python -m flows.deploy                                          on the pool "stagediff", of type process
    python -m flows.deploy --pool stagediff=process --pool big=slurm --gpus big=8    steps on both, the rest on the first

A pool that is not there is made where its type is given; queues, the limit that counts GPUs, deployments and automations follow. What cannot work is refused
before anything is changed: an API that does not answer, a mistyped pool, job variables that a pool does not know, more GPUs than it has, a
pool that gives a job fewer GPUs than the steps are registered with.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import yaml
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import ConcurrencyOptions
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.events import AutomationCore
from prefect.events.schemas.deployment_triggers import DeploymentTriggerTypes
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import get_current_settings
from prefect.utilities.callables import parameter_schema
from pydantic import TypeAdapter

from flows.deployments import other_entries, step_entry
from flows.pools import Wanted, gpus_of, install, template_for, type_of
from flows.resources import check_variables, job_variables
from flows.session import POOL
from flows.slots import LIMIT, limit_of
from stagediff import steps
from stagediff.errors import StagediffError, UserError
from stagediff.resources import resources_of

__all__ = ["api", "deploy", "directory_of", "main", "register"]

ROOT = Path(__file__).parents[1]
AUTOMATIONS = ROOT / "infra" / "automations"
PULL = "prefect.deployments.steps.set_working_directory"


def deploy(pools: Sequence[Wanted], say: Callable[[str], None] = print) -> None:
    """Registers the steps with every pool, the pipelines, watch and janitor with the first. Raises UserError, before anything is changed."""
    with api() as client:
        there = {pool.name: pool for pool in client.read_work_pools()}
        templates = {wanted.name: template_for(wanted, there) for wanted in pools}
        for wanted in pools:
            check_variables(wanted.variables, templates[wanted.name], wanted.name)
            _check_gpus(wanted, wanted.kind or type_of(there[wanted.name]), templates[wanted.name])
        for at, wanted in enumerate(pools):
            kind = install(client, wanted, templates[wanted.name], there)
            entries = [*_steps(wanted, kind, gpus_of(client, wanted.name)), *(other_entries(wanted.name) if at == 0 else [])]
            for entry in entries:
                register(client, entry, wanted.directory or str(ROOT))
            say(f"{wanted.name} ({kind}): {len(entries)} deployments")
        for file in sorted(AUTOMATIONS.glob("*.yaml")):
            say(f"automation: {_automate(client, file)}")
    names = " ".join(wanted.name for wanted in pools)
    say(f"A worker runs them: prefect worker start --pool {pools[0].name}" + ("" if len(pools) == 1 else f" (one for each of: {names})"))


def _check_gpus(wanted: Wanted, kind: str, template: Mapping[str, Any]) -> None:
    """Raises UserError where a step, as it is registered, asks for more GPUs than the pool gives to one job: no run of it could start."""
    most = template.get("variables", {}).get("properties", {}).get("gpus", {}).get("maximum")
    for step in steps.all_steps():
        gpus = {**job_variables(resources_of(step.name, {}), kind), **wanted.variables}.get("gpus", 0)
        if most is not None and isinstance(gpus, int) and gpus > most:
            given = f"--gpus {wanted.name}={most}: " if wanted.gpus is not None else ""
            raise UserError(
                f"{given}A job of the work pool {wanted.name!r} could have at most {most} GPUs, but the step {step.name} asks for {gpus}. Give the "
                f'number that one node of the cluster has: make deploy GPUS="{wanted.name}=8". Where there are none, deploy to a pool of type '
                "process: it runs these steps on the CPU."
            )


def _steps(wanted: Wanted, kind: str, gpus: int | None) -> Iterator[dict[str, Any]]:
    """The steps' entries on this pool, each with the job variables that its registered resources ask for."""
    for step in steps.all_steps():
        entry = step_entry(step, wanted.name)
        pool = entry["work_pool"]
        asked = job_variables(resources_of(step.name, {}), kind)
        env = {**pool["job_variables"]["env"], **asked.get("env", {}), **wanted.variables.get("env", {})}
        if kind == "process" and gpus:
            env[LIMIT] = limit_of(wanted.name)
        pool["job_variables"] = {**asked, **wanted.variables, "env": env}
        yield entry


def register(client: SyncPrefectClient, entry: Mapping[str, Any], directory: str) -> None:
    """Makes one deployment, or brings it up to date, with its schedules and triggers."""
    file, _, name = entry["entrypoint"].partition(":")
    flow: Flow[..., Any] = getattr(import_module(file.removesuffix(".py").replace("/", ".")), name)
    pool = entry["work_pool"]
    limit = entry.get("concurrency_limit")
    schedules = [
        DeploymentScheduleCreate(schedule=IntervalSchedule(interval=schedule["interval"]), active=True)
        for schedule in entry.get("schedules", [])
    ]
    made = client.create_deployment(
        flow_id=client.create_flow_from_name(flow.name),
        name=entry["name"],
        description=entry["description"],
        entrypoint=entry["entrypoint"],
        path=None,
        tags=entry["tags"],
        parameters=entry.get("parameters"),
        parameter_openapi_schema=parameter_schema(flow).model_dump(exclude_unset=True),
        enforce_parameter_schema=True,
        work_pool_name=pool["name"],
        work_queue_name=pool.get("work_queue_name"),
        job_variables=pool["job_variables"],
        pull_steps=[{PULL: {"directory": directory}}],
        schedules=schedules,
        concurrency_limit=limit["limit"] if limit else None,
        concurrency_options=ConcurrencyOptions(collision_strategy=limit["collision_strategy"]) if limit else None,
    )
    if "triggers" not in entry:
        return
    client.delete_resource_owned_automations(f"prefect.deployment.{made}")
    for at, body in enumerate(entry["triggers"]):
        trigger: Any = TypeAdapter(DeploymentTriggerTypes).validate_python(body)
        trigger.set_deployment_id(made)
        trigger.name = trigger.name or f"{flow.name}/{entry['name']} {at}"
        client.create_automation(trigger.as_automation())


def directory_of(deployment: DeploymentResponse) -> str | None:
    """The folder in which a registered deployment's runs begin."""
    return next((str(step[PULL]["directory"]) for step in deployment.pull_steps or [] if PULL in step), None)


def _automate(client: SyncPrefectClient, file: Path) -> str:
    """Installs an automation from a file, by its name."""
    wanted = AutomationCore.model_validate(yaml.safe_load(file.read_text()))
    there = client.read_automations_by_name(wanted.name)
    if there:
        client.update_automation(there[0].id, wanted)
    else:
        client.create_automation(wanted)
    return wanted.name


@contextmanager
def api() -> Iterator[SyncPrefectClient]:
    """A client of the API that PREFECT_API_URL names; UserError where there is none, or none that answers."""
    url = get_current_settings().api.url
    if not url:
        raise UserError(
            "PREFECT_API_URL is not set: which Prefect server? On this machine: `python -m infra.server.sqlite`, then "
            "`export PREFECT_API_URL=http://127.0.0.1:4200/api`. See infra/README.md."
        )
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pools(limit=1)
        except PrefectHTTPStatusError as fault:
            code = fault.response.status_code
            why = (
                "it wants to know who asks: set PREFECT_API_AUTH_STRING or PREFECT_API_KEY"
                if code in (401, 403)
                else "is that a Prefect API, with /api?"
            )
            raise UserError(f"PREFECT_API_URL={url} answers with status {code}: {why}") from None
        except (httpx.TransportError, httpx.InvalidURL, ValueError) as fault:
            raise UserError(
                f"PREFECT_API_URL={url} does not answer ({type(fault).__name__}: {fault}). Is the server running there, and the port right?"
            ) from None
        yield client


def _pools(given: argparse.Namespace) -> list[Wanted]:
    """The pools of the command line. NAME=… options name their pool; without a name they mean the first."""
    named = [text.partition("=") for text in given.pool or [f"{POOL}=process"]]
    first = named[0][0]

    def numbers(texts: Sequence[str], what: str, least: int) -> dict[str, int]:
        out = {}
        for text in texts:
            pool, _, number = text.rpartition("=")
            if not number.isdecimal() or int(number) < least:
                raise UserError(f"--{what} {text}: expected a number, or POOL=NUMBER; a whole number, {least} or more.")
            out[pool or first] = int(number)
        return out

    gpus, cpu_steps = numbers(given.gpus, "gpus", 0), numbers(given.cpu_steps, "cpu-steps", 1)
    variables: dict[str, dict[str, Any]] = {}
    for text in given.variable:
        name, sign, value = text.partition("=")
        pool, _, name = name.rpartition(":")
        if not sign or not name:
            raise UserError(f"--variable {text}: expected NAME=VALUE, or POOL:NAME=VALUE.")
        variables.setdefault(pool or first, {})[name] = _value(value)
    directories = {}
    for text in given.directory:
        pool, _, directory = text.rpartition(":")
        directories[pool or first] = directory
    unknown = {*gpus, *cpu_steps, *variables, *directories} - {name for name, *_ in named}
    if unknown:
        raise UserError(f"{', '.join(sorted(unknown))}: not among the pools given with --pool ({', '.join(name for name, *_ in named)}).")
    return [
        Wanted(name, kind or None, gpus.get(name), cpu_steps.get(name), variables.get(name, {}), directories.get(name))
        for name, _, kind in named
    ]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flows.deploy", description="Registers all flows with the Prefect API that PREFECT_API_URL names."
    )
    parser.add_argument(
        "--pool", action="append", metavar="NAME[=TYPE]", help=f"process | slurm | kubernetes; made where missing (default: {POOL}=process)"
    )
    parser.add_argument(
        "--gpus",
        action="append",
        default=[],
        metavar="[POOL=]N",
        help="GPUs of a process pool, or the most that a cluster's job may ask for",
    )
    parser.add_argument(
        "--cpu-steps", action="append", default=[], metavar="[POOL=]N", help="steps without a GPU that a process pool runs at once (2)"
    )
    parser.add_argument(
        "--variable", action="append", default=[], metavar="[POOL:]NAME=VALUE", help="job variable of all steps (image, partition, …)"
    )
    parser.add_argument(
        "--directory",
        action="append",
        default=[],
        metavar="[POOL:]DIR",
        help="where this project lies on the machines of a pool's workers or jobs (default: as here)",
    )
    given = parser.parse_args(arguments)
    try:
        deploy(_pools(given))
    except StagediffError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
