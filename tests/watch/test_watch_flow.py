"""The watch as a flow: looks, starts what is due once, goes on after crashes, tells what a person has to mend."""

from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun
from prefect.events.schemas.deployment_triggers import DeploymentTriggerTypes
from prefect.states import Completed, Crashed, Failed, Running, State
from prefect.testing.utilities import prefect_test_harness
from pydantic import TypeAdapter

from flows.deploy import directory_of, register
from flows.deployments import other_entries
from flows.pools import Wanted, install, template_for
from flows.track import track
from flows.watch import TRIGGERS, entry, triggers, watch
from flows.watch import deploy as deploy_watch
from stagediff.config import parse_config
from stagediff.errors import StagediffError, UserError
from stagediff.store import Store
from stagediff.watch.watcher import Watcher

from .runs import tiny_diff, tiny_watch

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", autouse=True)
def prefect_server():
    with prefect_test_harness(server_startup_timeout=120):
        track.to_deployment(name="stagediff").apply()
        yield


def pipelines(run: str) -> list[FlowRun]:
    """The pipeline's runs that a watch has started, oldest first."""
    with get_client(sync_client=True) as client:
        mine = FlowRunFilter(tags=FlowRunFilterTags(all_=[f"watch:{run}"]))
        return sorted(client.read_flow_runs(flow_run_filter=mine), key=lambda r: r.created)


def put(run: FlowRun, *states: State[Any]) -> None:
    with get_client(sync_client=True) as client:
        for state in states:
            client.set_flow_run_state(run.id, state, force=True)


def test_inline_it_runs_the_chain_and_then_nothing(save, tmp_path):
    body = tiny_watch(tmp_path, name="inline")
    assert watch(body, device="cpu") == "waiting for a second checkpoint: a chain begins with two"
    save(10), save(20)
    assert watch(body, device="cpu", run="another", announced=20).startswith("The checkpoint announced is of the run 'another'")
    assert watch(body, device="cpu", run="inline", announced=20) == "checkpoint 20: done"
    assert watch(body, device="cpu") == "nothing new"
    store = Store(tmp_path / "store")
    assert len(store.refs("reports")) == 1


def test_an_announced_checkpoint_needs_no_quiet_time(save, tmp_path):
    save(10), save(20, done=False)
    body = tiny_watch(tmp_path, name="announced", watch={"source": str(tmp_path / "lm"), "quiet": 3600})
    assert watch(body, mode="deployments", device="cpu").startswith("waiting for a second checkpoint")
    assert "started" in watch(body, mode="deployments", device="cpu", run="announced", announced=20)


def test_a_pipeline_is_started_once_and_what_comes_meanwhile_is_taken_at_once_afterwards(save, tmp_path):
    body = tiny_watch(tmp_path, name="once")
    save(10), save(20)
    assert "checkpoint 20" in watch(body, mode="deployments")
    assert "is on its way" in watch(body, mode="deployments")
    save(30), save(40)
    assert "is on its way" in watch(body, mode="deployments")
    (first,) = pipelines("once")
    assert first.parameters["config"]["checkpoints"]["steps"] == [10, 20]
    put(first, Running(), Completed())
    assert "checkpoint 40" in watch(body, mode="deployments")
    second = pipelines("once")[-1]
    assert second.parameters["config"]["checkpoints"]["steps"] == [10, 20, 30, 40]
    assert second.id != first.id
    assert first.idempotency_key != second.idempotency_key
    assert second.idempotency_key.startswith("once:40:")


def test_a_crashed_pipeline_is_started_again_in_place_and_a_failed_one_is_told(save, tmp_path, monkeypatch):
    body = tiny_watch(tmp_path, name="crash")
    save(10), save(20)
    watch(body, mode="deployments")
    (run,) = pipelines("crash")
    put(run, Running(), Crashed(message="node gone"))
    monkeypatch.setattr("flows.watch.SETTLE", 3600.0)
    assert "started again at the next look" in watch(body, mode="deployments")  # a crash's late report would end it again
    monkeypatch.setattr("flows.watch.SETTLE", 0.0)
    assert "had crashed: started again" in watch(body, mode="deployments")
    (again,) = pipelines("crash")
    assert (again.id, again.state.name) == (run.id, "AwaitingRetry")
    put(run, Running(), Failed(message="disk full"))
    with pytest.raises(StagediffError, match="disk full Mend the cause, then press Retry"):
        watch(body, mode="deployments")
    assert len(pipelines("crash")) == 1


def test_what_has_gone_from_the_store_is_made_again_but_not_for_ever(save, tmp_path):
    body = tiny_watch(tmp_path, name="gone")
    save(10), save(20)
    for n in range(3):
        assert "started" in watch(body, mode="deployments")
        assert len(pipelines("gone")) == n + 1
        put(pipelines("gone")[-1], Running(), Completed())
    with pytest.raises(StagediffError, match="has completed 3 times.*same store"):
        watch(body, mode="deployments")


def test_without_a_config_it_says_what_to_do():
    assert "stagediff watch CONFIG --deploy" in watch(run="any", announced=5)


@pytest.mark.parametrize("made", [TRIGGERS, triggers("my-run")], ids=["all", "one"])
def test_the_trigger_is_one_that_prefect_takes(made):
    from prefect.server.utilities.user_templates import validate_user_template

    (body,) = made
    trigger = TypeAdapter(DeploymentTriggerTypes).validate_python(body)
    assert trigger.expect == {"checkpoint.created"}
    for template in body["parameters"].values():
        validate_user_template(template)
    assert set(body["parameters"]) <= set(watch.parameters.properties)


def test_a_deployed_watch_begins_in_the_folder_that_its_pool_was_deployed_with(save, tmp_path):
    save(10)
    body = tiny_watch(tmp_path, name="far")
    wanted = Wanted("far", "process", gpus=0, directory="/app")
    with get_client(sync_client=True) as client:
        install(client, wanted, template_for(wanted, {}), {})
        (pipeline,) = [e for e in other_entries("far") if e["entrypoint"] == "flows/track.py:track"]
        register(client, pipeline, "/app")
        assert "watch/far looks every" in deploy_watch(body, pool="far")
        assert directory_of(client.read_deployment_by_name("watch/far")) == "/app"
        with pytest.raises(UserError, match="no deployment stagewise/far"):
            deploy_watch(tiny_diff(tmp_path, save(0, folder="base")), pool="far")


def test_a_deployments_paths_are_written_in_full(save, tmp_path, monkeypatch):
    save(10)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rel").mkdir()
    body = tiny_watch(tmp_path, name="rel", store="store", watch={"source": "lm"}, data={"path": "data.jsonl"})
    config = parse_config(body)
    made = entry(config.model_dump(mode="json", exclude={"extensions"}) | config.extensions)
    written = made["parameters"]["config"]
    assert written["name"] == "rel"
    assert written["watch"]["source"] == str(tmp_path / "lm/checkpoint-{step}")
    assert written["store"] == str(tmp_path / "store")
    assert written["data"]["path"] == str(tmp_path / "data.jsonl")
    assert written["model"]["name"] == str(tmp_path / "lm/checkpoint-{step}")
    monkeypatch.chdir("/")
    assert [s.state for s in Watcher(parse_config(written)).look().seen] == ["complete"]
