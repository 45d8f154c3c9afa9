"""What dictionary_learning 0.1.0 and sparsify 1.3.3 compute from their files, written down anew: a token and a feature at a time, in fp64."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file


def dictionary_learning(folder: Path, x: torch.Tensor) -> np.ndarray:
    """x_hat [n, d] of the dictionary in `folder`, as its class in dictionary.py, trainers/top_k.py and trainers/batch_top_k.py says."""
    name = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    state = {key: value.double().numpy() for key, value in torch.load(folder / "ae.pt", weights_only=True).items()}
    if name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        encoder, b_enc, rows = state["W_enc"].T, state["b_enc"], state["W_dec"]
    else:
        encoder, b_enc, rows = state["encoder.weight"], state["encoder.bias"], state["decoder.weight"].T
    b_dec = state[{"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(name, "b_dec")]
    subtracted = np.zeros_like(b_dec) if name in ("JumpReluAutoEncoder", "AutoEncoderNew") else b_dec
    out = []
    for token in x.numpy():
        pre = _pre(token - subtracted, encoder, b_enc)
        if name == "AutoEncoderTopK":
            active = _largest(pre, int(state["k"]))
        elif name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
            limits = np.broadcast_to(state["threshold"], len(pre))
            active = [i for i, value in enumerate(pre) if value > 0 and value > limits[i]]
        else:
            active = [i for i, value in enumerate(pre) if value > 0]
        out.append(b_dec + sum((pre[i] * rows[i] for i in active), start=np.zeros_like(b_dec)))
    return np.array(out)


def sparsify(folder: Path, x: torch.Tensor) -> np.ndarray:
    """x_hat [n, d] of the sparse coder in `folder`, as sparse_coder.py and fused_encoder.py say."""
    cfg: dict[str, Any] = json.loads((folder / "cfg.json").read_text())
    assert not cfg["transcode"]
    w = {key: value.astype(np.float64) for key, value in load_file(folder / "sae.safetensors").items()}
    out = []
    for token in x.numpy():
        pre = _pre(token - w["b_dec"], w["encoder.weight"], w["encoder.bias"])
        out.append(w["b_dec"] + sum((pre[i] * w["W_dec"][i] for i in _largest(pre, cfg["k"])), start=np.zeros_like(w["b_dec"])))
    return np.array(out)


def _pre(token: np.ndarray, encoder: np.ndarray, b_enc: np.ndarray) -> list[float]:
    return [float(row @ token) + float(b) for row, b in zip(encoder, b_enc, strict=True)]


def _largest(pre: list[float], k: int) -> list[int]:
    return [i for i in sorted(range(len(pre)), key=lambda i: -pre[i])[:k] if pre[i] > 0]
