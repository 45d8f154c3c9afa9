"""The plan of a tracked run: a dictionary carried recursively through a model's checkpoints (SAE-Track, arXiv 2412.17626; method.md section 3).

    harvest(model[t]) ── train SAE at the chain's first checkpoint, then follow: SAE[t] starts from SAE[t-1]
    probe rows(model[t]) ── statistics, quality ── kinds, formation, drift, patterns, phases, umap, efficiency

A step's key depends only on what it reads, so a forward chain grows at its end without touching what is there, and chains with the same
beginning share it. Harvests stand `ahead` of the trainings that read them. Only the analysis looks at the whole chain, and only at its
probe rows, statistics and dictionaries.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stagediff.errors import UserError
from stagediff.inputs.config import ModelConfig, OrganismConfig
from stagediff.inputs.rows import Inputs, budget, corpus_source, interval
from stagediff.lm.sources import check_hook, check_models, model_config, n_layers, resolve_model, resolve_tokenizer, width
from stagediff.lm.spec import ActivationData, CorpusSource, HookPoint, ModelSource
from stagediff.plan import Plan
from stagediff.sae.spec import FinetuneSpec, QualitySpec, StatisticsSpec, TrainSpec
from stagediff.spec import Ref
from stagediff.store import Store
from stagediff.track.config import TrackConfig
from stagediff.track.spec import (
    DriftSpec,
    EfficiencyRow,
    EfficiencySpec,
    FormationSpec,
    KindsSpec,
    PatternsSpec,
    PhasesSpec,
    Point,
    UmapSpec,
)

__all__ = ["Chain", "add_chain", "plan"]


@dataclass(frozen=True)
class Chain:
    """What other plans build on: the last model and the dictionary the chain ends with there."""

    model: ModelSource
    dictionary: Ref


def plan(config: TrackConfig, store: Store) -> Plan:
    """All steps of the run. Raises UserError for inputs that cannot work (a missing revision, checkpoints that do not fit each other, …)."""
    result = Plan(config.name or config.kind)
    add_chain(config, result)
    return result


def add_chain(config: TrackConfig, into: Plan) -> Chain:
    """Adds the run's steps to a plan."""
    if (named := len(config.checkpoints.steps)) < 2:
        raise UserError(
            f"This run names {named or 'no'} checkpoint{'' if named == 1 else 's'}, and a chain needs two. It is to be watched: `stagediff watch` "
            "finds them; or name them under checkpoints.steps."
        )
    return _Builder(config, into).build()


@dataclass(frozen=True)
class _Measured:
    """A dictionary at its checkpoint, with what is known of it."""

    point: Point
    quality: Ref

    def row(self, how: Literal["chained", "scratch_full", "scratch_short"], tokens: int) -> EfficiencyRow:
        p = self.point
        return EfficiencyRow(step=p.step, how=how, tokens=tokens, dictionary=p.dictionary, statistics=p.statistics, quality=self.quality)


class _Builder:
    def __init__(self, config: TrackConfig, plan: Plan):
        self.config, self.plan = config, plan
        self.seed = config.seed if config.data.seed is None else config.data.seed
        self.inputs = Inputs(
            plan, context=config.context, hook=config.hook, harvest=config.harvest, heldout=config.data.heldout, seed=self.seed
        )
        forward = config.checkpoints.direction == "forward"
        self.steps = config.checkpoints.steps
        self.walk = self.steps if forward else self.steps[::-1]
        """Steps in the order in which the dictionary visits them."""
        at = config.retrain_null.at
        self.frozen = self.walk[-1] if at is None else at
        self.null: tuple[Ref, ...] = ()
        self.scratch: list[EfficiencyRow] = []
        self.harvests: dict[int, Ref] = {}
        self.probes: dict[int, Ref] = {}

    def build(self) -> Chain:
        self._rows_and_models()
        made = self._chain()
        points = tuple(made[t].point for t in self.steps)
        rows = [made[t].row("chained", self._spent(t)) for t in self.steps] + self.scratch
        self._analyse(points, rows)
        return Chain(self.models[self.steps[-1]], points[-1].dictionary)

    # --- rows and models ----------------------------------------------------------------------------------------------------------------

    def _rows_and_models(self) -> None:
        cfg, inputs = self.config, self.inputs
        corpus = corpus_source(cfg.data)
        organism = cfg.model.organism
        drawn = max(1, cfg.tokens // cfg.context) if cfg.tokens else inputs.rows_for(max(cfg.train.tokens, cfg.follow.tokens))
        self.train_rows, self.follow_rows = inputs.rows_for(cfg.train.tokens, drawn), inputs.rows_for(cfg.follow.tokens, drawn)
        self.probe_rows = max(1, cfg.probe.tokens // cfg.context)
        if organism:
            inputs.set_tokenizer(ModelConfig(organism=organism), corpus)
        else:
            inputs.tokenizer = resolve_tokenizer(**cfg.model.at(self.steps[-1]))
        self.rows = inputs.tokens("tokens-chain", corpus, cfg.data.layout, drawn)
        self.probe = inputs.tokens("tokens-probe", corpus, cfg.data.layout, self.probe_rows, split="heldout")
        if organism:
            self._organism(organism, corpus)
        else:
            self._named()

    def _organism(self, organism: OrganismConfig, corpus: CorpusSource) -> None:
        trained = organism.training.steps
        kept = organism.checkpoints or tuple(t for t in self.steps if t < trained)
        with_checkpoints = organism.model_copy(update={"checkpoints": kept})
        made = self.inputs.organism(with_checkpoints, corpus, self.config.data.layout, self.rows, self.probe, self.config.seed)
        self.models = {t: ModelSource(artifact=made, checkpoint=f"step{t}" if t < trained else None) for t in self.steps}
        self.d, self.layers = organism.architecture.width, organism.architecture.layers

    def _named(self) -> None:
        self.models = {}
        for t in self.steps:
            try:
                self.models[t] = self.config.model.pinned(t) or resolve_model(**self.config.model.at(t))
            except UserError as error:
                raise UserError(f"Checkpoint {t} of {list(self.steps)} cannot be had. {error}") from None
        last = self.models[self.steps[-1]]
        check_hook(last, self.config.hook)
        for t in self.steps[:-1]:
            found = self.config.model.found.get(t)
            if found and not Path(found.name).is_dir():  # elsewhere, or gone: it was checked when it was new
                continue
            try:
                check_models(last, self.models[t])
            except UserError as error:
                raise UserError(f"Checkpoint {t} does not belong to the same run as checkpoint {self.steps[-1]}. {error}") from None
        config = model_config(last)
        assert config is not None  # resolve_model has seen it
        self.d, self.layers = width(config), n_layers(config)

    # --- the chain ----------------------------------------------------------------------------------------------------------------------

    def _chain(self) -> dict[int, _Measured]:
        """Harvests and dictionaries of all checkpoints, in walking order; harvests stand ahead of trainings as far as the disk budget goes."""
        ahead, harvested = self._ahead(), 0
        made: dict[int, _Measured] = {}
        previous: Ref | None = None
        for i, t in enumerate(self.walk):
            while harvested < len(self.walk) and harvested <= i + ahead:
                self._harvest(self.walk[harvested])
                harvested += 1
            if previous is None:
                previous = self._train(f"train-step{t}", ActivationData(base=self.harvests[t], rows=self.train_rows))
            else:
                previous = self._follow(f"follow-step{t}", previous, t, self.walk[i - 1])
            made[t] = self._measured(f"step{t}", t, previous)
            if t == self.frozen:  # now, while its activations are there
                self.null = self._null(previous)
            if t in self.config.scratch.at:
                self.scratch += self._scratch(t)
        return made

    def _ahead(self) -> int:
        """Checkpoints harvested ahead of the one in training. A transport holds the one before it too."""
        if self.config.ahead_gib is None:
            return 1
        held = self.follow_rows * self.inputs.row_tokens * self.d * 2 / 2**30
        fits, needed = int(self.config.ahead_gib / held), 2 if self._transports else 1
        if fits < needed:
            takes = f"{'one checkpoint' if needed == 1 else 'two checkpoints (a transport reads both)'} take {needed * held:.3g} GiB"
            raise UserError(
                f"ahead_gib is {self.config.ahead_gib:g}, but the activations of {takes}. Give at least that much, or lower follow.tokens."
            )
        return fits - needed

    def _harvest(self, t: int) -> None:
        rows = self.train_rows if t == self.walk[0] else self.follow_rows
        self.harvests[t] = self.inputs.harvest(f"harvest-step{t}", self.models[t], self.d, self.rows, rows)
        self.probes[t] = self.inputs.harvest(f"probe-step{t}", self.models[t], self.d, self.probe, self.probe_rows, keep=True)

    def _train(self, name: str, data: ActivationData, *, tokens: int | None = None) -> Ref:
        """From scratch with the first recipe; `tokens` instead of its own number."""
        train = self.config.train if tokens is None else self.config.train.model_copy(update={"tokens": tokens})
        spec = TrainSpec(
            data=data,
            budget=budget(train),
            order_seed=self.seed,
            compute=train.compute,
            checkpoint_tokens=interval(train),
            dictionary=self.config.dictionary,
            seed=self.config.seed if train.seed is None else train.seed,
            keep_optimiser=self._carries and name.startswith("train-"),
        )
        return self.plan.add(name, spec)

    def _follow(self, name: str, start: Ref, t: int, before: int) -> Ref:
        """`start`, which belongs to checkpoint `before`, trained on at checkpoint t."""
        follow = self.config.follow
        data, paired = (ActivationData(base=self.harvests[step], rows=self.follow_rows) for step in (t, before))
        spec = FinetuneSpec(
            start=start,
            data=data,
            paired=paired if self._transports else None,
            budget=budget(follow),
            order_seed=self.seed + 1,
            compute=follow.compute,
            checkpoint_tokens=interval(follow),
            seed=self.config.seed if follow.seed is None else follow.seed,
            rescale=True,
            optimiser=follow.optimiser,
            anchor=follow.anchor,
            revive=follow.revive,
            revive_at=follow.revive_at,
            keep_optimiser=self._carries,
        )
        return self.plan.add(name, spec)

    @property
    def _carries(self) -> bool:
        return self.config.follow.optimiser == "carried"

    @property
    def _transports(self) -> bool:
        return self.config.follow.transport != "none"

    def _null(self, dictionary: Ref) -> tuple[Ref, ...]:
        """The following recipe repeated over one frozen checkpoint, on the rows and in the order of the chain. Its transport is the identity."""
        made = [dictionary]
        for repeat in range(self.config.retrain_null.repeats):
            made.append(self._follow(f"null-{repeat + 1}-step{self.frozen}", made[-1], self.frozen, self.frozen))
        return tuple(made)

    def _spent(self, t: int) -> int:
        return self.config.train.tokens if t == self.walk[0] else self.config.follow.tokens

    # --- figures ------------------------------------------------------------------------------------------------------------------------

    def _probe_data(self, t: int) -> ActivationData:
        return ActivationData(base=self.probes[t], rows=self.probe_rows)

    def _measured(self, name: str, t: int, dictionary: Ref) -> _Measured:
        """A dictionary's statistics and quality on the probe rows of checkpoint t."""
        data = self._probe_data(t)
        top = max(self.config.kinds.examples, self.config.formation.datapoints)
        statistics = self.plan.add(f"statistics-{name}", StatisticsSpec(dictionary=dictionary, data=data, base_rows_only=True, top=top))
        quality = QualitySpec(
            dictionary=dictionary, model=self.models[t], data=data, rows=min(self.config.probe.quality_rows, self.probe_rows)
        )
        point = Point(step=t, dictionary=dictionary, statistics=statistics, probe=data.base)
        return _Measured(point, self.plan.add(f"quality-{name}", quality))

    def _scratch(self, t: int) -> list[EfficiencyRow]:
        """Dictionaries from scratch at one checkpoint. They have a harvest of their own, so that asking for them changes no key of the chain."""
        train, follow = self.config.train, self.config.follow
        base = self.inputs.harvest(f"harvest-scratch-step{t}", self.models[t], self.d, self.rows, self.train_rows)
        name = f"scratch-full-step{t}"  # at the chain's first checkpoint this is the chain's own dictionary, and costs nothing
        full = self._train(name, ActivationData(base=base, rows=self.train_rows))
        rows = [self._measured(name, t, full).row("scratch_full", train.tokens)]
        if self.config.scratch.short:
            name = f"scratch-short-step{t}"
            short = self._train(name, ActivationData(base=base, rows=self.follow_rows), tokens=follow.tokens)
            rows.append(self._measured(name, t, short).row("scratch_short", follow.tokens))
        return rows

    def _analyse(self, points: tuple[Point, ...], rows: list[EfficiencyRow]) -> None:
        cfg, last, plan = self.config, self.steps[-1], self.plan
        common: dict[str, Any] = {"points": points, "alive_firings": cfg.alive_firings, "seed": cfg.seed}
        hook = HookPoint(layer=self.layers - 1, site="resid_post")
        if hook == cfg.hook:  # kinds are judged in a space that is not the dictionary's own
            hook = HookPoint(layer=self.layers - 1, site="resid_pre")
        reference = self.inputs.harvest("probe-reference", self.models[last], self.d, self.probe, self.probe_rows, hook=hook, keep=True)
        assert self.inputs.tokenizer is not None
        kinds = plan.add("kinds", KindsSpec(tokenizer=self.inputs.tokenizer, reference=reference, rule=cfg.kinds, **common))
        formation = plan.add("formation", FormationSpec(kinds=kinds, rule=cfg.formation, **common))
        drift = plan.add("drift", DriftSpec(formation=formation, null_step=self.frozen, null=self.null, **common))
        plan.add("patterns", PatternsSpec(kinds=kinds, rule=cfg.patterns, **common))
        plan.add("phases", PhasesSpec(kinds=kinds, drift=drift, rule=cfg.phases, **common))
        if cfg.umap is not None:
            plan.add("umap", UmapSpec(formation=formation, kinds=kinds, rule=cfg.umap, **common))
        plan.add("efficiency", EfficiencySpec(rows=tuple(rows)))
