"""What a plan will cost: tokens and bytes from the specs; time from earlier runs in the same store, else from this machine's matmul speed.

Steps that work on tables rather than on matrices say their time themselves, per row and per number, as it was measured on one core (docs/results.md, "What the
analysis costs").
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from stagediff import steps
from stagediff.plan import Plan
from stagediff.resources import StepResources, resources_of
from stagediff.spec import Ref
from stagediff.store import State, Store

__all__ = ["Estimate", "Row", "estimate_plan"]

EFFICIENCY = 0.25
"""Share of the machine's matmul speed that a step reaches when nothing was measured yet."""


@dataclass(frozen=True)
class Estimate:
    """Size of one step: tokens read, bytes kept, floating point operations, and seconds of the work that is none of these."""

    tokens: int = 0
    bytes: int = 0
    flops: float = 0.0
    """On the run's device. Passes over numbers that take as long as so many operations count as these."""
    seconds: float = 0.0
    """Beside them: tables, files, resampling on the CPU."""
    memory: Callable[[int, str], int] | None = None
    """Bytes on each GPU, by how many processes share the step and what they share out (`resources.StepResources.shard`)."""
    note: str = ""
    """What else the step costs (money that a server asks for), for a reader."""


@dataclass(frozen=True)
class Row:
    """One line of `stagediff plan`."""

    name: str
    ref: Ref
    state: str
    to_run: bool
    tokens: int | None
    bytes: int | None
    seconds: float | None
    note: str = ""
    memory: int | None = None
    """Bytes on each GPU, with the GPUs that the config gives the step."""

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "ref": str(self.ref)}


_STATE = {State.COMPLETE: "done", State.PARTIAL: "partial", State.EVICTED: "evicted", State.ABSENT: "to do", State.DAMAGED: "damaged"}


def estimate_plan(plan: Plan, store: Store, resources: Mapping[str, StepResources] | None = None) -> list[Row]:
    """A row per node. Nodes whose step has no estimate show only their state. `resources` are the config's."""
    states = plan.states(store)
    missing = {node.ref for node in plan.missing(store, states)}
    sizes = {node.ref: _size(node.spec, plan) for node in plan}
    rates = _measured_rates(plan, store, states, sizes) if missing else {}
    rows = []
    for node in plan:
        artifact = store.artifact(node.ref)
        size, seconds, held = sizes[node.ref], None, None
        if states[node.ref] in (State.COMPLETE, State.EVICTED):
            seconds, held = artifact.manifest.seconds, artifact.manifest.size
        elif size and (size.flops or size.seconds):
            rate = rates.get(node.spec.step) or EFFICIENCY * _matmul_speed()
            seconds = size.flops / rate + size.seconds
        wanted = resources_of(node.spec.step, resources or {})
        rows.append(
            Row(
                name=node.name,
                ref=node.ref,
                state=_STATE[states[node.ref]],
                to_run=node.ref in missing,
                tokens=size.tokens if size else None,
                bytes=held if held is not None else (size.bytes if size else None),
                seconds=seconds,
                note=size.note if size and node.ref in missing else "",
                memory=size.memory(max(1, wanted.gpus or 1), wanted.shard) if size and size.memory else None,
            )
        )
    return rows


def _size(spec: Any, plan: Plan) -> Estimate | None:
    step = steps.get(spec.step)
    return steps.resolve(step.estimate)(spec, plan) if step.estimate else None


def _measured_rates(plan: Plan, store: Store, states: dict[Ref, State], sizes: dict[Ref, Estimate | None]) -> dict[str, float]:
    """Operations per second of each step, the median over this plan's finished nodes. Steps that say seconds themselves run once or twice in a plan: these stay
    as they are.
    """
    seen: dict[str, list[float]] = {}
    for node in plan:
        size = sizes[node.ref]
        if size and size.flops and not size.seconds and states[node.ref] in (State.COMPLETE, State.EVICTED):
            seconds = store.artifact(node.ref).manifest.seconds
            if seconds > 0:
                seen.setdefault(node.spec.step, []).append(size.flops / seconds)
    return {step: statistics.median(values) for step, values in seen.items()}


@cache
def _matmul_speed() -> float:
    """Operations per second of one bf16 matrix product here."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    float((a @ a).sum())
    times = []
    for _ in range(3):
        start = time.perf_counter()
        float((a @ a).sum())
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)
