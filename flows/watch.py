"""Watching a training run as a flow: a short run that looks, starts the pipeline for what is new, and ends.

It is run on a schedule and at every announced checkpoint (flows/announce.py); either alone is enough, since it does not trust what it is told but
reconciles what lies there with what the store has. So a lost event, a killed run or a server that was away delay a checkpoint until the next look, and
two looks at once start nothing twice: a pipeline's run has the idempotency key <config>:<step>:<report>, and the store says what is done.

inline       the pipeline runs within this flow
deployments  the pipeline is a run of its own; while one is on its way nothing else is started, and what comes meanwhile is taken all at once afterwards
"""

import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from prefect import Flow, flow
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterIdempotencyKey,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import AwaitingRetry
from prefect.utilities.urls import url_for

from flows.children import SETTLE, patiently
from flows.crashes import past_of, take_back
from flows.deployments import ENVIRONMENT
from flows.names import CHECKPOINT, RETRY_TAG, training
from flows.places import absolute, check_store
from flows.session import POOL, Mode
from flows.stagewise import stagewise
from flows.track import track
from stagediff.config import load_config, parse_config
from stagediff.errors import StagediffError, UserError
from stagediff.watch.watcher import Due, Look, Watcher

__all__ = ["TRIGGERS", "deploy", "entry", "triggers", "watch"]

log = logging.getLogger("stagediff")

PIPELINES: dict[str, Flow[..., str]] = {"track": track, "stagewise": stagewise}
AGAIN = 3
"""How often what a completed pipeline run made may have gone from the store before a person has to look."""
UNDERWAY = (StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING)


def triggers(run: str = "*") -> list[dict[str, Any]]:
    """The trigger of a deployment of `watch`: an announced checkpoint of this training run (all of them: "*")."""
    return [
        {
            "type": "event",
            "enabled": True,
            "posture": "Reactive",
            "match": {"prefect.resource.id": training(run)},
            "expect": [CHECKPOINT],
            "for_each": ["prefect.resource.id"],
            "threshold": 1,
            "within": 0,
            "parameters": {"run": "{{ event.payload.run }}", "announced": "{{ event.payload.step }}", "event": "{{ event.id | string }}"},
        }
    ]


TRIGGERS = triggers()
"""For the deployment in prefect.yaml, whose config is set in the UI."""


def _name_of_this_run() -> str:
    config = flow_run.parameters.get("config")
    return f"watch · {(config.get('name') if isinstance(config, Mapping) else config) or 'nothing'}"


@flow(name="watch", flow_run_name=_name_of_this_run, persist_result=False)
def watch(
    config: dict[str, Any] | str | None = None,
    store: str | None = None,
    device: str = "auto",
    mode: Mode = "inline",
    pool: str = POOL,
    run: str | None = None,
    announced: int | None = None,
    event: str | None = None,
) -> str:
    """Looks once for new checkpoints and has run what they call for. Says what it found.

    Args:
        config: the watched run's config, or the path of its file on the worker's machine
        store: instead of the config's
        device: auto, cpu, cuda or cuda:1
        mode: inline, or deployments (the pipeline, and each of its steps, as runs of their own)
        pool: the work pool whose deployments they are
        run: the training run that announced a checkpoint; another's announcements are passed over
        announced: the step of that checkpoint
        event: the announcement's id, for the record
    """
    log.setLevel(logging.INFO)
    if config is None:
        return _said("This deployment watches nothing: set its parameter `config`, or use `stagediff watch CONFIG --deploy POOL`.")
    parsed = load_config(config, store=store) if isinstance(config, str) else parse_config(config, store=store)
    check_store(parsed.store)
    watcher = Watcher(parsed)
    if run is not None and run != watcher.run:
        return _said(f"The checkpoint announced is of the run {run!r}, not of {watcher.run!r}.")
    look = watcher.look(() if announced is None else (announced,))
    pipelines = _Pipelines(watcher, device, pool)
    started: list[str] = []
    failed: StagediffError | None = None
    try:
        for due in watcher.due(look):
            if mode == "inline":
                PIPELINES[parsed.kind](config=due.config, store=watcher.store.root, device=device)
                started.append(f"checkpoint {due.step}: done")
                continue
            try:
                started.append(pipelines.start(due))
                break  # one after the other: what a pipeline is computing is not to be started a second time
            except StagediffError as error:
                failed = failed or error
    finally:
        _show(watcher, look, started)
    if failed is not None:
        raise failed
    return _said("; ".join(started) or (f"waiting for {look.waits_for}" if look.waits_for else "nothing new"))


class _Pipelines:
    """The pipeline's runs for one watch."""

    def __init__(self, watcher: Watcher, device: str, pool: str):
        self._watcher, self._device, self._pool = watcher, device, pool
        self._tag = f"watch:{_called(watcher)}"

    def start(self, due: Due) -> str:
        """Has the run for what is due started, unless one is on its way; says which. Raises StagediffError where a person has to look."""
        with get_client(sync_client=True) as client:
            if underway := patiently(partial(self._underway, client)):
                return f"{underway[0].name} is on its way ({_page(underway[0])})"
            return self._start(client, due)

    def _start(self, client: SyncPrefectClient, due: Due) -> str:
        for again in range(AGAIN):
            key = f"{_called(self._watcher)}:{due.step}:{due.plan['report'].ref.key}" + (f":{again}" if again else "")
            found = patiently(partial(self._find, client, key))
            if found is None:
                made = patiently(partial(self._make, due, key))
                return f"checkpoint {due.step}: {due.missing} steps to run, {made.name} started ({_page(made)})"
            if found.state is not None and found.state.is_crashed():
                past = patiently(partial(past_of, client, found))
                if patiently(partial(take_back, client, found, past)):
                    return f"{found.name} is on its way ({_page(found)})"
                if past.may_run_again():
                    return self._retry(client, found)
            if found.state is None or not found.state.is_completed():
                reason = " ".join(((found.state and found.state.message) or "").split())[:500]
                raise StagediffError(
                    f"The pipeline for checkpoint {due.step}, {found.name}, is {found.state.name if found.state else 'unknown'}: {reason} Mend the "
                    f"cause, then press Retry on it: {_page(found)}"
                )
        raise StagediffError(
            f"The pipeline for checkpoint {due.step} has completed {AGAIN} times, and each time {due.missing} of its artifacts were missing afterwards. "
            "Does the worker write to the same store?"
        )

    def _retry(self, client: SyncPrefectClient, crashed: FlowRun) -> str:
        assert crashed.state is not None
        age = (datetime.now(UTC) - crashed.state.timestamp).total_seconds()
        if age < SETTLE:  # what ends at once is not started in a rush
            return f"{crashed.name} has crashed: started again at the next look"
        patiently(partial(client.set_flow_run_state, crashed.id, AwaitingRetry(message="its watch found it crashed"), force=False))
        return f"{crashed.name} had crashed: started again ({_page(crashed)})"

    def _underway(self, client: SyncPrefectClient) -> list[FlowRun]:
        mine = FlowRunFilter(
            tags=FlowRunFilterTags(all_=[self._tag]), state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(UNDERWAY)))
        )
        return client.read_flow_runs(flow_run_filter=mine, limit=1)

    @staticmethod
    def _find(client: SyncPrefectClient, key: str) -> FlowRun | None:
        found = client.read_flow_runs(flow_run_filter=FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=[key])), limit=1)
        return found[0] if found else None

    def _make(self, due: Due, key: str) -> FlowRun:
        kind = self._watcher.config.kind
        made: FlowRun = run_deployment(  # type: ignore[assignment]
            f"{PIPELINES[kind].name}/{self._pool}",
            parameters={"config": due.config, "store": absolute(self._watcher.store.root), "device": self._device},
            tags=["stagediff", "pipeline", RETRY_TAG, self._tag],
            idempotency_key=key,
            timeout=0,
            as_subflow=False,  # it outlives this run
        )
        return made


def _show(watcher: Watcher, look: Look, started: list[str]) -> None:
    """A small table in the UI: every checkpoint that is known, newest first."""
    rows = [{"checkpoint": s.step, "state": s.state, "why": s.why, "where": s.where} for s in reversed(look.seen[-200:])]
    for line in (look.waits_for and f"waiting for {look.waits_for}", *started):
        if line:
            rows.insert(0, {"checkpoint": "", "state": line, "why": "", "where": ""})
    key = "watch-" + (re.sub(r"[^a-z0-9]+", "-", _called(watcher).lower()).strip("-") or "run")
    create_table_artifact(rows, key=key, description=f"Checkpoints of {watcher.run} in {watcher.settings.source}")


def _called(watcher: Watcher) -> str:
    """Whose runs these are: the config's name, since two configs may watch one training."""
    return watcher.config.name or watcher.run


def _page(run: FlowRun) -> str:
    return url_for("flow-run", obj_id=run.id) or str(run.id)


def _said(text: str) -> str:
    log.info("%s", text)
    return text


# --- a deployment for one watched run ----------------------------------------------------------------------------------------------------


def entry(config: dict[str, Any], *, pool: str = POOL, device: str = "auto", mode: Mode = "deployments") -> dict[str, Any]:
    """The deployment that watches one run, as an entry of `prefect.yaml`: on schedule, and at every checkpoint that its training announces."""
    body = {name: value if name == "name" else _in_full(value, name) for name, value in config.items()}
    body["store"] = absolute(body["store"])
    watcher = Watcher(parse_config(body))
    return {
        "name": re.sub(r"[/%&<>]+", "-", _called(watcher)),
        "description": f"Looks for new checkpoints in {watcher.settings.source} and starts the pipeline for each, once.",
        "entrypoint": "flows/watch.py:watch",
        "tags": ["stagediff", "watch", RETRY_TAG],
        "parameters": {"config": body, "device": device, "mode": mode, "pool": pool},
        "work_pool": {"name": pool, "job_variables": {"env": dict(ENVIRONMENT)}},
        # two looks at once could start two pipelines; a look that is dropped is made up by the next one (queued, they would pile up on a slow machine)
        "concurrency_limit": {"limit": 1, "collision_strategy": "CANCEL_NEW"},
        "schedules": [{"interval": watcher.settings.every}],
        "triggers": triggers(watcher.run),
    }


def deploy(config: dict[str, Any], *, pool: str = POOL, device: str = "auto") -> str:
    """Registers `entry` with the Prefect API, beside what `make deploy` has registered there; says what was done. Raises UserError.

    Its runs begin in the folder that `make deploy` was given for the pool (`--directory`), which on other machines is not this one.
    """
    from flows.deploy import ROOT, api, directory_of, register

    made = entry(config, pool=pool, device=device)
    watcher = Watcher(parse_config(made["parameters"]["config"]))
    watcher.place.find()  # a place that can't be looked at is better told now
    pipeline = f"{PIPELINES[config['kind']].name}/{pool}"
    with api() as client:
        there = [found.name for found in client.read_work_pools()]
        if pool not in there:
            raise UserError(f"There is no work pool {pool!r} (there are: {', '.join(there) or 'none'}). `make deploy` makes one.")
        try:
            started = client.read_deployment_by_name(pipeline)
        except ObjectNotFound:
            raise UserError(f"There is no deployment {pipeline} that a watch could start. Run `make deploy` first.") from None
        register(client, made, directory_of(started) or str(ROOT))
    return f"watch/{made['name']} looks every {made['schedules'][0]['interval']:g} s, and at every checkpoint announced for the run {watcher.run}."


def _in_full(value: Any, key: str = "") -> Any:
    """The config with every local path that is there written in full: workers run in folders of their own."""
    if isinstance(value, Mapping):
        return {name: _in_full(each, name) for name, each in value.items()}
    if isinstance(value, list):
        return [_in_full(each, key) for each in value]
    if key in ("name", "path", "source", "start", "adapter") and isinstance(value, str) and "://" not in value:
        before = Path(value.partition("{step}")[0] if "{step}" in value else value).expanduser()
        there = before if "{step}" not in value or value.partition("{step}")[0].endswith("/") else before.parent
        if there.exists() and str(there) not in ("", "."):
            return str(Path(value).expanduser().absolute())
    return value
