"""How the cost of a training step grows with features and with tokens, over a sixteenfold range of each.

    python benchmarks/scale.py [--out docs/images/scale.png]

d 256, bf16. Sizes take turns, round by round, and the best of their steps counts. relu is the dense algebra (as an untrained dictionary takes it); topk is the
sparse one, k 32. Prints a table and, for each line, the exponent of the power law through it: 1 is linear. Memory: a few hundred MiB.
"""

import argparse
import io
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from stagediff.numerics import reuse_freed_memory
from stagediff.sae.dictionary import ARCHITECTURES
from stagediff.sae.initial import fresh
from stagediff.sae.spec import Budget, DictionaryConfig
from stagediff.sae.trainer import Trainer

D, ROUNDS = 256, 6
FEATURES, TOKENS = [1024, 2048, 4096, 8192, 16384], [512, 1024, 2048, 4096, 8192]
FIXED_FEATURES, FIXED_TOKENS = 4096, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="a PNG of the four lines")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    reuse_freed_memory()
    lines = {
        f"{name}, {what}": (sizes, measured(name, pairs))
        for name in ("relu", "topk")
        for what, sizes, pairs in (
            ("features", FEATURES, [(F, FIXED_TOKENS) for F in FEATURES]),
            ("tokens", TOKENS, [(FIXED_FEATURES, n) for n in TOKENS]),
        )
    }
    print("| | " + " | ".join(["x 1", "x 2", "x 4", "x 8", "x 16"]) + " | exponent |\n|---|---|---|---|---|---|---|")
    for name, (sizes, seconds) in lines.items():
        cells = " | ".join(f"{1e3 * s:,.1f}" for s in seconds)
        print(f"| {name} {sizes[0]:,} to {sizes[-1]:,}, ms | {cells} | {exponent(sizes, seconds):.2f} |")
    if given.out:
        Path(given.out).write_bytes(drawn(lines))


def measured(architecture: str, sizes: list[tuple[int, int]]) -> list[float]:
    """Seconds of the best step at each (features, tokens)."""
    trainers = [(trainer(architecture, F), batch(n)) for F, n in sizes]
    best = [math.inf] * len(sizes)
    for i in range(ROUNDS):
        for j, (t, x) in enumerate(trainers):
            start = time.perf_counter()
            t.train_on(x)
            if i:  # the first one compiles and allocates
                best[j] = min(best[j], time.perf_counter() - start)
    return best


def trainer(architecture: str, features: int) -> Trainer:
    kind = {"architecture": "topk", "k": 32} if architecture == "topk" else {"architecture": "relu"}
    sae = fresh(DictionaryConfig(features=features, **kind), 1.0, torch.zeros(D), seed=0)
    gradient = ARCHITECTURES["relu"].gradient if architecture == "relu" else None
    return Trainer(sae, Budget(tokens=1), 1000, True, torch.bfloat16, gradient=gradient)


def batch(n: int) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(1)).bfloat16()


def exponent(sizes: list[int], seconds: list[float]) -> float:
    x, y = torch.tensor(sizes).double().log(), torch.tensor(seconds).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def drawn(lines: dict[str, tuple[list[int], list[float]]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, (sizes, seconds) in lines.items():
        axes.loglog([s / sizes[0] for s in sizes], [1e3 * s for s in seconds], marker="o", label=name)
    low = min(s[0] for _, s in lines.values()) * 1e3
    axes.loglog([1, 16], [low, 16 * low], color="grey", linestyle=":", label="linear")
    axes.set_xlabel(
        f"times {FEATURES[0]:,} features (of {FIXED_TOKENS:,} tokens), or times {TOKENS[0]:,} tokens (on {FIXED_FEATURES:,} features)"
    )
    axes.set_ylabel("milliseconds per step")
    axes.legend()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


if __name__ == "__main__":
    main()
