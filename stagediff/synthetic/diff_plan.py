"""The plan that scores the stage-wise diff on a planted world: rows, activations of the four cells, every stage, diff, aligned scores, the score.
Everything from training on is what a run on real models does.
"""

from typing import Literal

from stagediff.diff.spec import ALIGNED_STAGES, PATHS, STAGES, AlignSpec, DiffSpec, NullSpec
from stagediff.diff.stages import STAGE_DATA, STAGE_MODEL, STAGE_START
from stagediff.evidence.rivals.config import METHODS, Method, RivalsConfig
from stagediff.evidence.rivals.spec import LatentsSpec
from stagediff.evidence.rivals.stages import rival_spec
from stagediff.lm.spec import ActivationData, CorpusSource, HookPoint, MixSpec, ModelSource, TokenizerSource
from stagediff.plan import Plan
from stagediff.sae.spec import FinetuneSpec, StatisticsSpec, TrainSpec
from stagediff.spec import Ref
from stagediff.synthetic.diff_rungs import DiffRecipe
from stagediff.synthetic.diff_spec import BLOCK_ROWS, DiffWorld, PlantedDiffHarvestSpec, PlantedDiffSpec, PlantedDiffTokensSpec
from stagediff.synthetic.spec import PlantedTokenizerSpec

__all__ = ["diff_plan"]

HOOK = HookPoint(layer=0, site="resid_post")
"""The name of a space; no model is behind it."""
SHARD_ROWS = 16 * BLOCK_ROWS
Data = Literal["base", "new"]
Split = Literal["train", "heldout"]


def diff_plan(world: DiffWorld, recipe: DiffRecipe, rivals: bool = False) -> Plan:
    """All steps for one world; the last one is "score". `rivals`: whether crosscoders and the difference SAE are trained too."""
    return _Builder(world, recipe).build(rivals)


class _Builder:
    def __init__(self, world: DiffWorld, recipe: DiffRecipe):
        self.world, self.recipe = world, recipe
        self.plan = Plan(f"planted-diff-{world.seed}")
        self.tokenizer = TokenizerSource(artifact=self.plan.add("tokenizer", PlantedTokenizerSpec(vocab=world.topics)))

    def build(self, rivals: bool) -> Plan:
        dictionaries, nulls = self._dictionaries()
        statistics = {s: self._statistics(s, dictionaries[s], STAGE_MODEL[s], STAGE_DATA[s] == "base") for s in STAGES}
        diff = self.plan.add(
            "diff", DiffSpec(dictionaries={s: dictionaries[s] for s in STAGES}, statistics=statistics, seed=self.world.seed)
        )
        null = self._null(dictionaries, statistics, nulls)
        align = AlignSpec(
            diff=diff,
            dictionaries={s: dictionaries[s] for s in ALIGNED_STAGES},
            statistics={s: statistics[s] for s in (*PATHS, "F_direct")},
            base_statistics={s: self._statistics(f"{s}-on-base", dictionaries[s], "base", False) for s in PATHS},
            null=null,
            alive_firings=self.recipe.alive_firings,
            seed=self.world.seed,
        )
        aligned = self.plan.add("align", align)
        first = {f"{s}_null": of[0] for s, of in nulls.items()}
        latents = {method: self._latents(method) for method in METHODS} if rivals else {}
        spec = PlantedDiffSpec(world=self.world, diff=diff, align=aligned, null=null, dictionaries=dictionaries | first, rivals=latents)
        self.plan.add("score", spec)
        return self.plan

    def _latents(self, method: Method) -> Ref:
        """A rival with as many tokens as all dictionaries behind the scatter, and what its latents do on held-out rows."""
        recipe, seed = self.recipe, self.world.seed
        train, held = ([self._data(model, "mix", split) for model in ("base", "finetuned")] for split in ("train", "heldout"))
        tokens = recipe.train.tokens + 4 * recipe.finetune.tokens
        common = {
            "base": train[0],
            "finetuned": train[1],
            "budget": recipe.train.model_copy(update={"tokens": tokens}),
            "order_seed": seed + 1,
            "seed": seed,
        }
        given = RivalsConfig(k=round(self.world.l0))  # as many as fire
        made = self.plan.add(method, rival_spec(method, given, recipe.dictionary, common))
        spec = LatentsSpec(dictionary=made, base=held[0], finetuned=held[1], alive_firings=recipe.alive_firings)
        return self.plan.add(f"latents-{method}", spec)

    def _null(self, dictionaries: dict[str, Ref], statistics: dict[str, Ref], nulls: dict[str, tuple[Ref, ...]]) -> Ref:
        """The step that compares the real paths with the retrained dictionaries."""
        stages = ("S", "D", "M", *PATHS)
        measured = {
            s: tuple(self._statistics(f"null-{s}-{k}", ref, STAGE_MODEL[s], STAGE_DATA[s] == "base") for k, ref in enumerate(of))
            for s, of in nulls.items()
        }
        spec = NullSpec(
            dictionaries={s: dictionaries[s] for s in stages},
            statistics={s: statistics[s] for s in stages},
            nulls=nulls,
            null_statistics=measured,
            alive_firings=self.recipe.alive_firings,
        )
        return self.plan.add("retrain-null", spec)

    def _dictionaries(self) -> tuple[dict[str, Ref], dict[str, tuple[Ref, ...]]]:
        """Every stage's dictionary, and D and M trained on with nothing new."""
        recipe, seed = self.recipe, self.world.seed
        data = {(model, kind): self._data(model, kind, "train") for model in ("base", "finetuned") for kind in ("base", "mix")}
        made = {
            "S": self.plan.add(
                "train-S",
                TrainSpec(data=data["base", "base"], budget=recipe.train, order_seed=seed, seed=seed, dictionary=recipe.dictionary),
            )
        }

        def finetune(name: str, start: str, stage: str, times: int = 1, order: int = 0) -> Ref:
            budget = recipe.finetune.model_copy(update={"tokens": times * recipe.finetune.tokens})
            reads = data[STAGE_MODEL[stage], STAGE_DATA[stage]]
            return self.plan.add(name, FinetuneSpec(start=made[start], data=reads, budget=budget, order_seed=seed + 1 + order, seed=seed))

        for stage, start in STAGE_START.items():
            made[stage] = finetune(f"finetune-{stage}", start, stage, times=2 if stage == "F_direct" else 1)
        repeats = range(recipe.null_repeats)
        return made, {s: tuple(finetune(f"null-{s}-{k}", s, s, order=k) for k in repeats) for s in ("D", "M")}

    def _statistics(self, name: str, dictionary: Ref, model: str, base_rows_only: bool) -> Ref:
        data = self._data(model, "mix", "heldout")
        return self.plan.add(f"statistics-{name}", StatisticsSpec(dictionary=dictionary, data=data, base_rows_only=base_rows_only))

    def _data(self, model: str, kind: str, split: Split) -> ActivationData:
        n = self.recipe.rows if split == "train" else self.recipe.heldout_rows
        new_rows = round(n * self.world.new_share)
        base = self._tokens("base", split, n)
        activations = self._harvest(model, "base", split, base, n)
        if kind == "base":
            return ActivationData(base=activations, rows=n)
        new = self._tokens("new", split, new_rows)
        mix = self.plan.add(f"mix-{split}", MixSpec(base=base, new=new, rows=n, share=self.world.new_share, seed=self.world.seed))
        return ActivationData(base=activations, rows=n, mix=mix, new=self._harvest(model, "new", split, new, new_rows))

    def _tokens(self, data: Data, split: Split, n: int) -> Ref:
        spec = PlantedDiffTokensSpec(
            corpus=CorpusSource(digest="planted"),
            tokenizer=self.tokenizer,
            context=self.world.context,
            rows=n,
            split=split,
            is_new=data == "new",
            world=self.world,
            seed=self.world.seed,
        )
        return self.plan.add(f"tokens-{split}-{data}", spec)

    def _harvest(self, model: str, data: Data, split: Split, tokens: Ref, n: int) -> Ref:
        spec = PlantedDiffHarvestSpec.model_validate(
            {
                "model": ModelSource(digest=f"planted-{model}"),
                "tokens": tokens,
                "rows": n,
                "hook": HOOK,
                "skip_positions": (),
                "batch_rows": BLOCK_ROWS,
                "shard_rows": SHARD_ROWS,
                "world": self.world,
                "side": model,
            }
        )
        return self.plan.add(f"harvest-{model}-{data}-{split}", spec)
