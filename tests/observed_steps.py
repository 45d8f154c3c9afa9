"""The product's step flows, watched: what computes is logged, and a test can make a step fail. Tests deploy these in place of `flows/steps.py`.

OBSERVED_LOG names a file that gets a JSON line when a computation begins, at each shard of a harvest and each update of a training (by the first of
several ranks), and when it is done or failed; none where the artifact is found complete. While the file
OBSERVED_FAULTS/<name of the step in the plan> exists, that step raises; with OBSERVED_HOLD/<name> there it waits (so that a test can kill it);
with OBSERVED_HOLD/slow every shard and update takes a moment.
Run as a program it is `make deploy`, with these in place of those.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from flows.names import attribute
from flows.steps import flow_of
from stagediff import steps
from stagediff.ranks import launch

_compute, _command = steps.run, launch.command
_now: dict[str, Any] = {}
"""What this process computes now."""
_watched: set[str] = set()


def _note(event: str, **more: Any) -> None:
    line = {"event": event, "time": time.time(), "pid": os.getpid(), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), **more}
    line["knows_secret"] = bool(os.environ.get("AWS_SECRET_ACCESS_KEY"))
    file = os.open(os.environ["OBSERVED_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{json.dumps(line)}\n".encode())
    os.close(file)


def _observed(spec: Any, store: Any, **given: Any) -> Any:
    about = {"name": given.get("name"), "store": store.root, "force": given.get("force", False)}
    if steps.is_done(spec, store, given.get("force", False)):
        return _compute(spec, store, **given)
    _now.clear()
    _now.update(about)
    _watch_work(spec.step)
    _note("begin", **about)
    try:
        while Path(os.environ["OBSERVED_HOLD"], str(about["name"])).exists():
            time.sleep(0.1)
        if Path(os.environ["OBSERVED_FAULTS"], str(about["name"])).exists():
            raise RuntimeError(f"CUDA error: an illegal memory access was encountered (in {about['name']})")
        ref = _compute(spec, store, **given)
    except BaseException:
        _note("failed", **about)
        raise
    _note("done", **about)
    return ref


def _watch_work(step: str) -> None:
    """From now on every shard or update of this process is noted. Imported here, as the product does: what is large where it computes only."""
    if step == "harvest":
        from stagediff.lm import harvest as module

        owner: Any = module
        name, event = "forward_shard", "shard"
    elif step in ("train", "finetune"):
        from stagediff.sae.trainer import Trainer

        owner, name, event = Trainer, "train_on", "update"
    else:
        return
    if event in _watched:  # a task that is tried again
        return
    _watched.add(event)
    function = getattr(owner, name)

    def noted(*args: Any, **options: Any) -> Any:
        _note(event, **_now)
        if Path(os.environ["OBSERVED_HOLD"], "slow").exists():
            time.sleep(0.2)
        return function(*args, **options)

    setattr(owner, name, noted)


def _observed_command(ranks: int, module: str, *arguments: str) -> list[str]:
    return _command(ranks, "tests.observed_ranks" if module == "stagediff.ranks" else module, *arguments)


steps.run = _observed
launch.command = _observed_command

for _step in steps.all_steps():
    globals()[attribute(_step.name)] = flow_of(_step)

if __name__ == "__main__":
    from flows import deploy, deployments

    sys.path.insert(0, str(deploy.ROOT))

    def entry(step: steps.Step, pool: str) -> dict[str, Any]:
        given = deployments.step_entry(step, pool)
        return {**given, "entrypoint": given["entrypoint"].replace("flows/steps.py", "tests/observed_steps.py")}

    chosen = os.environ.get("OBSERVED_STEPS")  # a few will do where time matters
    all_steps = steps.all_steps()
    steps.all_steps = lambda: [step for step in all_steps if chosen is None or step.name in chosen.split(",")]
    deploy.step_entry = entry
    sys.exit(deploy.main())
