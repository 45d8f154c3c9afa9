"""Anything dies at a random moment, twenty times over: the pipeline ends complete by itself, and hardly anything is computed twice."""

import os
import random
import signal
import time

import pytest
from local_prefect import until

pytestmark = pytest.mark.soak

KILLS = int(os.environ.get("STAGEDIFF_KILLS", "20"))
KINDS = ("step", "pipeline", "worker and all it started", "server")
PRUNED = ("finetune-M", "statistics-M", "quality-M", "diff", "report")
"""A chain and two that run beside it."""


@pytest.mark.parametrize("kill", range(KILLS))
def test_the_pipeline_ends_complete_whatever_is_killed(deployed, kill, record_property):
    chance = random.Random(kill)
    kind = KINDS[kill % len(KINDS)]
    case = deployed.case(f"kill-{kill}", *PRUNED)
    start = time.monotonic()
    pipeline = deployed.start(case)
    until(lambda: deployed.begun(case), "a step began", 600)
    time.sleep(chance.uniform(0, 12))
    if kind == "server":
        deployed.server.stop(signal.SIGKILL)
        time.sleep(chance.uniform(0, 10))
        deployed.server.start()
    elif kind == "worker and all it started":
        deployed.worker.end(signal.SIGKILL)
        deployed.restart_worker()
    else:
        for pid in deployed.processes_of([pipeline] if kind == "pipeline" else [c["id"] for c in deployed.server.children(pipeline)]):
            os.kill(pid, signal.SIGKILL)

    # the pipeline itself may have been killed: the janitor's deployment, which runs every two minutes, starts it again
    until(lambda: deployed.server.flow_run(pipeline)["state_type"] == "COMPLETED", f"complete after the kill of the {kind}", 1500, every=2)
    twice = {name: n for name, n in deployed.done(case).items() if n > 1}
    begun = deployed.begun(case)
    record_property("kill", f"{kind}: {time.monotonic() - start:.0f} s, begun {len(begun)} of {len(PRUNED)}, done twice {twice}")
    print(
        f"kill {kill}: {kind}: {time.monotonic() - start:.0f} s, began {len(begun)} computations of {len(PRUNED)} steps, done twice: {twice or 'none'}"
    )
    assert case.is_as_the_whole()
    assert not twice
    assert len(begun) <= len(PRUNED) + 2  # two steps at most were under way at once
