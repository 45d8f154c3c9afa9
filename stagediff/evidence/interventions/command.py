"""`stagediff steer KEY INDEX "prompt"`: what one feature does to one answer, for trying by hand."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from stagediff.store import Store

__all__ = ["command", "try_by_hand"]

STRENGTHS = (0.25, 0.5, 1.0)
NORM_ROWS = 64


def command(
    key: Annotated[
        str,
        typer.Argument(metavar="KEY", help="A diff (its dictionary F via D), or a dictionary: as `ls` shows it, or the start of its key."),
    ],
    index: Annotated[int, typer.Argument(metavar="INDEX", help="The feature's index, from 0.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the model is asked; \\n stands for a new line.")],
    strength: Annotated[
        list[float] | None, typer.Option(help="In mean residual norms; may be given several times. Default: 0.25, 0.5, 1.")
    ] = None,
    stage: Annotated[str, typer.Option(help="Of a diff: whose dictionary (S, D, M, F_D, F_M, F_direct).")] = "F_D",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer.")] = 32,
    store: Annotated[str, typer.Option("--store", metavar="STORE", help="Folder or s3://bucket/prefix.")] = "runs/demo",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Prints a model's answer without and with a feature's direction added."""
    import json

    from stagediff.store import Store

    text = prompt.replace("\\n", "\n")
    found = try_by_hand(Store(store), key, index, text, tuple(strength or STRENGTHS), stage=stage, tokens=tokens, device=device)
    if as_json:
        print(json.dumps(found))
        return
    print(f"{found['dictionary']}, feature {index}; 1 is the mean residual norm here, {found['residual_norm']:.3g}\n")
    for answer in found["answers"]:
        head = "as it is" if answer["strength"] == 0 else f"+ {answer['strength']:g}"
        print(f"{head:>10}: {answer['text']!r}")


def try_by_hand(
    store: "Store",
    key: str,
    index: int,
    prompt: str,
    strengths: tuple[float, ...],
    *,
    stage: str = "F_D",
    tokens: int = 32,
    device: str = "auto",
) -> dict[str, Any]:
    """{dictionary, feature, residual_norm, answers: [{strength, text}, …]}; the first answer, strength 0, is the model's own.

    The model is the one whose activations the dictionary was last trained on. Raises UserError for a key, stage, index or prompt that cannot be.
    """
    import numpy as np
    import torch

    from stagediff.errors import UserError
    from stagediff.evidence.interventions import hooks
    from stagediff.evidence.interventions.answers import answers
    from stagediff.evidence.interventions.setting import residual_norm
    from stagediff.lm.activations import ActivationReader
    from stagediff.lm.models import load_model
    from stagediff.numerics import resolve_device
    from stagediff.sae.dictionary import SAE
    from stagediff.spec import Ref

    artifact = store.artifact(store.find(key)).require()
    if artifact.ref.kind == "diffs":
        of = artifact.manifest.spec["dictionaries"]
        if stage not in of:
            raise UserError(f"--stage {stage!r} is not one of the diff's stages: {', '.join(of)}.")
        artifact = store.artifact(Ref(of[stage])).require()
    if artifact.ref.kind != "dictionaries":
        raise UserError(f"{artifact.ref} is neither a diff nor a dictionary; `stagediff ls {store.root} --kind diffs` lists the diffs.")
    spec: Any = artifact.spec()
    if not hasattr(spec, "data"):
        raise UserError(
            f"{artifact.ref} was imported, so that it is not known which model it reads. Give a dictionary that was trained here."
        )
    sae = SAE.load(artifact)
    if not 0 <= index < sae.features:
        raise UserError(f"There is no feature {index}; {artifact.ref} has features 0 to {sae.features - 1}.")
    reader = ActivationReader(store, spec.data)
    loaded = load_model(reader.model, store, device=resolve_device(device))
    ids = loaded.tokenizer(prompt)["input_ids"]
    if not ids:
        raise UserError("The prompt is empty; give a text for the model to go on from.")
    norm = residual_norm(loaded, reader, np.arange(min(NORM_ROWS, spec.data.rows)))
    each = (0.0, *strengths)
    direction = sae.to(str(loaded.device)).directions()[index]
    vectors = direction[None] * (norm * torch.tensor(each, device=direction.device))[:, None]

    def edit(rows: list[int], padding: torch.Tensor) -> Any:
        return hooks.add(loaded.model, reader.hook, vectors[torch.tensor(rows)], padding=padding, skip=reader.spec.skip_positions)

    got = loaded.tokenizer.batch_decode(answers(loaded.model, [ids] * len(each), tokens, len(each), edit))
    return {
        "dictionary": str(artifact.ref),
        "feature": index,
        "residual_norm": norm,
        "answers": [{"strength": s, "text": text} for s, text in zip(each, got, strict=True)],
    }
