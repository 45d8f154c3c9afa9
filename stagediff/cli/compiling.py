"""Sub-command compile: what numba would compile at first use, compiled now."""

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from stagediff import steps

__all__ = ["compile_"]

PARTS = {
    "kernels of sparse training": "stagediff.sae.sparse.first_use:compile_kernels",
    "UMAP": "stagediff.track.umap:compile_maps",
}


def compile_() -> None:
    """Compiles the kernels of sparse training and UMAP for this processor, so that no run has to. Once per machine: the result is kept on disk."""
    with ProcessPoolExecutor(len(PARTS), mp_context=get_context("spawn")) as pool:
        for name, seconds in zip(PARTS, pool.map(_timed, PARTS.values()), strict=True):
            print(f"{name}: {seconds:.0f} s")


def _timed(target: str) -> float:
    began = time.monotonic()
    steps.resolve(target)()
    return time.monotonic() - began
