"""What `stagediff plan` says a run will cost, beside what it did cost.

    python benchmarks/plan_accuracy.py CONFIG.yaml --store STORE [--set a.b=c …] [--cpu] [--json] [--steps kinds,formation,drift]

Plans, runs what is missing step by step in this process, and prints a row per step (those with one price in one row): estimated and measured seconds and bytes,
and the largest resident memory while it ran (Linux). A step that was there already has its manifest's seconds and no memory. On a machine that others use too,
OMP_NUM_THREADS=1 and --cpu count processor time instead of seconds passed.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from stagediff.cli.options import load
from stagediff.config import make_plan
from stagediff.estimate import estimate_plan
from stagediff.plan import Node, execute
from stagediff.store import Store

REFS = Path("/proc/self/clear_refs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--store", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", default="", help="only these, by their names in the plan without the checkpoint")
    parser.add_argument("--cpu", action="store_true", help="processor time of this process instead of seconds passed")
    parser.add_argument("--json", action="store_true", help="one line of JSON per row")
    given = parser.parse_args()
    rows = [row for row in measured(given) if not given.steps or row["step"] in given.steps.split(",")]
    if given.json:
        for row in rows:
            print(json.dumps(row))
        return
    print(f"{'step':26}{'n':>4}{'est. s':>10}{'s':>10}{'ratio':>7}{'est. MB':>10}{'MB':>10}{'ratio':>7}{'peak MiB':>10}")
    for r in rows:
        print(
            f"{r['step']:26}{r['n']:>4}{r['estimated_seconds']:>10.1f}{r['seconds']:>10.1f}{_ratio(r['estimated_seconds'], r['seconds']):>7}"
            f"{r['estimated_bytes'] / 1e6:>10.2f}{r['bytes'] / 1e6:>10.2f}{_ratio(r['estimated_bytes'], r['bytes']):>7}{r['peak_mib'] or 0:>10.0f}"
        )


def measured(given: argparse.Namespace) -> list[dict[str, Any]]:
    config = load(given.config, given.store, given.set)
    store = Store(config.store)
    plan = make_plan(config, store)
    estimates = {row.name: row for row in estimate_plan(plan, store)}
    peaks: dict[str, float] = {}
    spent: dict[str, float] = {}
    before = time.process_time()

    def done(node: Node) -> None:
        nonlocal before
        passed, peaks[node.name] = store.artifact(node.ref).manifest.seconds, _peak_mib()
        used, before = time.process_time() - before, time.process_time()
        spent[node.name] = used if given.cpu else passed
        print(f"{node.name}: {passed:.1f} s, processor {used:.1f} s, peak {peaks[node.name]:.0f} MiB", file=sys.stderr, flush=True)
        _forget_peak()

    _forget_peak()
    execute(plan, store, device="cpu", keep=config.keep, on_done=done)
    groups: dict[str, list[str]] = defaultdict(list)
    for node in plan:
        groups[node.name.partition("-step")[0]].append(node.name)
    found = []
    for name, names in groups.items():
        manifests = [store.artifact(plan[n].ref).manifest for n in names]
        found.append(
            {
                "step": name,
                "n": len(names),
                "estimated_seconds": sum(estimates[n].seconds or 0.0 for n in names),
                "seconds": sum(spent.get(n, m.seconds) for n, m in zip(names, manifests, strict=True)),
                "estimated_bytes": sum(estimates[n].bytes or 0 for n in names),
                "bytes": sum(m.size for m in manifests),
                "peak_mib": max((peaks[n] for n in names if n in peaks), default=None),
            }
        )
    return found


def _ratio(estimated: float, measured: float) -> str:
    return f"{estimated / measured:.2f}" if measured and estimated else "–"


def _forget_peak() -> None:
    if REFS.exists():
        REFS.write_text("5")  # the kernel's record of this process's largest resident set starts anew


def _peak_mib() -> float:
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
