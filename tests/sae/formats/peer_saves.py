"""Dictionaries that the packages themselves trained or made and saved: for the tests against them, and frozen once for those without.

    python tests/sae/formats/peer_saves.py tests/sae/formats/frozen

writes the frozen ones (it needs the extra `peers`): each folder holds the package's files and expected.safetensors, with x and the package's
own reconstruction in fp64.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

STEPS, BATCH = 30, 32


def planted(d: int, seed: int = 4) -> torch.Tensor:
    """Batches [STEPS, BATCH, d] of sparse sums of directions around a mean, with norms far from 1."""
    g = torch.Generator().manual_seed(seed)
    codes = (torch.rand(STEPS * BATCH, 3 * d, generator=g) < 1 / d) * (1 + torch.rand(STEPS * BATCH, 3 * d, generator=g))
    x = 40 * codes @ torch.nn.functional.normalize(torch.randn(3 * d, d, generator=g), dim=1) + 15 * torch.randn(d, generator=g)
    return x.reshape(STEPS, BATCH, d)


def dictionary_learning(folder: Path, d: int, features: int, k: int, *, normalize: bool) -> dict[str, Path]:
    """Trains one of every kind for a few steps with `trainSAE`, which saves them: class (or trainer) -> folder."""
    from dictionary_learning.dictionary import AutoEncoderNew
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.training import trainSAE

    shape = {"steps": STEPS, "activation_dim": d, "dict_size": features, "layer": 2, "lm_name": "a/model", "seed": 0, "device": "cpu"}
    shape |= {"lr": 3e-2, "warmup_steps": 1}
    top = {"k": k, "threshold_start_step": 0}
    trainers: dict[str, dict[str, Any]] = {
        "AutoEncoder": {"trainer": StandardTrainer, "l1_penalty": 1e-3, "sparsity_warmup_steps": None},
        "april": {"trainer": StandardTrainerAprilUpdate, "l1_penalty": 1e-3, "sparsity_warmup_steps": None},
        "AutoEncoderTopK": {"trainer": TopKTrainer, **top},
        "BatchTopKSAE": {"trainer": BatchTopKTrainer, **top},
        "MatryoshkaBatchTopKSAE": {"trainer": MatryoshkaBatchTopKTrainer, **top, "group_fractions": [0.25, 0.75]},
        "JumpReluAutoEncoder": {"trainer": JumpReluTrainer, "sparsity_warmup_steps": None, "target_l0": float(k)},
    }
    configs = [{**shape, **more} for more in trainers.values()]
    with torch.random.fork_rng(devices=[]):
        trainSAE(list(planted(d)), configs, STEPS, save_dir=str(folder), normalize_activations=normalize, device="cpu")
        folders = {name: folder / f"trainer_{i}" for i, name in enumerate(trainers)}
        new = AutoEncoderNew(d, features)  # no trainer makes one
        for parameter in new.parameters():
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    folders["AutoEncoderNew"] = folder / "new"
    folders["AutoEncoderNew"].mkdir()
    torch.save(new.state_dict(), folders["AutoEncoderNew"] / "ae.pt")
    (folders["AutoEncoderNew"] / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoderNew"}}))
    return folders


def dictionary_learning_forward(folder: Path, x: torch.Tensor) -> torch.Tensor:
    """The package's own reconstruction of x [n, d], fp64."""
    from dictionary_learning.utils import load_dictionary

    dictionary, _ = load_dictionary(str(folder), "cpu")
    with torch.no_grad():
        return dictionary.double()(x)


def sparsify(folder: Path, d: int, features: int, k: int) -> Path:
    """A sparse coder with random weights, saved by the package."""
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(d, SparseCoderConfig(num_latents=features, k=k, multi_topk=True), dtype=torch.float32)
    g = torch.Generator().manual_seed(7)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g)
    sae.set_decoder_norm_to_unit_norm()
    sae.save_to_disk(folder)
    return folder


def sparsify_forward(folder: Path, x: torch.Tensor) -> torch.Tensor:
    """The package's own reconstruction of x [n, d], fp64, by encode and decode: after a multi_topk training forward() returns one from 4 k latents."""
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(folder).double()
    with torch.no_grad():
        values, indices, _ = sae.encode(x)
        return sae.decode(values, indices)


def freeze(target: Path) -> None:
    import shutil
    import tempfile

    d, features, k = 8, 16, 3
    x = planted(d, seed=9)[0].double()
    with tempfile.TemporaryDirectory() as made:
        folders = dictionary_learning(Path(made) / "dl", d, features, k, normalize=True)
        forwards: dict[str, Callable[[Path, torch.Tensor], torch.Tensor]] = dict.fromkeys(folders, dictionary_learning_forward)
        folders["SparseCoder"] = sparsify(Path(made) / "sparsify", d, features, k)
        forwards["SparseCoder"] = sparsify_forward
        for name, folder in folders.items():
            shutil.rmtree(target / name, ignore_errors=True)
            shutil.copytree(folder, target / name)
            save_file({"x": x, "x_hat": forwards[name](folder, x).contiguous()}, target / name / "expected.safetensors")


if __name__ == "__main__":
    freeze(Path(sys.argv[1]))
