"""Latent scaling: how much of a latent's finetuned direction either model really uses when the latent fires (Minder et al. 2025, "Overcoming sparsity
artifacts in crosscoders").

    beta_m = argmin_b sum_t ||b f_t d - y_t^m||^2 = d^T (Y_m^T f) / (||f||^2 ||d||^2),   nu = beta_base / beta_finetuned

with d the latent's finetuned decoder row and f [tokens] its activations. nu near 0: the base model does not use it; near 1: both do alike. Three targets Y:
the activations themselves less b_dec (`nu`), the reconstruction (`nu_reconstruction`), and what the other latents leave unexplained (`nu_error`: the error
with the latent's own part put back), which tells a latent that is missing in the base from one whose place others take there.
"""

import torch
from torch import Tensor

from stagediff.sae.dictionary import SAE

__all__ = ["TARGETS", "LatentScaling"]

TARGETS = ("nu", "nu_reconstruction", "nu_error")


class LatentScaling:
    """Sums over tokens for a crosscoder in scaled units; [F] numbers per target and model, nothing F x tokens that lasts."""

    def __init__(self, sae: SAE):
        """`sae`: reads [n, 2 d] scaled activations; on the device where the sums are taken."""
        self._sae, self._d = sae, sae.d // 2
        F, device = sae.features, sae.W_dec.device
        self.products = torch.zeros(len(TARGETS), 2, F, dtype=torch.float64, device=device)
        """sum_t f_t (d . y_t), target by model by latent."""
        self.squares = torch.zeros(F, dtype=torch.float64, device=device)
        """sum_t f_t^2."""

    @torch.no_grad()
    def add(self, x: Tensor, f: Tensor) -> None:
        """Tokens x [n, 2 d] in scaled units, and the latents' activations f [n, F] on them."""
        sae, d = self._sae, self._d
        direction = sae.W_dec[:, d:]
        self.squares += f.square().sum(0, dtype=torch.float64)
        explained = f @ sae.W_dec
        centred = x - sae.b_dec
        for model in range(2):
            half = slice(model * d, (model + 1) * d)
            for target, y in ((0, centred[:, half]), (1, explained[:, half])):
                self.products[target, model] += (f * (y @ direction.T)).sum(0, dtype=torch.float64)

    def ratios(self) -> dict[str, Tensor]:
        """TARGETS -> nu [F] float64, on the CPU; NaN where a latent never fired, has no finetuned direction, or beta_finetuned is not positive."""
        d = self._d
        W_dec = self._sae.W_dec.double()
        products = self.products.clone()
        for model in range(2):  # the error is activations less reconstruction; the latent's own part is f_t W_dec^m, put back
            own = (W_dec[:, model * d : (model + 1) * d] * W_dec[:, d:]).sum(1)
            products[2, model] = products[0, model] - products[1, model] + self.squares * own
        found = {}
        for target, name in enumerate(TARGETS):
            base, finetuned = products[target]  # ||f||^2 ||d||^2 cancels
            found[name] = torch.where(finetuned > 0, base / finetuned, torch.nan).cpu()
        return found

    def state(self) -> dict[str, Tensor]:
        return {"scaling_products": self.products.cpu(), "scaling_squares": self.squares.cpu()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.products.copy_(state["scaling_products"])
        self.squares.copy_(state["scaling_squares"])
