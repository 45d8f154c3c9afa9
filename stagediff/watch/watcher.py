"""One look at a training run: which checkpoints are there, which of them count, and which runs are due for them.

A tracked run grows by every new checkpoint: its config with all of them is due, of which the store already holds all but the last steps. A
stage-wise run is due once for every checkpoint, with that one as the finetuned model. Asking again changes nothing: what is finished in the
store is not due.
"""

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from stagediff.config import RunConfig, make_plan, parse_config
from stagediff.diff.config import StagewiseConfig
from stagediff.errors import UserError
from stagediff.lm.sources import resolve_model
from stagediff.plan import Plan
from stagediff.store import State as Stored
from stagediff.store import Store
from stagediff.track.config import FoundCheckpoint, TrackConfig
from stagediff.watch.complete import State, judge
from stagediff.watch.config import STEP, WatchConfig
from stagediff.watch.places import Files, open_place
from stagediff.watch.taken import Taken

__all__ = ["Due", "Look", "Seen", "Watcher"]

READS_MODEL = ("harvest", "probe", "quality")
"""Steps of a chain that read the checkpoint itself."""


@dataclass(frozen=True)
class Seen:
    """One checkpoint in one look."""

    step: int
    where: str
    state: str
    """taken | complete (and taken by this look) | settling | refused | late | gone."""
    why: str = ""


@dataclass(frozen=True)
class Look:
    """What one look found, by step, ascending."""

    seen: tuple[Seen, ...]
    waits_for: str = ""
    """What is missing before anything can run; empty where nothing is."""

    def having(self, *states: str) -> list[Seen]:
        return [s for s in self.seen if s.state in states]


@dataclass(frozen=True)
class Due:
    """A run that the checkpoints found so far call for."""

    step: int
    """The newest checkpoint in it."""
    config: dict[str, Any]
    """As `parse_config` takes it."""
    plan: Plan
    missing: int
    """How many steps of the plan are not done."""


class Watcher:
    """A watched run. Raises UserError where the config has no `watch`, or names nothing that can be watched."""

    def __init__(self, config: RunConfig, store: Store | None = None):
        if "watch" not in config.extensions:
            raise UserError(
                "The config has no `watch`. Expected for example  watch: {source: runs/lm, every: 60}  at the file's top level."
            )
        self.config, self.store = config, store or Store(config.store)
        self.settings = self._settings(WatchConfig.model_validate(config.extensions["watch"]))
        self.place = open_place(self.settings)
        self.run = self.settings.run or config.name or config.kind
        self._taken = Taken(self.store, config.name or config.kind)

    @property
    def is_track(self) -> bool:
        return self.config.kind == "track"

    # --- looking ------------------------------------------------------------------------------------------------------------------------

    def look(self, announced: Collection[int] = ()) -> Look:
        """Looks once, and takes what is complete: each checkpoint once, in ascending order.

        `announced`: steps of which the training has said that they are saved. Raises UserError where the place can't be looked at, or a
        model in a local folder is not the one any more that was taken.
        """
        there = {step: files for step, files in self.place.find().items() if self._is_wanted(step)}
        taken = self._taken.all()
        highest = max(taken, default=-1)
        seen: list[Seen] = []
        waits = False  # for one below: a chain takes no later one before it
        absent = min(self._begins() - {*there, *taken}, default=None)
        for step in sorted({*there, *taken}):
            waits = waits or (absent is not None and step > absent)
            if step in taken:
                self._check_same(step, taken[step], there.get(step))
                seen.append(Seen(step, taken[step].name, "taken" if step in there else "gone"))
                continue
            files = there[step]
            if self.is_track and step < highest:
                seen.append(Seen(step, str(files), "late", f"checkpoint {highest} was taken before it, and a chain only grows at its end"))
                continue
            verdict = judge(files, quiet=self.settings.quiet, now=time.time(), announced=step in announced, adapters=not self.is_track)
            if verdict.state is State.COMPLETE and not waits:
                verdict = self._take(step, files, verdict)
            elif verdict.state is State.COMPLETE:
                verdict = verdict._replace(state=State.SETTLING, why="waits for the one before it")
            waits = waits or (self.is_track and verdict.state is State.SETTLING)
            seen.append(Seen(step, str(files), verdict.state.value, verdict.why))
        return Look(tuple(seen), self._waits_for({s.step for s in seen if s.state in ("taken", "gone", "complete")}))

    def _is_wanted(self, step: int) -> bool:
        """All steps, or those the chain begins with here and what comes after them; thinned out as the settings say."""
        return step in self._begins() or (step > max(self._named, default=-1) and step % self.settings.multiple_of == 0)

    def _take(self, step: int, files: Files, verdict: Any) -> Any:
        name, revision, adapter = files.name, files.revision, None
        if "config.json" not in files.entries():
            name, adapter = self._base_name(), files.name
        try:
            source = resolve_model(name=name, revision=revision, adapter=adapter)
        except UserError as error:
            return verdict._replace(state=State.REFUSED, why=str(error))
        assert source.digest is not None
        self._taken.add(step, FoundCheckpoint(name=adapter or str(source.name), revision=source.revision, digest=source.digest))
        return verdict

    def _check_same(self, step: int, taken: FoundCheckpoint, files: Files | None) -> None:
        """A training that began anew in the same folder makes other checkpoints of the same names."""
        if files is None or not files.is_local or taken.revision is not None or "config.json" not in files.entries():
            return
        try:
            now = resolve_model(name=files.name).digest
        except UserError:  # being deleted
            return
        if now != taken.digest:
            raise UserError(
                f"{files} is not the checkpoint any more that this run has taken (digest {taken.digest[:12]} then, {(now or '')[:12]} now). Where the "
                "training began anew, give the config another name; else restore the folder, or delete it."
            )

    # --- what is due --------------------------------------------------------------------------------------------------------------------

    def due(self, look: Look) -> Iterator[Due]:
        """The runs that what was taken calls for and that are not done, in ascending order of their newest checkpoint."""
        return (run for run in self.runs(look) if run.missing)

    def runs(self, look: Look) -> Iterator[Due]:
        """The same, with those that are done.

        A chain whose newest checkpoint is gone is not due again until a newer one is there: its plan needs that one's shape and tokenizer.
        """
        taken, gone = self._taken.all(), {s.step for s in look.having("gone")}
        if not taken or self._waits_for(set(taken)):
            return
        for step, body in self._chain(taken, gone) if self.is_track else self._diffs(taken, gone):
            plan = make_plan(parse_config(body), self.store)
            yield Due(step, body, plan, len(plan.missing(self.store)))

    def _chain(self, taken: dict[int, FoundCheckpoint], gone: set[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The tracked run with all that was taken. One that is gone and was not read in time is left out."""
        while max(taken) not in gone and not self._waits_for(set(taken)):
            body = self._chain_of(taken)
            lost = self._first_lost(body, gone & set(taken))
            if lost is None:
                yield max(taken), body
                return
            taken = {step: checkpoint for step, checkpoint in taken.items() if step != lost}

    def _chain_of(self, taken: dict[int, FoundCheckpoint]) -> dict[str, Any]:
        config = cast(TrackConfig, self.config)
        steps = sorted({*config.checkpoints.steps, *taken})
        body = self._body()
        body["checkpoints"]["steps"] = steps
        body["model"]["found"] = {str(step): checkpoint.model_dump() for step, checkpoint in taken.items()}
        # what depends on the last step would be computed anew at every new one
        frozen = config.retrain_null.at
        body["retrain_null"]["at"] = (config.checkpoints.steps or steps[:2])[-1] if frozen is None else frozen
        body["scratch"]["at"] = [step for step in config.scratch.at if step in steps]
        return body

    def _first_lost(self, body: dict[str, Any], gone: set[int]) -> int | None:
        if not gone:
            return None
        plan = make_plan(parse_config(body), self.store)
        done = (Stored.COMPLETE, Stored.EVICTED)
        states = plan.states(self.store)
        return next((s for s in sorted(gone) if any(states[plan[f"{what}-step{s}"].ref] not in done for what in READS_MODEL)), None)

    def _diffs(self, taken: dict[int, FoundCheckpoint], gone: set[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        for step, checkpoint in taken.items():
            if step in gone:
                continue
            body = self._body()
            is_adapter = (Path(checkpoint.name) / "adapter_config.json").is_file() and not (Path(checkpoint.name) / "config.json").is_file()
            finetuned = {"adapter": checkpoint.name} if is_adapter else {"name": checkpoint.name, "revision": checkpoint.revision}
            body["models"]["finetuned"] = finetuned
            body["name"] = f"{self.config.name or self.config.kind}-step{step}"
            yield step, body

    def _body(self) -> dict[str, Any]:
        """The config as a mapping, without `watch`: what is run is an ordinary run."""
        extensions = {name: value for name, value in self.config.extensions.items() if name != "watch"}
        return self.config.model_dump(mode="json", exclude={"extensions"}) | extensions

    # --- settings -----------------------------------------------------------------------------------------------------------------------

    @property
    def _named(self) -> tuple[int, ...]:
        """Steps that the config names itself."""
        return cast(TrackConfig, self.config).checkpoints.steps if self.is_track else ()

    def _waits_for(self, have: set[int]) -> str:
        """What a chain needs before it can begin: the checkpoints that its config names in the watched place, and two in all."""
        if not self.is_track:
            return ""
        if missing := sorted(self._begins() - have):
            return f"checkpoints {missing}, which the config names"
        if len({*self._named, *have}) < 2:
            return "a second checkpoint: a chain begins with two"
        return ""

    def _begins(self) -> set[int]:
        """Checkpoints that a chain's config names and that have to appear where is watched (the model may have its first ones elsewhere)."""
        if not self.is_track:
            return set()
        config = cast(TrackConfig, self.config)
        same_place = (config.model.name, config.model.revision) == (self.settings.source, self.settings.revision)
        named = {*self._named, *(() if config.retrain_null.at is None else (config.retrain_null.at,))}
        return named if same_place else named - {*self._named}

    def _base_name(self) -> str:
        name = cast(StagewiseConfig, self.config).models["base"].name
        if name is None:
            raise UserError("The checkpoints are PEFT adapters, but models.base has no name. Name the model that they were trained on.")
        return name

    def _settings(self, settings: WatchConfig) -> WatchConfig:
        """With the source that the config's model leads to, where none is given."""
        if settings.source is not None:
            return settings
        model = cast(TrackConfig, self.config).model if self.is_track else cast(StagewiseConfig, self.config).models["finetuned"]
        name, revision = model.name, model.revision
        if name is None or STEP not in name + (revision or ""):
            raise UserError(
                "watch.source is missing, and the config's model does not tell where checkpoints appear. Expected for example  watch: {source: runs/lm}  "
                f"or a model named like runs/lm/checkpoint-{STEP}."
            )
        return settings.model_copy(update={"source": name, "revision": None if STEP in name else revision})
