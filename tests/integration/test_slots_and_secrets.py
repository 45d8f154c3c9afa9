"""Many steps on two GPU slots with a server that dies in between; and what was in the environment all the while is written nowhere."""

import json
import signal
from collections import Counter
from pathlib import Path

import pytest
from local_prefect import until

pytestmark = pytest.mark.integration


def overlaps(events: list[dict]) -> list[list[dict]]:
    """For each computation that began: it and those that were under way then."""
    out, going = [], {}
    for event in sorted(events, key=lambda e: e["time"]):
        if event["event"] == "begin":
            going[event["pid"]] = event
            out.append(list(going.values()))
        elif event["event"] in ("done", "failed"):
            going.pop(event["pid"], None)
    return out


def run_on_two_slots(deployed, pipelines: int) -> None:
    """Queues twelve GPU steps per pipeline; kills the server once two are done, and starts it again."""
    names = [node.name for node in deployed.plan if node.spec.step in ("statistics", "quality")]
    cases = [deployed.case(f"slots-{pipelines}-{i}", *names) for i in range(pipelines)]
    runs = [deployed.start(case) for case in cases]
    until(lambda: sum(sum(deployed.done(case).values()) for case in cases) >= 2, "two steps done", 600)
    deployed.server.stop(signal.SIGKILL)
    deployed.server.start()
    for run in runs:
        deployed.server.wait(run, seconds=1200 * pipelines)

    for case, run in zip(cases, runs, strict=True):
        assert deployed.done(case) == Counter(names)
        assert case.is_as_the_whole()
        assert Counter(child["state_type"] for child in deployed.server.children(run)) == {"COMPLETED": len(names)}
    events = [event for case in cases for event in deployed.events(case)]
    together = overlaps(events)
    assert max(len(group) for group in together) == 2  # both slots were used, and never more
    for group in together:
        assert len({event["gpu"] for event in group}) == len(group), group
    assert {event["gpu"] for event in events} == {"0", "1"}
    free = lambda: deployed.server.request("GET", "/v2/concurrency_limits/stagediff-gpus")["active_slots"] == 0  # noqa: E731
    until(free, "all slots are free again", 240)


def test_many_steps_on_two_slots_while_the_server_is_killed_and_comes_back(deployed):
    run_on_two_slots(deployed, 1)


@pytest.mark.soak
def test_a_hundred_steps_on_two_slots_while_the_server_is_killed_and_comes_back(deployed):
    run_on_two_slots(deployed, 9)


def test_a_secret_of_the_environment_is_in_no_parameter_artifact_log_or_manifest(deployed):
    case = deployed.case("secret", "diff")
    fault = deployed.fault("diff")  # tracebacks are logged too
    pipeline = deployed.start(case)
    deployed.server.wait(pipeline, "FAILED")
    fault.unlink()
    assert all(event["knows_secret"] for event in deployed.events(case))

    ask = deployed.server.ask
    for path in ("flow_runs", "task_runs", "deployments", "artifacts", "logs", "work_pools", "block_documents", "variables"):
        assert deployed.secret not in json.dumps(ask(f"/{path}/filter", limit=200)), path
    files = [file for place in ("prefect", "stores") for file in (deployed.folder / place).rglob("*") if file.is_file()]
    found: dict[str, list[str]] = {deployed.secret: [], case.store.root: []}  # the second is a parameter of the run
    for file in files:  # the server's database, lease files, all logs, and every artifact
        body = Path(file).read_bytes()
        for word in found:
            if word.encode() in body:
                found[word].append(file.name)
    assert found[deployed.secret] == []
    assert any(name.startswith("prefect.db") for name in found[case.store.root]), "the search finds what is there"
