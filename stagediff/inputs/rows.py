"""Plans what every kind of run begins with: corpora, tokenizer, token rows, a base organism, harvests."""

import math
from typing import Any, Literal

from stagediff.errors import UserError
from stagediff.inputs.config import CorpusConfig, HarvestConfig, ModelConfig, OrganismConfig, TrainConfig
from stagediff.lm.corpora import resolve_corpus
from stagediff.lm.sources import check_context, model_config, resolve_tokenizer, width
from stagediff.lm.spec import CorpusSource, HarvestSpec, HookPoint, ModelSource, TokenizerSource, TokenizerSpec, TokensSpec
from stagediff.organisms.spec import OrganismSpec
from stagediff.plan import Plan
from stagediff.sae.spec import Budget
from stagediff.spec import Ref

__all__ = ["Inputs", "budget", "corpus_source", "interval"]


class Inputs:
    """Adds the first steps to a plan. One object per run: context, hook, harvest settings and seed are the run's."""

    def __init__(
        self, plan: Plan, *, context: int, hook: HookPoint, harvest: HarvestConfig, heldout: float, seed: int, forbid: tuple[str, ...] = ()
    ):
        self.plan, self.context, self.hook, self.settings = plan, context, hook, harvest
        self.heldout, self.seed, self.forbid = heldout, seed, forbid
        self.row_tokens = context - len(set(harvest.skip_positions))
        """Activations per token row."""
        self.tokenizer: TokenizerSource | None = None

    def set_tokenizer(self, model: ModelConfig, corpus: CorpusSource) -> None:
        """The model's own tokenizer; for an organism, one trained on the corpus."""
        if model.name:
            self.tokenizer = resolve_tokenizer(name=model.name, revision=model.revision)
            return
        assert model.organism
        spec = TokenizerSpec(corpus=corpus, vocab=model.organism.vocab, heldout=self.heldout, seed=self.seed)
        self.tokenizer = TokenizerSource(artifact=self.plan.add("tokenizer", spec))

    def rows_for(self, tokens: int, drawn: int | None = None) -> int:
        """Rows that a budget of so many activations reads: no more than it needs, in whole forward batches; at most `drawn`."""
        batch = self.settings.batch_rows
        needed = math.ceil(tokens / self.row_tokens / batch) * batch
        return needed if drawn is None else min(needed, drawn)

    def tokens(
        self,
        name: str,
        corpus: CorpusSource,
        layout: Literal["packed", "document"],
        rows: int,
        *,
        split: Literal["train", "heldout"] = "train",
        new: bool = False,
        seed: int = 0,
    ) -> Ref:
        """Token rows of one split of a corpus."""
        assert self.tokenizer is not None
        spec = TokensSpec(
            corpus=corpus,
            tokenizer=self.tokenizer,
            context=self.context,
            rows=rows,
            split=split,
            heldout=self.heldout,
            seed=self.seed + seed,
            layout=layout,
            is_new=new,
            forbid=() if new else self.forbid,
        )
        return self.plan.add(name, spec)

    def organism(
        self, config: OrganismConfig, corpus: CorpusSource, layout: Literal["packed", "document"], base_rows: Ref, heldout: Ref, seed: int
    ) -> Ref:
        """A small base model, trained on its own rows where the config says how many, else on the run's."""
        if not 0 <= self.hook.layer < config.architecture.layers:
            raise UserError(
                f"hook.layer is {self.hook.layer}, but the organism has {config.architecture.layers} layers; "
                f"expected 0 to {config.architecture.layers - 1}."
            )
        tokens = base_rows
        if config.tokens is not None:
            tokens = self.tokens("tokens-organism", corpus, layout, max(1, config.tokens // self.context))
        spec = OrganismSpec(
            tokens=tokens,
            heldout=heldout,
            architecture=config.architecture,
            training=config.training,
            checkpoints=config.checkpoints,
            seed=seed if config.seed is None else config.seed,
        )
        return self.plan.add("organism", spec)

    def width(self, model: ModelConfig, source: ModelSource) -> int:
        """The residual stream's width d, before any model exists. Raises UserError when the model is made for shorter rows."""
        if model.organism:
            return model.organism.architecture.width
        config = model_config(source)
        assert config is not None  # a model outside the store has one: resolve_model has seen it
        check_context(config, self.context)
        return width(config)

    def harvest(
        self, name: str, model: ModelSource, d: int, tokens: Ref, rows: int, *, hook: HookPoint | None = None, keep: bool = False
    ) -> Ref:
        """Activations of the first `rows` rows. `keep`: never evicted."""
        h = self.settings
        shard_rows = max(1, h.shard_mib * 2**20 // (self.row_tokens * d * 2) // h.batch_rows) * h.batch_rows
        spec = HarvestSpec(
            model=model,
            tokens=tokens,
            rows=rows,
            hook=hook or self.hook,
            precision=h.precision,
            skip_positions=tuple(sorted(set(h.skip_positions))),
            batch_rows=h.batch_rows,
            shard_rows=shard_rows,
            stored=h.stored or keep,
        )
        return self.plan.add(name, spec, keep=keep)


def corpus_source(config: CorpusConfig, **more: Any) -> CorpusSource:
    """The corpus a config names, with its content's digest."""
    given: dict[str, Any] = {name: getattr(config, name) for name in CorpusConfig.model_fields if name != "layout"}
    return resolve_corpus(**given, **more)


def budget(config: TrainConfig, times: int = 1) -> Budget:
    """The training budget of a config group, its tokens multiplied."""
    fields = {name: getattr(config, name) for name in Budget.model_fields}
    return Budget(**{**fields, "tokens": config.tokens * times})


def interval(config: TrainConfig) -> int:
    """Tokens between training checkpoints."""
    return config.checkpoint_tokens or max(config.batch, config.tokens // 10)
