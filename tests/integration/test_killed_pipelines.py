"""Anything dies at a random moment, twenty-four times over: the pipeline ends complete by itself, and hardly anything is computed twice."""

import os
import random
import signal
import time
from contextlib import suppress

import pytest
from local_prefect import until

pytestmark = pytest.mark.soak

KILLS = int(os.environ.get("STAGEDIFF_KILLS", "24"))
KINDS = ("step", "pipeline", "worker and all it started", "server", "node", "rank")
PRUNED = ("harvest-finetuned", "finetune-M", "statistics-M", "quality-M", "diff", "report")
"""A chain and two that run beside it."""
BY_TWO_RANKS = {"finetune": {"gpus": 2}}


@pytest.fixture(autouse=True)
def slow(deployed):
    """The work is so small that it would be over before a kill could hit it."""
    file = deployed.hold("slow")
    yield
    file.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def by_ranks(deployed):
    """The run whose finetune was shared by two ranks, in peace: sums over a batch that are made in two halves round otherwise."""
    case = deployed.case("by-ranks", *PRUNED)
    case.config["resources"] = BY_TWO_RANKS
    deployed.server.wait(deployed.start(case))
    assert not case.plan.missing(case.store)
    return case.store


@pytest.mark.parametrize("kill", range(KILLS))
def test_the_pipeline_ends_complete_whatever_is_killed(deployed, kill, request, record_property):
    chance = random.Random(kill)
    kind = KINDS[kill % len(KINDS)]
    case = deployed.case(f"kill-{kill}", *PRUNED)
    lab = request.getfixturevalue("lab") if kind == "node" else None
    if kind == "rank":
        case.whole = request.getfixturevalue("by_ranks")
        case.config["resources"] = BY_TWO_RANKS
    whole = {"shard": shards(case, "harvest-finetuned"), "update": updates(case, "finetune-M")}
    start = time.monotonic()
    pipeline = deployed.start(case, **({"pool": "lab"} if lab else {}))
    target = "finetune-M" if kind == "rank" else chance.choice(PRUNED[:-1])  # so that something is left to be killed
    wait_for_moment(deployed, case, target, chance, whole)
    killed = KILL[kind](deployed, pipeline, lab, chance)

    # the pipeline itself may have been killed: the janitor's deployment, which runs every two minutes, starts it again
    until(lambda: deployed.server.flow_run(pipeline)["state_type"] == "COMPLETED", f"complete after the kill of the {kind}", 1500, every=2)
    if lab:
        lab.cluster.revive_node(killed)
    twice = {name: n for name, n in deployed.done(case).items() if n > 1}
    begun = deployed.begun(case)
    lost = {event: deployed.noted(case, event).total() - n for event, n in whole.items()}
    told = f"{kind} ({killed}) at {target}: {time.monotonic() - start:.0f} s, began {len(begun)} computations of {len(PRUNED)} steps, lost {lost}"
    record_property("kill", told)
    print(f"kill {kill}: {told}, done twice: {twice or 'none'}")
    assert case.is_as_the_whole()
    assert not twice
    assert len(begun) <= len(PRUNED) + 2  # two steps at most were under way at once
    assert 0 <= lost["shard"] <= 1
    assert 0 <= lost["update"] <= interval(case, "finetune-M")


def wait_for_moment(deployed, case, target, chance, whole) -> None:
    """A random shard or update of the target, or some moment after it began; earlier where the pipeline was faster."""
    until(lambda: target in deployed.begun(case), f"{target} began", 900, every=0.02)
    inner = {"harvest-finetuned": "shard", "finetune-M": "update"}.get(target)
    if inner:
        n = chance.randrange(whole[inner])
        until(lambda: deployed.noted(case, inner)[target] > n or deployed.done(case)[target], f"{inner} {n} of {target}", 300, every=0.005)
        time.sleep(chance.uniform(0, 0.05))
    else:
        time.sleep(chance.uniform(0, 4))


def shards(case, name: str) -> int:
    return sum("/c/" in f.path for f in case.whole.artifact(case.plan[name].ref).manifest.files)


def updates(case, name: str) -> int:
    budget = case.plan[name].spec.budget
    return budget.tokens // budget.batch


def interval(case, name: str) -> int:
    spec = case.plan[name].spec
    return max(1, spec.checkpoint_tokens // spec.budget.batch)


def end(pids) -> int:
    """Kills processes; how many were still there."""
    n = 0
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            n += 1
    return n


def kill_step(deployed, pipeline, lab, chance) -> str:
    running = lambda: deployed.processes_of([c["id"] for c in deployed.server.children(pipeline)])  # noqa: E731
    return f"{until(lambda: end(running()), 'a step runs', 300, every=0.05)} processes"


def kill_pipeline(deployed, pipeline, lab, chance) -> str:
    return f"{until(lambda: end(deployed.processes_of([pipeline])), 'the pipeline runs', 300, every=0.05)} processes"


def kill_worker(deployed, pipeline, lab, chance) -> str:
    deployed.worker.end(signal.SIGKILL)
    deployed.restart_worker()
    return "all"


def kill_server(deployed, pipeline, lab, chance) -> str:
    deployed.server.stop(signal.SIGKILL)
    away = chance.uniform(0, 10)
    time.sleep(away)
    deployed.server.start()
    return f"away for {away:.0f} s"


def kill_node(deployed, pipeline, lab, chance) -> str:
    jobs = until(lab.cluster.jobs, "a step is a job", 300, every=0.05)
    node = until(lambda: next(filter(None, map(lab.cluster.node_of, jobs)), None) or chance.choice(lab.cluster.nodes), "a job has a node")
    lab.cluster.kill_node(node)
    return node


def kill_rank(deployed, pipeline, lab, chance) -> str:
    rank = chance.randrange(2)
    found = lambda: [  # noqa: E731
        pid
        for child in deployed.server.children(pipeline)
        for pid in deployed.server.processes(f"PREFECT__FLOW_RUN_ID={child['id']}", f"LOCAL_RANK={rank}")
    ]
    until(lambda: end(found()), "a rank runs", 300, every=0.02)
    return f"rank {rank}"


KILL = dict(zip(KINDS, (kill_step, kill_pipeline, kill_worker, kill_server, kill_node, kill_rank), strict=True))
