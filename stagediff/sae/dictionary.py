"""The dictionary as everyone reads it: weights, encode, decode. No training state.

Inside, a dictionary works on scaled inputs: x' = input_scale * x with E||x'|| = sqrt(d) on the data it was first trained on. The scale is
part of the dictionary and is inherited by every finetune, so that feature i keeps its units through all stages of a diff. Callers see raw
residual-stream units only. Definitions: Anthropic's April 2024 update (relu), Gao et al. 2024 (topk), Bussmann et al. 2024 (batchtopk),
Rajamanoharan et al. 2024 (jumprelu).
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stagediff.sae import batchtopk, jumprelu, relu, topk
from stagediff.sae.spec import DictionaryConfig

if TYPE_CHECKING:
    from stagediff.store import Artifact

__all__ = ["ARCHITECTURES", "SAE", "resolved"]

ARCHITECTURES = {"relu": relu, "topk": topk, "batchtopk": batchtopk, "jumprelu": jumprelu}
"""Architecture -> the module with its `activate` (inference) and `gradient` (training)."""


@dataclass
class SAE:
    """A sparse autoencoder with d inputs and F features.

    f = act((x' - b_dec) W_enc + b_enc), x_hat' = f W_dec + b_dec; b_dec is subtracted where `config.subtract_b_dec` says so.
    """

    W_enc: Tensor
    """[d, F]"""
    b_enc: Tensor
    """[F]"""
    W_dec: Tensor
    """[F, d]"""
    b_dec: Tensor
    """[d], in scaled units."""
    config: DictionaryConfig
    input_scale: float = 1.0
    threshold: Tensor | None = None
    """[F], jumprelu and batchtopk: a feature is active where its pre-activation exceeds it."""

    @property
    def architecture(self) -> str:
        return self.config.architecture

    @property
    def d(self) -> int:
        return self.W_dec.shape[1]

    @property
    def features(self) -> int:
        return self.W_dec.shape[0]

    @property
    def k(self) -> int | None:
        """Active features per token; None where the architecture has no such number."""
        return self.config.k if self.architecture in ("topk", "batchtopk") else None

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Feature activations [n, F] of residual-stream vectors x [n, d] in raw units (any float type; computed in the weights')."""
        inner = x.to(self.W_enc.dtype) * self.input_scale
        if self.config.subtract_b_dec:
            inner = inner - self.b_dec
        return ARCHITECTURES[self.architecture].activate(torch.addmm(self.b_enc, inner, self.W_enc), self)

    @torch.no_grad()
    def decode(self, f: Tensor) -> Tensor:
        """Residual-stream vectors [n, d] in raw units from feature activations f [n, F]."""
        return torch.addmm(self.b_dec, f.to(self.W_dec.dtype), self.W_dec) / self.input_scale

    @torch.no_grad()
    def directions(self) -> Tensor:
        """Unit decoder rows [F, d]."""
        return self.W_dec / self.decoder_norms().clamp_min(1e-12)[:, None]

    @torch.no_grad()
    def decoder_norms(self) -> Tensor:
        """Norms of the decoder rows [F], in scaled units."""
        return self.W_dec.norm(dim=1)

    def norm_figures(self) -> dict[str, float]:
        """decoder_norm_mean, _min and _max, for a manifest."""
        norms = self.decoder_norms()
        return {f"decoder_norm_{name}": float(of()) for name, of in (("mean", norms.mean), ("min", norms.min), ("max", norms.max))}

    def to(self, device: str | torch.device) -> "SAE":
        """The same dictionary on another device."""
        threshold = None if self.threshold is None else self.threshold.to(device)
        moved = {name: getattr(self, name).to(device) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        return replace(self, **moved, threshold=threshold)

    def copy(self) -> "SAE":
        """A copy that shares no memory with this one."""
        threshold = None if self.threshold is None else self.threshold.clone()
        return replace(self, **{n: getattr(self, n).clone() for n in ("W_enc", "b_enc", "W_dec", "b_dec")}, threshold=threshold)

    @staticmethod
    def load(artifact: "Artifact") -> "SAE":
        """Reads a `dictionaries` artifact, on the CPU in fp32. Raises UserError when its files are not a dictionary's."""
        from stagediff.sae.layout import CFG, WEIGHTS, from_bytes

        return from_bytes(artifact.read_bytes(CFG), artifact.read_bytes(WEIGHTS))


def resolved(config: DictionaryConfig, d: int) -> DictionaryConfig:
    """The config with every None replaced by its architecture's default (see DictionaryConfig) at input width d."""
    is_relu = config.architecture == "relu"
    has_k = config.architecture in ("topk", "batchtopk")
    defaults = {
        "decoder_norm": "free" if is_relu else "unit",
        "initial_norm": 0.1 if is_relu else 1.0,
        "subtract_b_dec": not is_relu,
        "auxk": d // 2 if has_k else 0,
    }
    return config.model_copy(update={name: value for name, value in defaults.items() if getattr(config, name) is None})
