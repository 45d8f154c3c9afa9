"""What operations cost on this machine: from an event to a scheduled run, per step of a pipeline, and a pipeline that has nothing to do.

    python benchmarks/operations.py [--events 10] [--steps quality-S,diff,report]

Starts a Prefect server and a worker of its own on free loopback ports, deploys everything as `make deploy` does, and makes a tiny run. Prints one line of JSON:

event_to_run_seconds   from an announced checkpoint to the scheduled run of `watch`, no worker being there: each, and their median
step_overhead_seconds  of every step that was missing: from when its run was made to when it ended, without the seconds that its artifact's manifest counts
                       (orchestration, process start, imports); they are run one after the other
untouched_seconds      a pipeline through deployments all whose artifacts are complete: from when it was made to its end

Needs what `make setup-dev` installs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import yaml  # noqa: E402
from local_prefect import Server, local_prefect, until  # noqa: E402
from tiny import tiny_config  # noqa: E402

from stagediff.config import make_plan, parse_config  # noqa: E402
from stagediff.store import Store  # noqa: E402

ANNOUNCE = """
import sys
from flows.announce import announce
announce("benchmark", int(sys.argv[1]), sys.argv[2])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=10)
    parser.add_argument("--steps", default="quality-S,diff,report")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = tiny_config(str(folder / "store"))
        (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
        command(
            [str(Path(sys.executable).with_name("stagediff")), "run", str(folder / "tiny.yaml"), "--runner", "plain", "--device", "cpu"],
            os.environ,
        )
        with local_prefect(folder / "prefect") as server:
            command([sys.executable, "-m", "flows.deploy"], server.environment)
            result: dict[str, Any] = {"event_to_run_seconds": events(server, folder, given.events)}
            worker = server.worker()
            try:
                server.wait_for_worker(worker)
                result |= pipelines(server, folder, config, given.steps.split(","))
            finally:
                worker.end()
    print(json.dumps({**result, "load": round(os.getloadavg()[0], 2)}))


def command(words: list[str], environment: Any) -> None:
    done = subprocess.run(words, env=dict(environment), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def events(server: Server, folder: Path, count: int) -> dict[str, Any]:
    """One checkpoint after the other, each announced by a process of its own, as a training does."""
    for step in range(count):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir()
        command([sys.executable, "-c", ANNOUNCE, str(step), str(checkpoint)], server.environment)
        until(lambda n=step + 1: len(looks(server)) >= n, f"the run for event {step}", 60, every=0.2)  # type: ignore[misc]

    def occurred() -> dict[str, str] | None:
        """The server stores events some seconds after it has acted on them."""
        found = server.ask("/events/filter", filter={"event": {"name": ["checkpoint.created"]}}, limit=50)["events"]
        return {event["id"]: event["occurred"] for event in found} if len(found) >= count else None

    at = until(occurred, "the events are stored", 60)
    taken = [seconds(at[run["parameters"]["event"]], run["created"]) for run in looks(server)]
    return {"each": [round(s, 2) for s in sorted(taken)], "median": round(statistics.median(taken), 2)}


def looks(server: Server) -> list[dict[str, Any]]:
    """The scheduled runs of the watch that an event triggered."""
    found = server.ask("/flow_runs/filter", flows={"name": {"any_": ["watch"]}}, limit=200)
    return [run for run in found if run["parameters"].get("event")]


def pipelines(server: Server, folder: Path, config: dict[str, Any], names: list[str]) -> dict[str, Any]:
    store = Store(folder / "store")
    plan = make_plan(parse_config(config), store)
    overhead = {}
    for name in names:
        node = plan[name]
        store.remove(node.ref)
        run = server.run("stagewise/stagediff", config=config, device="cpu")
        server.wait(run)
        (child,) = server.children(run)
        overhead[name] = round(seconds(child["created"], child["end_time"]) - store.artifact(node.ref).manifest.seconds, 2)
    time.sleep(5)  # the last run's process ends
    run = server.flow_run(server.run("stagewise/stagediff", config=config, device="cpu"))
    ended = server.wait(run["id"])
    return {"step_overhead_seconds": overhead, "untouched_seconds": round(seconds(run["created"], ended["end_time"]), 2)}


def seconds(begin: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()


if __name__ == "__main__":
    main()
