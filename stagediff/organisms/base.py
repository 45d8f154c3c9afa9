"""The base organism (the step `organism`): a small GPT-NeoX trained on token rows, with checkpoints along the way.

The artifact is a model in Hugging Face layout, tokenizer included; sub-folders "step0", "step1", ... hold the weights after so many updates, in
the manner of Pythia's revisions. The update number decides which rows are read, so a killed training continues to the same bytes.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stagediff.errors import UserError
from stagediff.lm.spec import TokensSpec
from stagediff.organisms.rows import TokenRows
from stagediff.organisms.spec import OrganismSpec
from stagediff.organisms.training import CURVE_COLUMNS, Trainee, train, use_causal_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stagediff.steps import Job

__all__ = ["check", "compute", "heldout_loss", "log_spaced", "new_model", "write_curve", "write_model"]

HELDOUT_ROWS = 512


def compute(spec: OrganismSpec, job: "Job") -> dict[str, Any]:
    """Trains the model; figures: parameters, training tokens, held-out loss in nats per token."""
    check(spec)
    rows, heldout = TokenRows(job.store, spec.tokens), TokenRows(job.store, spec.heldout)
    if rows.context != heldout.context:
        raise UserError(f"Training rows have {rows.context} tokens, held-out rows {heldout.context}; draw both with the same `context`.")
    heldout.check_vocab(rows.vocab, "the training rows' tokenizer")
    drawn = job.artifact(spec.tokens).spec()
    assert isinstance(drawn, TokensSpec)
    model = new_model(spec, rows.vocab, rows.context)
    model.to(torch.device(job.device))  # type: ignore[arg-type]
    use_causal_attention(model)
    trainee = Trainee(model, spec.training)

    def keep(step: int) -> None:
        if step in spec.checkpoints and step < spec.training.steps:
            write_model(job, trainee, f"step{step}/")

    batch = spec.training.batch
    curve = train(
        trainee,
        lambda step: rows.at(step * batch, batch),
        job.writer,
        job.progress,
        "organism",
        resume_every=spec.resume_every,
        before_step=keep,
    )
    write_model(job, trainee, "")
    if spec.training.steps in spec.checkpoints:
        write_model(job, trainee, f"step{spec.training.steps}/")
    write_tokenizer(job, drawn.tokenizer)
    write_curve(job, curve)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": spec.training.steps * batch * rows.context,
        "heldout_loss": round(heldout_loss(model, heldout), 4),
        "checkpoints": len(spec.checkpoints),
    }


def log_spaced(steps: int, linear: int = 0) -> tuple[int, ...]:
    """0, 1, 2, 4, ... and `steps`; with `linear`, powers of two only up to it and then every `linear` steps (Pythia: linear=1000)."""
    powers = [0] + [1 << i for i in range(steps.bit_length()) if 1 << i < min(steps, linear or steps)]
    return tuple(dict.fromkeys([*powers, *(range(linear, steps, linear) if linear else ()), steps]))


def new_model(spec: OrganismSpec, vocab: int, context: int) -> "PreTrainedModel":
    """An untrained model; its weights depend on the spec's seed and on nothing else."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    a = spec.architecture
    config = GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=a.width,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        intermediate_size=4 * a.width,
        max_position_embeddings=max(context, 128),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        return GPTNeoXForCausalLM(config)


@torch.no_grad()
def heldout_loss(model: "PreTrainedModel", rows: TokenRows, limit: int = HELDOUT_ROWS, batch: int = 32) -> float:
    """Mean cross-entropy in nats per token over the first `limit` rows; log-softmax in fp32."""
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, min(limit, len(rows))
    for start in range(0, count, batch):
        x: Tensor = rows.at(start, min(batch, count - start)).to(device)
        logits = model(input_ids=x, use_cache=False).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), x[:, 1:].reshape(-1))) * len(x)
    return total / count


def write_model(job: "Job", trainee: Trainee, prefix: str) -> None:
    """Writes config and fp32 weights into the artifact, unless an earlier run did."""
    if job.writer.has(f"{prefix}model.safetensors") and job.writer.has(f"{prefix}config.json"):
        return
    with tempfile.TemporaryDirectory(dir=job.writer.scratch()) as folder:
        trainee.save(folder)
        for path in sorted(Path(folder).iterdir()):
            job.writer.write_file(f"{prefix}{path.name}", path)


def write_tokenizer(job: "Job", source: Any) -> None:
    """Puts the tokenizer beside the weights, so that the folder is all a user needs."""
    from stagediff.lm.models import load_tokenizer

    with tempfile.TemporaryDirectory(dir=job.writer.scratch()) as folder:
        load_tokenizer(source, job.store).save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            job.writer.write_file(path.name, path)


def write_curve(job: "Job", curve: list[list[float]]) -> None:
    import pandas as pd

    job.writer.write_table(
        "training.parquet", pd.DataFrame(curve, columns=list(CURVE_COLUMNS)).astype({"step": "int64"}), columns=CURVE_COLUMNS
    )


def check(spec: OrganismSpec) -> None:
    """Raises UserError for widths, heads, steps and checkpoints that cannot be."""
    a, t = spec.architecture, spec.training
    if a.width % a.heads or (a.width // a.heads) % 8:
        raise UserError(
            f"An organism of width {a.width} with {a.heads} heads was asked for; width / heads must be a multiple of 8 (rotary "
            "embeddings turn a quarter of a head's dimensions, in pairs)."
        )
    if t.steps < 1 or t.batch < 1 or t.lr <= 0:
        raise UserError(f"The training has steps {t.steps}, batch {t.batch}, lr {t.lr}; all must be above 0.")
    if wrong := [s for s in spec.checkpoints if not 0 <= s <= t.steps]:
        raise UserError(f"Checkpoints at {', '.join(map(str, wrong))} were asked for, but the training has steps 0 to {t.steps}.")
