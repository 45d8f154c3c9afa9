"""The plan that scores SAE-Track on a planted world: rows, activations of every checkpoint, the chain of dictionaries, its analysis, the score.

Everything from training on is what a tracked run of a real model does.
"""

from typing import Literal

from pydantic import Field

from stagediff.lm.spec import ActivationData, CorpusSource, HookPoint, ModelSource, TokenizerSource
from stagediff.plan import Plan
from stagediff.sae.spec import Budget, DictionaryConfig, FinetuneSpec, StatisticsSpec, TrainSpec
from stagediff.spec import Ref, Value
from stagediff.synthetic.spec import (
    CHECKPOINT_STEPS,
    PlantedHarvestSpec,
    PlantedTokenizerSpec,
    PlantedTokensSpec,
    PlantedTrackSpec,
    TrackWorld,
)
from stagediff.synthetic.world import BLOCK_ROWS, Planted
from stagediff.track.spec import FormationSpec, KindsSpec, PatternsSpec, Point

__all__ = ["RECIPES", "Recipe", "plan"]

HOOK, REFERENCE = HookPoint(layer=0, site="resid_post"), HookPoint(layer=1, site="resid_post")
"""Names for two spaces that differ; no model is behind them."""
SHARD_ROWS = 8 * BLOCK_ROWS
EXAMPLES = 25


class Recipe(Value):
    """How the chain is trained and looked at. Chosen on the seeds 100 to 104."""

    dictionary: DictionaryConfig
    train: Budget = Budget(tokens=1_048_576, batch=1024, lr=2e-3)
    follow: Budget = Budget(tokens=196_608, batch=1024, lr=2e-3)
    optimiser: Literal["fresh", "carried"] = "fresh"
    revive: Literal["none", "resample"] = "resample"
    """Features that are dead at a checkpoint start anew there: without it nothing is left for newborns to take."""
    revive_tokens: int = 32_768
    rows: int = Field(6144, ge=1)
    """Training rows, read as often as the budgets ask for."""
    probe_rows: int = Field(2048, ge=EXAMPLES)
    alive_firings: int = 64
    """One firing in a thousand probe tokens (the rarest planted features fire two or three times): what a vanished feature leaves behind fires less."""


RECIPES = {
    "batchtopk": Recipe(dictionary=DictionaryConfig(architecture="batchtopk", features=256, k=2)),
    "relu": Recipe(dictionary=DictionaryConfig(architecture="relu", features=256, l1=3.0)),
}
"""Architecture -> recipe. batchtopk: k is near the number of features that really fire, which a real run cannot know. relu: SAE-Track's own architecture; with
more latents than there is to find it spends several on one feature, and newborns take these over."""


def plan(world: TrackWorld, recipe: Recipe) -> Plan:
    """All steps for one world; the last one is "score"."""
    made = Plan(f"planted-track-{world.seed}")
    vocab = Planted(world).vocab
    tokenizer = TokenizerSource(artifact=made.add("tokenizer", PlantedTokenizerSpec(vocab=vocab)))

    def rows(split: Literal["train", "heldout"], n: int) -> Ref:
        spec = PlantedTokensSpec(
            corpus=CorpusSource(digest="planted"),
            tokenizer=tokenizer,
            context=world.context,
            rows=n,
            split=split,
            world=world,
            seed=world.seed,
        )
        return made.add(f"tokens-{split}", spec)

    def harvest(name: str, tokens: Ref, n: int, checkpoint: int, space: Literal["hook", "reference"] = "hook") -> ActivationData:
        spec = PlantedHarvestSpec(
            model=ModelSource(digest="planted"),
            tokens=tokens,
            rows=n,
            hook=HOOK if space == "hook" else REFERENCE,
            skip_positions=(),
            batch_rows=BLOCK_ROWS,
            shard_rows=SHARD_ROWS,
            world=world,
            checkpoint=checkpoint,
            space=space,
        )
        return ActivationData(base=made.add(name, spec), rows=n)

    trained, probed = rows("train", recipe.rows), rows("heldout", recipe.probe_rows)
    points: list[Point] = []
    for t in range(world.checkpoints):
        data = harvest(f"harvest-{t}", trained, recipe.rows, t)
        dictionary = made.add(f"dictionary-{t}", _training(recipe, world.seed, data, points[-1].dictionary if points else None))
        probe = harvest(f"probe-{t}", probed, recipe.probe_rows, t)
        statistics = made.add(f"statistics-{t}", StatisticsSpec(dictionary=dictionary, data=probe, base_rows_only=True, top=EXAMPLES))
        points.append(Point(step=t * CHECKPOINT_STEPS, dictionary=dictionary, statistics=statistics, probe=probe.base))
    reference = harvest("reference", probed, recipe.probe_rows, world.checkpoints - 1, "reference")

    chain, alive = tuple(points), recipe.alive_firings
    kinds = made.add("kinds", KindsSpec(points=chain, alive_firings=alive, seed=world.seed, tokenizer=tokenizer, reference=reference.base))
    formation = made.add("formation", FormationSpec(points=chain, alive_firings=alive, seed=world.seed, kinds=kinds))
    patterns = made.add("patterns", PatternsSpec(points=chain, alive_firings=alive, seed=world.seed, kinds=kinds))
    score = PlantedTrackSpec(
        world=world, tokens=probed, dictionaries=tuple(p.dictionary for p in points), kinds=kinds, formation=formation, patterns=patterns
    )
    made.add("score", score)
    return made


def _training(recipe: Recipe, seed: int, data: ActivationData, start: Ref | None) -> TrainSpec | FinetuneSpec:
    carries = recipe.optimiser == "carried"
    if start is None:
        return TrainSpec(data=data, budget=recipe.train, order_seed=seed, seed=seed, dictionary=recipe.dictionary, keep_optimiser=carries)
    return FinetuneSpec(
        start=start,
        data=data,
        budget=recipe.follow,
        order_seed=seed + 1,
        seed=seed,
        rescale=True,
        optimiser=recipe.optimiser,
        revive=recipe.revive,
        revive_tokens=recipe.revive_tokens,
        keep_optimiser=carries,
    )
