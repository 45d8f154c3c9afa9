"""Steps: what can be computed, and how one is run.

Every room that offers steps has a `steps.py` which registers them with `register(Step(...))`; `load()` imports all of these, so a new
room adds steps, report sections, commands and run kinds without touching a shared file. These modules stay light (no torch):
functions are named as "module:function" and imported when a step really computes.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import stagediff
from stagediff.errors import DamagedError, UserError
from stagediff.progress import Progress
from stagediff.spec import Ref, Spec
from stagediff.store import Artifact, Manifest, State, Store, Writer

__all__ = [
    "Extension",
    "Job",
    "Resources",
    "RunKind",
    "Step",
    "all_steps",
    "check",
    "commands",
    "endings",
    "extensions",
    "get",
    "load",
    "register",
    "register_command",
    "register_ending",
    "register_extension",
    "register_kind",
    "resolve",
    "run",
    "run_kinds",
    "sections",
    "spec_from_json",
]


@dataclass(frozen=True)
class Resources:
    """What a step wants from a machine; the config's `resources` may override it. No part of any key."""

    gpus: int = 0
    sharded: bool = False
    """Whether several workers may share one artifact by shard ranges (`part`)."""
    alone: bool = False
    """Whether it fills a machine, and most others wait for it: where steps run side by side (`stagediff.lanes`), this one runs by itself."""


@dataclass(frozen=True)
class Step:
    """One kind of computation. `compute` names a function `(spec, job) -> dict` that fills the artifact and returns its key figures."""

    name: str
    spec: type[Spec]
    compute: str
    resources: Resources = Resources()
    section: str | None = None
    """Report section: "module:function", `(ReportContext) -> Section | None` (see `stagediff.sections`)."""
    estimate: str | None = None
    """For `stagediff plan`: "module:function", (spec, plan) -> Estimate (see `stagediff.estimate`)."""
    check: str | None = None
    """"module:function", (spec) -> None: raises UserError for what can be known to be wrong before any step of the run computes."""
    check_shared: str | None = None
    """"module:function", (spec, plan, ranks, shard) -> None: raises UserError where so many processes cannot share the step that way."""
    assist: str | None = None
    """"module:function", (spec, store, device) -> None: the part of every rank but the first, where several compute the step together."""

    @property
    def by_ranks(self) -> bool:
        """Whether several processes of one node can share the work, by shards or by slices of every batch (`stagediff.ranks`)."""
        return self.resources.sharded or self.assist is not None


@dataclass(frozen=True)
class RunKind:
    """One `kind:` of config file: its config class and the function (config, store) -> Plan."""

    name: str
    config: str
    plan: str


@dataclass(frozen=True)
class Extension:
    """Settings that a room adds to a kind of run, under `name` at the file's top level, and the steps it adds to the plan for them."""

    kind: str
    name: str
    config: str
    plan: str
    """"module:function", (config, settings, plan, store) -> None."""


@dataclass
class Job:
    """What a computing function is given besides its spec."""

    store: Store
    writer: Writer
    progress: Progress
    device: str = "cpu"
    part: tuple[int, int] = (0, 1)
    """This worker's share (i of n) of a sharded artifact."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Timings and rates for the manifest, kept out of the tables."""

    def artifact(self, ref: Ref) -> Artifact:
        """An upstream artifact; raises when it is not complete."""
        return self.store.artifact(ref).require()


_STEPS: dict[str, Step] = {}
_KINDS: dict[str, RunKind] = {}
_COMMANDS: dict[str, str] = {}
_ENDINGS: list[str] = []
_EXTENSIONS: dict[tuple[str, str], Extension] = {}
_loaded = False


def register(step: Step) -> None:
    if step.name in _STEPS and _STEPS[step.name] != step:
        raise ValueError(f"two steps are named {step.name!r}")
    if step.spec.step != step.name:
        raise ValueError(f"step {step.name!r} registers the spec of step {step.spec.step!r}")
    _STEPS[step.name] = step


def register_kind(kind: RunKind) -> None:
    _KINDS[kind.name] = kind


def register_extension(extension: Extension) -> None:
    _EXTENSIONS[extension.kind, extension.name] = extension


def register_ending(function: str) -> None:
    """Adds steps at the end of every plan: "module:function", (config, plan) -> None."""
    _ENDINGS.append(function)


def register_command(name: str, app: str) -> None:
    """Adds a sub-command to `stagediff`: `app` names a typer app or a function, as "module:object"."""
    _COMMANDS[name] = app


def load() -> None:
    """Imports the `steps` module of every room once."""
    global _loaded
    if _loaded:
        return
    for room in pkgutil.iter_modules(stagediff.__path__):
        if room.ispkg and importlib.util.find_spec(f"stagediff.{room.name}.steps"):
            importlib.import_module(f"stagediff.{room.name}.steps")
    _loaded = True


def get(name: str) -> Step:
    load()
    try:
        return _STEPS[name]
    except KeyError:
        raise UserError(f"There is no step named {name!r}; known steps: {', '.join(sorted(_STEPS))}.") from None


def all_steps() -> list[Step]:
    load()
    return list(_STEPS.values())


def sections() -> list[Step]:
    load()
    return [s for s in _STEPS.values() if s.section]


def commands() -> dict[str, str]:
    load()
    return dict(_COMMANDS)


def extensions(kind: str) -> dict[str, Extension]:
    load()
    return {name: e for (k, name), e in _EXTENSIONS.items() if k == kind}


def endings() -> list[str]:
    load()
    return list(_ENDINGS)


def run_kinds() -> dict[str, RunKind]:
    load()
    return dict(_KINDS)


def resolve(name: str) -> Callable[..., Any]:
    """The object that "module:object" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def check(spec: Spec) -> None:
    """Raises UserError where it is known already that the spec's step will fail. Reads no artifact."""
    step = get(spec.step)
    if step.check:
        resolve(step.check)(spec)


def spec_from_json(step: str, body: dict[str, Any]) -> Spec:
    return get(step).spec.model_validate(body)


def run(
    spec: Spec,
    store: Store,
    *,
    device: str = "auto",
    part: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
    force: bool | str = False,
    name: str | None = None,
) -> Ref:
    """Computes what is missing of `spec`'s artifact and returns its reference; at once if it is complete.

    A killed run is continued: the artifact's committed shards and training checkpoints are kept. An evicted artifact is computed again (who
    only wants its tables does not ask). With `part=(i, n)` only this worker's shards are written; whoever finds all of them present commits.
    `force` moves a finished artifact to quarantine, computes it again and records in the manifest whether the bytes agree. A text does so once:
    who comes with the same one again, after a crash or with another part, goes on or finds it done (unless what it reads has changed since).
    `name` is what progress calls it (its name in the plan).
    """
    step = get(spec.step)
    if is_done(spec, store, force):
        return spec.ref
    for ref in spec.refs():
        store.artifact(ref).require()
    inputs = store.bytes_of(spec.refs())
    from stagediff.numerics import describe, resolve_device, reuse_freed_memory

    device = resolve_device(device)
    reuse_freed_memory()
    numerics = describe(device)
    before = make_room(spec, store, force)
    progress = progress or Progress()
    with store.write(spec, numerics) as writer:
        job = Job(store, writer, progress, device, part)
        with progress.step(f"{name or spec.step} {spec.key[:8]}"):
            figures = resolve(step.compute)(spec, job)
        if figures is None:  # another worker's shards are still missing
            return spec.ref
        writer.commit(figures=figures, numerics=numerics, notes=job.notes, replaces=before, inputs=inputs)
    return spec.ref


def is_done(spec: Spec, store: Store, force: bool | str = False) -> bool:
    """Whether `run` would return at once. Raises DamagedError when the manifest cannot be trusted and it is not forced."""
    try:
        artifact = store.artifact(spec.ref)
        state = artifact.state
        is_there = state is State.COMPLETE or (state is State.EVICTED and spec.is_made_by_readers)
        if not is_there or force is True:
            return False
        if not force:
            return True
        manifest = artifact.read_manifest()
        return manifest.forced == force and manifest.inputs == store.bytes_of(spec.refs())
    except DamagedError:
        if force:
            return False
        raise


def make_room(spec: Spec, store: Store, force: bool | str = False) -> Manifest | None:
    """Takes out of the way what is forced, or was evicted, and is to be computed again; returns its manifest. Its inputs must be complete."""
    if not force and not store.artifact(spec.ref).is_complete:
        return None
    return store.quarantine(spec.ref, force if isinstance(force, str) else None)
