"""Plans: every spec of a run, and so every key, before anything runs; and a plain executor for one machine."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from stagediff import steps
from stagediff.errors import DamagedError, UserError
from stagediff.progress import Progress
from stagediff.spec import Ref, Spec
from stagediff.store import State, Store

__all__ = ["AHEAD", "Node", "Plan", "Run", "execute"]

AHEAD = 2
"""Where only tables are kept: how many activations may lie in the store or be made before the next ones are started, while anything else runs."""


@dataclass(frozen=True)
class Node:
    """One step of a run under its name in the run ("harvest-base", "finetune-D")."""

    name: str
    spec: Spec

    @cached_property
    def ref(self) -> Ref:
        return self.spec.ref


@dataclass
class Plan:
    """The nodes of a run in an order in which they can run; names and artifacts are unique."""

    name: str
    nodes: list[Node] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    kept: set[Ref] = field(default_factory=set)
    """Activations that are never evicted (held-out and probe rows: examples are read from them)."""

    shared: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Step -> how many processes a job of it has, and what they share out (the config's `resources`), where that is more than one."""

    def __post_init__(self) -> None:
        self._names = {node.name: node for node in self.nodes}
        self._refs = {node.ref: node for node in self.nodes}

    def add(self, name: str, spec: Spec, *, keep: bool = False) -> Ref:
        """Appends a step; a spec that is there already under another name is not repeated. Returns its artifact's reference.

        `keep`: its bulk data stays even where a run keeps tables only.
        """
        node = Node(name, spec)
        ref = node.ref
        if name in self._names and self._names[name].ref != ref:
            raise ValueError(f"the plan has two different steps named {name!r}")
        if ref not in self._refs:
            self.nodes.append(node)
            self._names[name] = self._refs[ref] = node
        if keep:
            self.kept.add(ref)
        return ref

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __getitem__(self, name: str) -> Node:
        return self._names[name]

    def needs(self, node: Node) -> list[Node]:
        """The nodes of this plan that `node` reads directly."""
        return [self._refs[ref] for ref in node.spec.refs() if ref in self._refs]

    def after(self, names: Iterable[str]) -> list[Node]:
        """The named nodes and everything that depends on them, in order."""
        chosen = {self[name].ref for name in names}
        for node in self.nodes:
            if chosen.intersection(node.spec.refs()):
                chosen.add(node.ref)
        return [n for n in self.nodes if n.ref in chosen]

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def states(self, store: Store) -> dict[Ref, State]:
        """The state of every artifact of this plan: one look at the store each. DAMAGED: its manifest cannot be trusted."""
        return {node.ref: _state(node, store) for node in self.nodes}

    def missing(self, store: Store, states: Mapping[Ref, State] | None = None) -> list[Node]:
        """What has to run: all that is not complete. An evicted artifact counts as done unless something that has to run reads it."""
        states = self.states(store) if states is None else states
        read: set[Ref] = set()
        missing = []
        for node in reversed(self.nodes):
            state = states[node.ref]
            is_needed = node.ref in read and not node.spec.is_made_by_readers
            if state not in (State.COMPLETE, State.EVICTED) or (state is State.EVICTED and is_needed):
                missing.append(node)
                read.update(node.spec.refs() if node.spec.reads_bulk else ())
        return missing[::-1]

    def check(self, nodes: Iterable[Node]) -> None:
        """Raises UserError where it is known already that one of these will fail, before any of them runs."""
        for node in nodes:
            steps.check(node.spec)
            check = steps.get(node.spec.step).check_shared
            if check and node.spec.step in self.shared:
                try:
                    steps.resolve(check)(node.spec, self, *self.shared[node.spec.step])
                except UserError as error:
                    raise UserError(f"{node.name}: {error}") from None

    def unneeded(self, states: Mapping[Ref, State], missing: Iterable[Node]) -> list[Node]:
        """Complete activations that no unfinished step reads and that are not kept for good."""
        needed = {ref for node in missing if node.spec.reads_bulk for ref in node.spec.refs()} | self.kept
        return [n for n in self.nodes if n.spec.kind == "activations" and n.ref not in needed and states[n.ref] is State.COMPLETE]

    def evict_unneeded(self, store: Store) -> list[Node]:
        """Drops the bulk data of activations that no unfinished step reads. Returns whose."""
        states = self.states(store)
        idle = self.unneeded(states, self.missing(store, states))
        for node in idle:
            store.evict(node.ref)
        return idle


def _state(node: Node, store: Store) -> State:
    try:
        return store.artifact(node.ref).state
    except DamagedError:
        return State.DAMAGED


class Run:
    """A plan on its way: what is due, what was forced, what may be dropped. Looks at the store once per artifact, not once per step."""

    def __init__(self, plan: Plan, store: Store, *, force: Iterable[str] = (), keep: str = "all"):
        self.plan, self.store, self.keep, force = plan, store, keep, tuple(force)
        unknown = [name for name in force if name not in plan]
        if unknown:
            raise UserError(f"force names {', '.join(unknown)}; this run's steps are: {', '.join(n.name for n in plan)}.")
        self._states = plan.states(store)
        for node in plan:
            if self._states[node.ref] is State.DAMAGED and node.name not in force:
                store.artifact(node.ref).read_manifest()  # says what is wrong
        self._forced: set[Ref] = set()
        self._anything_forced = bool(force)
        self._force(plan[name].ref for name in force)
        missing = plan.missing(store, self._states)
        plan.check(missing)
        self._missing = {n.ref for n in missing}

    def is_forced(self, node: Node) -> bool:
        return node.ref in self._forced

    def due(self, node: Node) -> list[Node]:
        """What has to run for this step to be done, in order: dropped inputs that it reads, then itself; nothing where it is done."""
        wanted = {node.ref}
        for n in reversed(self.plan.nodes):
            if n.ref in wanted and n.ref in self._missing:
                wanted.update(n.spec.refs())
        return [n for n in self.plan if n.ref in wanted and n.ref in self._missing] if node.ref in self._missing else []

    def ready(self) -> list[Node]:
        """What could run now, side by side: the missing steps of which nothing that they depend on, however far, is missing; in the plan's order."""
        held: set[Ref] = set()  # missing, or after something missing
        ready = []
        for node in self.plan:
            waits = not held.isdisjoint(node.spec.refs())
            if node.ref in self._missing and not waits:
                ready.append(node)
            if node.ref in self._missing or waits:
                held.add(node.ref)
        return ready

    def startable(self, going: Collection[Ref], failed: Collection[Ref] = ()) -> list[Node]:
        """What to start beside what is `going` or has `failed`; in the plan's order.

        Where bulk data is to go once read, not more of it is made ahead than AHEAD, as long as something else moves.
        """
        ready = [node for node in self.ready() if node.ref not in going and node.ref not in failed]
        if self.keep != "tables":
            return ready
        held = [n.ref for n in self.plan if self._goes(n)]
        room = AHEAD - sum(ref in going or self._states[ref] is State.COMPLETE for ref in held)
        out: list[Node] = []
        for node in ready:
            if self._goes(node):
                if room <= 0 and (going or out):
                    continue
                room -= 1
            out.append(node)
        return out

    def _goes(self, node: Node) -> bool:
        """Whether it is bulk data that is stored, and goes again one day."""
        return node.spec.kind == "activations" and node.ref not in self.plan.kept and not node.spec.is_made_by_readers

    def urgent(self, nodes: Iterable[Node]) -> list[Node]:
        """By how many steps have to follow one after the other, most first: what hangs at the side does not hold up the longest chain."""
        return sorted(nodes, key=lambda node: -self._ahead[node.ref])

    @cached_property
    def _ahead(self) -> dict[Ref, int]:
        """The length of the longest chain that begins with each step."""
        length: dict[Ref, int] = {}
        for node in reversed(self.plan.nodes):
            own = length.setdefault(node.ref, 1)
            for ref in node.spec.refs():
                length[ref] = max(length.get(ref, 1), own + 1)
        return length

    @property
    def is_done(self) -> bool:
        return not self._missing

    def is_finished(self, node: Node) -> bool:
        return node.ref not in self._missing

    def finished(self, node: Node) -> None:
        """Call after each step that ran. Where a step was forced, what reads this one and was computed from other bytes is forced too.

        Idle activations go where only tables are kept.
        """
        self._states[node.ref] = State.EVICTED if node.spec.is_made_by_readers else State.COMPLETE
        self._forced.discard(node.ref)
        if self._anything_forced:
            self._force(n.ref for n in self.plan if node.ref in n.spec.refs() and self._read_other_bytes(n))
        missing = self.plan.missing(self.store, self._states)
        self._missing = {n.ref for n in missing}
        if self.keep == "tables":
            for idle in self.plan.unneeded(self._states, missing):
                self.store.evict(idle.ref)
                self._states[idle.ref] = State.EVICTED

    def _read_other_bytes(self, node: Node) -> bool:
        """Whether a complete artifact was computed from other bytes than its upstream holds now, or does not say from which."""
        held = (State.COMPLETE, State.EVICTED)
        if self._states[node.ref] not in held or any(self._states.get(ref, State.COMPLETE) not in held for ref in node.spec.refs()):
            return False  # runs anyway, or another of its inputs will be there later
        return self.store.artifact(node.ref).read_manifest().inputs != self.store.bytes_of(node.spec.refs())

    def _force(self, refs: Iterable[Ref]) -> None:
        for ref in refs:
            self._forced.add(ref)
            self._states[ref] = State.ABSENT


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
    run = Run(plan, store, force=force, keep=keep)
    for named in plan.nodes:
        for node in run.due(named):
            steps.run(node.spec, store, device=device, progress=progress, force=run.is_forced(node), name=node.name)
            run.finished(node)
            if on_done:
                on_done(node)
