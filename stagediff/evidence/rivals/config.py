"""Settings of the rivals: `rivals: {}` in a stage-wise config adds them all."""

from typing import Literal

from pydantic import Field, PositiveInt, field_validator

from stagediff.spec import Value

__all__ = ["METHODS", "Method", "RivalsConfig"]

Method = Literal["crosscoder-l1", "crosscoder-batchtopk", "difference-sae"]
METHODS: tuple[Method, ...] = ("crosscoder-l1", "crosscoder-batchtopk", "difference-sae")


class RivalsConfig(Value):
    """Which rivals are trained beside the diff, and how."""

    methods: tuple[Method, ...] = METHODS
    tokens: PositiveInt | None = None
    """Training tokens of each; None: as many as all dictionaries behind the scatter were trained on together (S with what it comes from, D, M and both
    F). A token is both models' activations of it."""
    features: PositiveInt | None = None
    """None: as the run's dictionary."""
    l1: float | None = Field(None, ge=0)
    """crosscoder-l1: weight of sum_i f_i (||W_dec_i base|| + ||W_dec_i finetuned||). None: as the run's dictionary."""
    shared: float = Field(0.1, ge=0, lt=1)
    """crosscoder-l1: share of the latents that are designated shared: one direction for both models."""
    shared_l1: float = Field(0.2, ge=0)
    """crosscoder-l1: their weight in the sparsity term, relative to the others'."""
    k: PositiveInt | None = None
    """crosscoder-batchtopk: active latents per token. None: the run's dictionary.k."""
    baseline: bool = False
    """Whether the whole path is run once more with the base model in place of the finetuned one, as P1's baseline: four finetunes more."""

    @field_validator("methods")
    @classmethod
    def _each_once(cls, value: tuple[Method, ...]) -> tuple[Method, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"methods names one twice: {', '.join(value)}")
        return value
