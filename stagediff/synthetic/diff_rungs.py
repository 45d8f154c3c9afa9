"""The ladder of planted worlds for the stage-wise diff: each rung's world, and how its dictionaries are trained. Light: the command's help reads it."""

from pydantic import Field

from stagediff.sae.spec import Budget, DictionaryConfig
from stagediff.spec import Value
from stagediff.synthetic.diff_spec import DiffWorld

__all__ = ["DIFF_RUNGS", "DiffRecipe", "diff_world"]


class DiffRecipe(Value):
    """How the dictionaries are trained."""

    dictionary: DictionaryConfig = DictionaryConfig(features=1024, l1=3.0)
    train: Budget = Budget(tokens=6_144_000, batch=2048, lr=1e-3)
    finetune: Budget = Budget(tokens=3_276_800, batch=2048, lr=3e-3)
    """Of D, M, both F and the nulls; the direct finetune has twice of it."""
    rows: int = Field(64_000, ge=1)
    """Training rows, read as often as the budgets ask for."""
    heldout_rows: int = Field(8192, ge=1)
    alive_firings: int = 10
    null_repeats: int = Field(2, ge=1)
    """Of the retrain null, two so that each feature has its own; the first is the no-change control too."""


_SMALL = DiffRecipe(dictionary=DictionaryConfig(features=512, l1=3.0), train=Budget(tokens=3_072_000, batch=2048, lr=1e-3), rows=32_000)
_SMALL_WORLD: dict[str, float] = {
    "d": 64,
    "l0": 4.0,
    "unchanged": 202,
    "model_only": 20,
    "data_only": 12,
    "appears": 8,
    "differs": 8,
    "turns": 8,
}
_SAME_MODELS: dict[str, float] = {**_SMALL_WORLD, "appears": 0, "angle": 0.0, "model_angle": 0.0, "jitter": 0.0}
_LARGE_WORLD: dict[str, float] = {
    "d": 768,
    "unchanged": 5000,
    "model_only": 240,
    "data_only": 144,
    "appears": 96,
    "differs": 96,
    "turns": 96,
}
_LARGE = DiffRecipe(
    dictionary=DictionaryConfig(features=16_384, l1=3.0),
    train=Budget(tokens=4_915_200, batch=2048, lr=2e-3),
    finetune=Budget(tokens=6_553_600, batch=2048, lr=3e-3),
)
_LARGE_FOCUSED = _LARGE.model_copy(update={"finetune": Budget(tokens=3_276_800, batch=2048, lr=3e-3, focus=0.5)})
_CROWDED: dict[str, float] = {"unchanged": 804, "model_only": 80, "l0": 12.0}
_CROWDED_FOCUSED = DiffRecipe(
    dictionary=DictionaryConfig(features=2048, l1=3.0), finetune=Budget(tokens=3_276_800, batch=2048, lr=3e-3, focus=0.5)
)
_LONG = DiffRecipe(finetune=Budget(tokens=9_830_400, batch=2048, lr=1e-3))
_FOCUSED = DiffRecipe(finetune=Budget(tokens=4_915_200, batch=2048, lr=3e-3, focus=3.0), rows=192_000)

DIFF_RUNGS: dict[str, tuple[dict[str, float], DiffRecipe]] = {
    "small": (_SMALL_WORLD, _SMALL),
    "middle": ({}, DiffRecipe()),
    "long": ({}, _LONG),
    "close": ({"angle": 40.0}, DiffRecipe()),
    "turned": ({"model_angle": 90.0}, DiffRecipe()),
    "rotated": ({"common_rotation": 20.0}, DiffRecipe()),
    "crowded": (_CROWDED, DiffRecipe()),
    "crowded-focused": (_CROWDED, _CROWDED_FOCUSED),
    "rare": ({"new_share": 0.01}, _LONG),
    "focused": ({"new_share": 0.01}, _FOCUSED),
    "large": (_LARGE_WORLD, _LARGE),
    "large-focused": (_LARGE_WORLD, _LARGE_FOCUSED),
    "identical": (_SAME_MODELS, _SMALL),
}
"""Rung -> what its world changes of DiffWorld's defaults, and its recipe: few dimensions; the usual world; the same with a longer and slower finetune;
directions nearer to each other; model-only features that turn wholly; a common rotation; twice the features; the same with twice the latents and a focus
(`sae.focus`); one new row in a hundred; the same with a focus and three times the rows; d 768; the same with a focus. The last is a control: both models
are one, so that nothing may be called (q), whatever the scores say.
"""


def diff_world(rung: str, seed: int) -> DiffWorld:
    """The world of a rung of the ladder."""
    return DiffWorld.model_validate({"seed": seed, **DIFF_RUNGS[rung][0]})
