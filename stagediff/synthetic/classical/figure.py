"""The denoised pictures side by side, and under each the atoms that it was made of. The same pictures give the same bytes."""

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from stagediff.diff.section.static import INK, rendered
from stagediff.synthetic.classical.denoise import Picture
from stagediff.synthetic.classical.photograph import PATCH, psnr

__all__ = ["NAMES", "figure_png", "mosaic"]

NAMES = {"cosines": "cosines (fixed)", "ksvd": "K-SVD", "online": "online learning", "topk": "TopK SAE", "batchtopk": "BatchTopK SAE"}


def figure_png(picture: Picture) -> bytes:
    """A PNG: the photograph, with noise, and denoised by every method; the atoms below."""
    return rendered(lambda: _figure(picture), "denoise")["denoise.png"]


def mosaic(atoms: Tensor, side: int = 16) -> Tensor:
    """The first side^2 atoms [F, PATCH^2] as one picture, each stretched to [0, 1], white lines between them."""
    out = torch.ones(side * (PATCH + 1) + 1, side * (PATCH + 1) + 1)
    for i, atom in enumerate(atoms[: side * side]):
        low, high = atom.min(), atom.max()
        top, left = (1 + (PATCH + 1) * at for at in divmod(i, side))
        out[top : top + PATCH, left : left + PATCH] = ((atom - low) / (high - low).clamp_min(1e-12)).reshape(PATCH, PATCH)
    return out


def _figure(picture: Picture) -> Figure:
    figure = Figure(figsize=(1.65 * (2 + len(picture.best)), 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2 + len(picture.best), height_ratios=(2, 3), squeeze=False)
    shown = {"photograph": picture.clean, "with noise": picture.noisy, **picture.best}
    for column, (name, image) in enumerate(shown.items()):
        upper, lower = axes[:, column]
        said = "" if name == "photograph" else f", {psnr(image, picture.clean):.2f} dB"
        upper.imshow(image, cmap="gray", vmin=0, vmax=1)
        upper.set_title(NAMES.get(name, name) + said, color=INK, fontsize=7)
        if name in picture.atoms:
            lower.imshow(mosaic(picture.atoms[name]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        upper.axis("off")
        lower.axis("off")
    return figure
