"""Pipelines whose steps are runs of their own, against a real API. A thread stands in for the worker: it computes, fails or crashes."""

import shutil
import threading
import time
from collections import Counter, defaultdict
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from uuid import uuid4

import httpx
import pytest
import yaml
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Completed, Crashed, Failed, Pending, Running, Scheduled
from prefect.states import State as PrefectState
from prefect.testing.utilities import prefect_test_harness
from tiny import tiny_config

from flows import children, deploy, schedule
from flows.children import patiently
from flows.crashes import CRASHES, past_of
from flows.deploy import main
from flows.janitor import janitor
from flows.pools import Wanted, gpus_of, install, template_for
from flows.schedule import StepsFailedError
from flows.stagewise import stagewise
from stagediff import steps
from stagediff.config import make_plan, parse_config
from stagediff.errors import UserError
from stagediff.store import State, Store

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", autouse=True)
def prefect_server():
    with prefect_test_harness(server_startup_timeout=240):
        wanted = [step for step in steps.all_steps() if step.name in ("harvest", "quality", "statistics", "finetune", "diff", "report")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deploy.steps, "all_steps", lambda: wanted)  # six of them will do
            deploy.deploy([Wanted("stagediff", "process", gpus=2)], say=lambda _: None)
        yield


class FakeWorker:
    """Takes scheduled runs one at a time. `plays[name of the step]`: what happens at each start, "compute" once it is used up."""

    def __init__(self):
        self.plays: dict[str, list[str]] = defaultdict(list)
        self.ran: list[tuple[str, str]] = []
        self.parameters: list[dict] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join(60)

    def _loop(self):
        scheduled = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])))
        with get_client(sync_client=True) as client:
            while not self._stop.wait(0.1):
                for run in client.read_flow_runs(flow_run_filter=scheduled):
                    if "spec" in run.parameters:
                        self._run(client, run)

    def _run(self, client, run):
        given = run.parameters
        name = given["name"]
        play = self.plays[name].pop(0) if self.plays[name] else "compute"
        if play == "late: scheduled":  # somebody else's worker speaks before this one takes the run
            report_late(client, run)
            return
        self.ran.append((name, play))
        self.parameters.append(given)
        client.set_flow_run_state(run.id, Pending(), force=True)
        if play == "refused":
            client.set_flow_run_state(run.id, Crashed(message="sbatch: invalid partition"), force=True)
            return
        if play == "late: pending":
            report_late(client, run)
            play = "compute"
        client.set_flow_run_state(run.id, Running(), force=True)
        if play == "late: running":
            report_late(client, run)
            play = "compute"
        if play == "cancelled":  # as on Slurm: the engine sees a signal, and the worker speaks later
            client.set_flow_run_state(run.id, Cancelling(), force=True)
            client.set_flow_run_state(run.id, Crashed(message="a termination signal"), force=True)
            return
        if play == "compute":
            spec = steps.spec_from_json(next(t for t in run.tags if t in BY_NAME), given["spec"])
            store = Store(given["store"])
            steps.run(spec, store, device="cpu", part=(given["part"], given["parts"]), force=given["force"], name=name)
        states = {
            "compute": Completed(),
            "idle": Completed(),
            "fail": Failed(message="out of memory"),
            "crash": Crashed(message="node gone"),
            "signal": Crashed(message="Execution was aborted by a termination signal."),  # as the engine says it, and the worker later
        }
        client.set_flow_run_state(run.id, states[play], force=True)


def report_late(client, run):
    """The worker's word on the start before this one; then waits until somebody has taken it back."""
    before = client.read_flow_run(run.id).state
    late = client.set_flow_run_state(run.id, Crashed(message="Process exited with status code: 143."), force=True).state
    until = time.monotonic() + 60
    while (now := client.read_flow_run(run.id).state).id == late.id:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert (now.type, "late report" in now.message) == (before.type, True)


BY_NAME = {step.name: step for step in steps.all_steps()}


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.setattr(schedule, "EVERY", 0.1)
    monkeypatch.setattr(children, "SETTLE", 0.0)
    with FakeWorker() as worker:
        yield worker


@pytest.fixture
def copy(finished_run, tmp_path):
    """A finished run of which some steps are taken away: (config, store, plan)."""

    def make(*without: str, **changes):
        _, whole = finished_run
        shutil.copytree(whole.root, tmp_path / "store")
        store = Store(tmp_path / "store")
        config = tiny_config(store.root, **changes)
        plan = make_plan(parse_config(config), store)
        for name in without:
            store.remove(plan[name].ref)
        return config, store, plan

    return make


def run(config, **more):
    return stagewise(config, device="cpu", mode="deployments", **more)


def test_what_is_missing_runs_in_an_order_that_works(worker, copy):
    config, store, plan = copy("finetune-M", "statistics-M", "quality-M", "diff")
    assert run(config) == plan["report"].ref
    assert Counter(worker.ran) == {(name, "compute"): 1 for name in ("finetune-M", "statistics-M", "quality-M", "diff")}
    assert worker.ran[0][0] == "finetune-M"
    assert worker.ran[-1][0] == "diff"
    assert plan.missing(store) == []


def test_a_crashed_step_is_started_again_and_a_failed_one_is_not_while_the_rest_goes_on(worker, copy):
    config, store, plan = copy("statistics-M", "quality-M", "quality-D")
    worker.plays = defaultdict(list, {"statistics-M": ["crash"], "quality-M": ["fail"]})
    with pytest.raises(StepsFailedError) as said:
        run(config)
    assert Counter(worker.ran) == {
        ("statistics-M", "crash"): 1, ("statistics-M", "compute"): 1, ("quality-M", "fail"): 1, ("quality-D", "compute"): 1,
    }  # fmt: skip
    for words in ("quality M · tiny", "out of memory", "flow-run/", "press Retry"):
        assert words in str(said.value)
    assert [node.name for node in plan.missing(store)] == ["quality-M"]


@pytest.mark.parametrize("when", ["scheduled", "pending", "running"])
def test_a_crash_that_is_reported_once_more_however_late_ends_no_later_start(worker, copy, when):
    config, store, plan = copy("quality-M")
    worker.plays["quality-M"] = ["signal", f"late: {when}"]
    run(config)
    assert worker.ran == [("quality-M", "signal"), ("quality-M", "compute" if when == "scheduled" else f"late: {when}")]
    assert plan.missing(store) == []


def test_a_step_that_crashes_every_time_is_given_up(worker, copy):
    config, _, _ = copy("quality-M")
    worker.plays["quality-M"] = ["crash"] * 9
    with pytest.raises(StepsFailedError, match="node gone"):
        run(config)
    assert worker.ran == [("quality-M", "crash")] * CRASHES


def test_a_worker_with_another_store_is_noticed(worker, copy):
    config, _, _ = copy("quality-M")
    worker.plays["quality-M"] = ["idle"] * 9
    with pytest.raises(StepsFailedError, match="same store"):
        run(config)
    assert worker.ran == [("quality-M", "idle")] * schedule.TRIES


def test_a_harvest_in_parts_is_several_runs_and_one_artifact(worker, copy, finished_run):
    config, store, plan = copy("harvest-base", resources={"harvest": {"parts": 2}})
    run(config)
    assert worker.ran == [("harvest-base", "compute")] * 2
    assert {(given["part"], given["parts"]) for given in worker.parameters} == {(0, 2), (1, 2)}
    ref = plan["harvest-base"].ref
    assert store.artifact(ref).manifest.data() == finished_run[1].artifact(ref).manifest.data()


def test_a_harvest_that_is_not_stored_is_one_run_and_done(worker, copy, finished_run):
    config, store, plan = copy("harvest-base", "finetune-D", harvest={"shard_mib": 1, "stored": False}, resources={"harvest": {"parts": 2}})
    made = finished_run[1].artifact(plan["finetune-D"].ref).manifest
    run(config)
    assert [name for name, _ in worker.ran] == ["harvest-base", "finetune-D", "report"]
    assert store.artifact(plan["harvest-base"].ref).state is State.EVICTED
    assert store.artifact(plan["finetune-D"].ref).manifest.data() == made.data()


def test_dropped_activations_are_made_again_for_a_forced_step_and_go_again(worker, copy):
    config, store, plan = copy(keep="tables")
    for node in plan:
        if node.spec.kind == "activations" and node.ref not in plan.kept:
            store.evict(node.ref)
    run(config, force=["finetune-M"])
    ran = [name for name, _ in worker.ran]
    assert ran[-1] == "finetune-M"
    assert "harvest-finetuned" in ran
    assert store.artifact(plan["harvest-finetuned"].ref).state is State.EVICTED


@pytest.mark.parametrize(
    ("resources", "pool", "words"),
    [
        ({"quality": {"pool": "gppu"}}, "stagediff", "no work pool 'gppu'; it has: stagediff"),
        ({}, "elsewhere", "no work pool 'elsewhere'"),
        ({"harvest": {"gpus": 3}}, "stagediff", "wants 3 GPUs and the work pool 'stagediff' has 2"),
    ],
)
def test_what_could_never_start_is_refused_before_anything_does(worker, copy, resources, pool, words):
    config, _, _ = copy("quality-M", "harvest-base", resources=resources)
    with pytest.raises(UserError, match=words):
        run(config, pool=pool)
    assert worker.ran == []


def test_a_run_that_crashes_before_it_starts_is_given_up_too(worker, copy):
    config, _, _ = copy("quality-M")
    worker.plays["quality-M"] = ["refused"] * 9
    with pytest.raises(StepsFailedError, match="invalid partition"):
        run(config)
    assert worker.ran == [("quality-M", "refused")] * CRASHES


def test_a_cancelled_step_is_not_started_again_for_the_crash_it_ends_with(worker, copy):
    config, _, _ = copy("quality-M")
    worker.plays["quality-M"] = ["cancelled"]
    with pytest.raises(StepsFailedError, match="termination signal"):
        run(config)
    assert worker.ran == [("quality-M", "cancelled")]
    assert janitor(grace=0) == []


def test_a_config_file_may_be_named_by_its_path(worker, copy, tmp_path):
    config, _, plan = copy("quality-M")
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({name: value for name, value in config.items() if name != "name"}))
    assert run(str(file)) == plan["report"].ref
    assert worker.ran == [("quality-M", "compute")]
    with get_client(sync_client=True) as client:
        assert client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=["stagewise · tiny"])))


def test_a_name_to_force_that_is_no_step_is_refused(worker, copy):
    config, _, _ = copy()
    with pytest.raises(UserError, match="force names finetune-X"):
        run(config, force=["finetune-X"])


def test_the_janitor_starts_crashed_runs_again_a_few_times(copy):
    _, store, plan = copy()
    node = plan["quality-M"]
    given = {"run": "tiny", "name": "quality-M", "spec": node.spec.model_dump(mode="json"), "store": store.root}
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("quality/stagediff")

        def crashed(name: str, starts: int):
            made = client.create_flow_run_from_deployment(deployment.id, parameters=given, name=name, tags=deployment.tags)
            for _ in range(starts):
                client.set_flow_run_state(made.id, Running(), force=True)
                client.set_flow_run_state(made.id, Crashed(message="node gone"), force=True)
            return made.id

        once, often, failed = crashed("once", 1), crashed("often", 3), crashed("failed", 1)
        refused = client.create_flow_run_from_deployment(deployment.id, parameters=given, name="refused", tags=deployment.tags).id
        for _ in range(CRASHES):  # before it runs: Prefect's own count of starts stays at 0
            client.set_flow_run_state(refused, Pending(), force=True)
            client.set_flow_run_state(refused, Crashed(message="sbatch: invalid partition"), force=True)
        client.set_flow_run_state(failed, Failed(message="out of memory"), force=True)
        assert janitor(grace=3600) == []  # not yet
        assert janitor(grace=0) == ["once"]
        assert client.read_flow_run(once).state.name == "AwaitingRetry"
        assert client.read_flow_run(often).state.is_crashed()
        assert client.read_flow_run(failed).state.is_failed()
        assert janitor(grace=0) == []
        client.delete_flow_run(once)


@pytest.fixture
def made(copy):
    """Makes runs of a step in a given state, as a pipeline's children; they are deleted at the end."""
    _, store, plan = copy()
    given = {"run": "tiny", "name": "quality-M", "spec": plan["quality-M"].spec.model_dump(mode="json"), "store": store.root}
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("quality/stagediff")
        ids = []

        def make(name, *states):
            ids.append(client.create_flow_run_from_deployment(deployment.id, parameters=given, name=name, tags=deployment.tags).id)
            for state in states:
                client.set_flow_run_state(ids[-1], state, force=True)
            return ids[-1]

        yield make
        for run in ids:
            with suppress(ObjectNotFound):
                client.delete_flow_run(run)


def state_of(run):
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run).state


def test_the_janitor_finds_runs_that_a_worker_took_and_never_started(made, monkeypatch):
    run = made("taken", Pending())
    assert janitor(grace=0) == []
    assert state_of(run).is_pending()  # its process may still be on its way
    with monkeypatch.context() as patch:
        patch.setattr("flows.janitor.type_of", lambda pool: "slurm")
        assert janitor(grace=0, pending=0) == []
    assert state_of(run).is_pending()  # it waits in the cluster's queue
    assert janitor(grace=0, pending=0) == []
    assert state_of(run).is_crashed()
    assert "never started" in state_of(run).message
    assert janitor(grace=0) == ["taken"]


def beat(run):
    """A heartbeat of a run, stored."""
    event = {"event": "prefect.flow-run.heartbeat", "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"}}
    event |= {"occurred": datetime.now(UTC).isoformat(), "id": str(uuid4())}
    with get_client(sync_client=True) as client:
        client.request("POST", "/events", json=[event])
        until = time.monotonic() + 30
        of_this_run = EventFilter(
            resource=EventResourceFilter(id=[f"prefect.flow-run.{run}"]), event=EventNameFilter(name=[event["event"]])
        )
        while not client.read_events(of_this_run, limit=1).events:
            assert time.monotonic() < until
            time.sleep(0.1)


def test_the_janitor_takes_back_the_late_report_of_an_earlier_crash_and_sees_whether_the_run_still_lives(made):
    twice = [Running(), Crashed(message="Execution was aborted by a termination signal."), Scheduled(), Running()]
    run = made("late", *twice, Crashed(message="Process exited with status code: 143."))
    beat(run)
    assert janitor(grace=0) == []
    assert state_of(run).is_running()
    assert janitor(grace=0, silence=0) == []  # it was this start after all: its heart beats no more
    assert state_of(run).is_crashed()
    assert janitor(grace=0) == ["late"]


def test_the_janitor_finds_runs_whose_hearts_have_stopped(made):
    stopped, never = made("stopped", Running()), made("never", Running())
    beat(stopped)
    assert janitor(grace=0) == []
    assert state_of(stopped).is_running()
    assert janitor(grace=0, silence=0) == []
    assert state_of(stopped).is_crashed()
    assert "heartbeat" in state_of(stopped).message
    assert state_of(never).is_running()  # where nothing beats, silence says nothing
    assert janitor(grace=0) == ["stopped"]


def test_a_run_that_is_deleted_meanwhile_keeps_the_janitor_from_no_other(made, monkeypatch):
    for name in ("gone", "there"):
        made(name, Running(), Crashed(message="node gone"))

    def deletes(client, run):
        past = past_of(client, run)
        if run.name == "gone":
            client.delete_flow_run(run.id)
        return past

    monkeypatch.setattr("flows.janitor.past_of", deletes)
    assert janitor(grace=0) == ["there"]


@flow(persist_result=False)
def nothing() -> None: ...


def test_a_cancelled_pipeline_cancels_its_children_that_have_not_ended_and_no_other_runs(monkeypatch):
    monkeypatch.setattr(children, "PAGE", 2)
    with get_client(sync_client=True) as client:
        parent, stranger = (client.create_flow_run(nothing, state=Running()) for _ in range(2))
        link = client.create_task_run(task(lambda: None, name="link"), parent.id, "0")
        made = lambda state: client.create_flow_run(nothing, parent_task_run_id=link.id, state=state).id  # noqa: E731
        ended = {made(Completed()): StateType.COMPLETED, made(Failed()): StateType.FAILED, made(Crashed()): StateType.CRASHED}
        going = [made(state) for state in (Running(), Running(), Pending(), Scheduled(), Scheduled())]
        children.cancel_children(nothing, parent, Cancelling())
        assert {client.read_flow_run(run).state.type for run in going} <= {StateType.CANCELLING, StateType.CANCELLED}
        assert {run: client.read_flow_run(run).state.type for run in ended} == ended
        assert client.read_flow_run(stranger.id).state.is_running()


def test_a_cancelled_pipeline_cancels_all_of_its_children_however_many_there_are(monkeypatch):
    """An API that gives 200 runs at most, the newest first, on which 450 have ended and 450 wait, one of which ends between two pages."""

    class Api:
        def __init__(self):
            self.runs = {uuid4(): StateType.COMPLETED if i < 450 else StateType.SCHEDULED for i in range(900)}
            self.pages = 0

        def __enter__(self):
            return self

        def __exit__(self, *_): ...

        def read_flow_runs(self, *, flow_run_filter, sort=None, limit=None, offset=0):
            self.pages += 1
            if self.pages == 2:
                self.runs[next(run for run, state in self.runs.items() if state is StateType.SCHEDULED)] = StateType.COMPLETED
            wanted = flow_run_filter.state and flow_run_filter.state.type.any_
            found = [run for run, state in self.runs.items() if not wanted or state in wanted]
            return [
                FlowRun(id=run, flow_id=uuid4(), state=PrefectState(type=self.runs[run]))
                for run in found[offset : offset + min(limit or 200, 200)]
            ]

        def set_flow_run_state(self, run, state):
            if self.runs[run] is StateType.SCHEDULED:  # what has ended stays as it is
                self.runs[run] = state.type

    api = Api()
    monkeypatch.setattr(children, "get_client", lambda **_: api)
    children.cancel_children(nothing, SimpleNamespace(id=uuid4()), Cancelling())
    assert Counter(api.runs.values()) == {StateType.COMPLETED: 451, StateType.CANCELLING: 449}


def test_the_api_may_be_away_for_a_while_but_not_for_ever():
    answers = iter([httpx.ConnectError("nobody there"), httpx.ReadTimeout("slow"), "here"])

    def ask():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently(ask, every=0.01) == "here"

    def never():
        raise httpx.ConnectError("nobody there")

    with pytest.raises(httpx.ConnectError):
        patiently(never, away=0.05, every=0.01)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pool", "stagedif"], "There is no work pool 'stagedif' (there are: stagediff)"),
        (["--pool", "new=proces"], "'proces' is not a type of work pool; expected one of: process, slurm, kubernetes"),
        (["--pool", "stagediff=kubernetes"], "is of type process, not kubernetes"),
        (["--variable", "imagee=x"], "has no job variable 'imagee'"),
        (["--pool", "k=kubernetes", "--variable", "namespce=x"], "Did you mean namespace?"),
        (["--gpus", "stagedif=2"], "not among the pools"),
        (["--gpus", "two"], "expected a number"),
        (["--gpus=-1"], "a whole number, 0 or more"),
        (["--cpu-steps", "0"], "a whole number, 1 or more"),
        (["--pool", "lab=slurm", "--gpus", "lab=0"], "--gpus lab=0: A job of the work pool 'lab' could have at most 0 GPUs, but the step"),
        (["--pool", "k=kubernetes", "--gpus", "k=0"], "asks for 1. Give the number that one node"),
    ],
)
def test_deploy_refuses_what_cannot_work(capsys, options, words):
    assert main(options) == 2
    assert words in capsys.readouterr().err
    with get_client(sync_client=True) as client:
        assert [pool.name for pool in client.read_work_pools()] == ["stagediff"]


def test_deploy_says_when_there_is_no_api(capsys):
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert main([]) == 2
    assert "http://127.0.0.1:9/api does not answer" in capsys.readouterr().err
    with temporary_settings({PREFECT_API_URL: None}):
        assert main([]) == 2
    assert "PREFECT_API_URL is not set" in capsys.readouterr().err


def test_deploy_sets_up_limits_automations_and_schedules():
    with get_client(sync_client=True) as client:
        assert client.read_global_concurrency_limit_by_name("stagediff-gpus").limit == 2
        queues = {queue.name: queue.concurrency_limit for queue in client.read_work_queues(work_pool_name="stagediff")}
        assert queues == {"default": None, "cpu": 2, "gpu": 2}
        (zombies,) = client.read_automations_by_name("stagediff: runs without a heartbeat")
        assert zombies.enabled
        (every,) = client.read_deployment_by_name("janitor/stagediff").schedules
        assert every.schedule.interval == timedelta(seconds=120)
        assert client.read_deployment_by_name("quality/stagediff").work_queue_name == "gpu"
        assert client.read_deployment_by_name("diff/stagediff").work_queue_name == "cpu"
        assert client.read_deployment_by_name("stagewise/stagediff").parameters == {"mode": "deployments", "pool": "stagediff"}


def test_a_pool_without_gpus_bounds_the_steps_that_would_take_one_all_the_same():
    with get_client(sync_client=True) as client:
        for gpus, places in ((2, 2), (0, 3)):
            there = {pool.name: pool for pool in client.read_work_pools()}
            wanted = Wanted("bare", "process", gpus=gpus, cpu_steps=3)
            install(client, wanted, template_for(wanted, there), there)
            queues = {queue.name: queue.concurrency_limit for queue in client.read_work_queues(work_pool_name="bare")}
            assert (queues["gpu"], queues["cpu"]) == (places, 3)
            assert gpus_of(client, "bare") == (gpus or None)
        client.delete_work_pool("bare")


def test_runs_of_the_past_are_seen_by_their_names(worker, copy):
    config, _, plan = copy("quality-M")
    before = datetime.now(UTC)
    run(config)
    with get_client(sync_client=True) as client:
        name = f"quality M · tiny · {plan['quality-M'].ref.key[:4]}"
        found = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])))
        newest = max(found, key=lambda r: r.created)
        assert newest.created > before
        assert newest.parent_task_run_id is not None
        assert set(newest.tags) == {"stagediff", "quality", "auto-retry", "gpu"}
