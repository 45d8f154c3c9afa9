"""Plans: every spec of a run, and so every key, before anything runs; and a plain executor for one machine."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from stagediff import steps
from stagediff.progress import Progress
from stagediff.spec import Ref, Spec
from stagediff.store import State, Store

__all__ = ["Node", "Plan", "execute", "forced_after"]


@dataclass(frozen=True)
class Node:
    """One step of a run under its name in the run ("harvest-base", "finetune-D")."""

    name: str
    spec: Spec

    @property
    def ref(self) -> Ref:
        return self.spec.ref


@dataclass
class Plan:
    """The nodes of a run in an order in which they can run; names and artifacts are unique."""

    name: str
    nodes: list[Node] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, spec: Spec) -> Ref:
        """Appends a step; a spec that is there already under another name is not repeated. Returns its artifact's reference."""
        if any(n.name == name and n.ref != spec.ref for n in self.nodes):
            raise ValueError(f"the plan has two different steps named {name!r}")
        if all(n.ref != spec.ref for n in self.nodes):
            self.nodes.append(Node(name, spec))
        return spec.ref

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __getitem__(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def needs(self, node: Node) -> list[Node]:
        """The nodes of this plan that `node` reads directly."""
        refs = set(node.spec.refs())
        return [n for n in self.nodes if n.ref in refs]

    def after(self, names: Iterable[str]) -> list[Node]:
        """The named nodes and everything that depends on them, in order."""
        chosen = {self[name].ref for name in names}
        for node in self.nodes:
            if chosen.intersection(node.spec.refs()):
                chosen.add(node.ref)
        return [n for n in self.nodes if n.ref in chosen]

    def __contains__(self, name: str) -> bool:
        return any(node.name == name for node in self.nodes)

    def missing(self, store: Store) -> list[Node]:
        """What has to run: all that is not complete. An evicted artifact counts as done unless something that has to run reads it."""
        states = {node.ref: store.artifact(node.ref).state for node in self.nodes}
        read: set[Ref] = set()
        missing = []
        for node in reversed(self.nodes):
            state = states[node.ref]
            if state not in (State.COMPLETE, State.EVICTED) or (state is State.EVICTED and node.ref in read):
                missing.append(node)
                read.update(node.spec.refs())
        return missing[::-1]

    def evict_unneeded(self, store: Store) -> list[Node]:
        """Drops the bulk data of activations that no unfinished step reads. Returns whose."""
        missing = self.missing(store)
        needed = {ref for node in missing for ref in node.spec.refs()}
        idle = [
            n for n in self.nodes if n.spec.kind == "activations" and n.ref not in needed and store.artifact(n.ref).state is State.COMPLETE
        ]
        for node in idle:
            store.evict(node.ref)
        return idle


def forced_after(plan: Plan, node: Node, store: Store) -> set[Ref]:
    """What has to be computed again because `node` was, and its bytes came out differently."""
    if store.artifact(node.ref).manifest.same_bytes is not False:
        return set()
    return {n.ref for n in plan.nodes if node.ref in n.spec.refs()}


def execute(
    plan: Plan,
    store: Store,
    *,
    device: str = "auto",
    force: Iterable[str] = (),
    keep: str = "all",
    progress: Progress | None = None,
    on_done: Callable[[Node], None] | None = None,
) -> None:
    """Runs what is missing, one step at a time, in order. `force` names steps to compute again; what depends on one whose bytes changed follows."""
    forced = {plan[name].ref for name in force}
    for node in plan.nodes:
        again = node.ref in forced
        if not again and node not in plan.missing(store):
            continue
        steps.run(node.spec, store, device=device, progress=progress, force=again, name=node.name)
        if again:
            forced |= forced_after(plan, node, store)
        if keep == "tables":
            plan.evict_unneeded(store)
        if on_done:
            on_done(node)
