"""Prints how far each package's reconstruction from our files is from ours, as `made.apart` measures it (needs the extra `peers`).

    python tests/sae/formats/distances.py

The worst over b_dec subtracted or not, decoder norms unit or free, and two input scales; 200 tokens each.
"""

import tempfile
from itertools import product
from pathlib import Path

from made import apart, dictionary, inputs, put, reconstructed
from test_peers import CASES, forward

from stagediff.sae.formats import export
from stagediff.store import Store


def worst(to: str, architecture: str) -> float:
    """Largest relative distance of a token's two reconstructions."""
    found = []
    for subtract, norm, scale in product((True, False), ("unit", "free"), (0.037, 7.3)):
        sae, x = dictionary(architecture, scale=scale, subtract_b_dec=subtract, decoder_norm=norm), inputs() * (0.037 / scale)
        with tempfile.TemporaryDirectory() as folder:
            out = export(put(Store(f"{folder}/store"), sae), Path(folder) / "out", to=to)
            found.append(apart(forward(to, out, x), reconstructed(sae, x)))
    return max(found)


if __name__ == "__main__":
    for case in CASES:
        print(*case, f"{worst(*case):.1e}", sep="\t")
