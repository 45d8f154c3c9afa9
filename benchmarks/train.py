"""Speed of dictionary training on this machine, beside the floor of its bare matrix products.

    python benchmarks/train.py --threads 2                       # relu, d 128, F 1,024, batch 2,048, bf16
    python benchmarks/train.py --architecture topk --threads 2

Prints one line of JSON: tokens per second of the median and the best step (on a busy machine only the best means much), of the five matrix
products that no dense step can do without, and the share of the machine's limit that the training reaches. Data are in memory; nothing is read.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch

from stagediff.sae.initial import fresh
from stagediff.sae.spec import Budget, DictionaryConfig
from stagediff.sae.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="relu", choices=["relu", "topk", "batchtopk", "jumprelu"])
    parser.add_argument("--d", type=int, default=128)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compute", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    dtype = torch.bfloat16 if a.compute == "bf16" else torch.float32
    config = DictionaryConfig(architecture=a.architecture, features=a.features, k=a.k)
    sae = fresh(config, 1.0, torch.zeros(a.d), seed=0).to(a.device)
    trainer = Trainer(sae, Budget(tokens=a.steps * a.batch, batch=a.batch), a.steps, True, dtype)
    generator = torch.Generator().manual_seed(1)  # not the start's seed: the start would be the answer
    data = [torch.randn(a.batch, a.d, generator=generator).bfloat16().to(a.device) for _ in range(8)]
    step = seconds(lambda i: trainer.train_on(data[i % 8]), a.steps, a.device)
    floor = seconds(products(a.batch, a.d, a.features, dtype, a.device), a.steps, a.device)
    print(
        json.dumps(
            {
                **vars(a),
                "tokens_per_second": round(a.batch / statistics.median(step)),
                "best": round(a.batch / min(step)),
                "products_alone": round(a.batch / statistics.median(floor)),
                "products_alone_best": round(a.batch / min(floor)),
                "share_of_limit": round(min(floor) / min(step), 3),
                "load": round(os.getloadavg()[0], 2),
            }
        )
    )


def seconds(work: Callable[[int], object], times: int, device: str) -> list[float]:
    """Seconds of each call after a tenth of warm-up calls."""
    taken = []
    for i in range(-max(3, times // 10), times):
        begin = time.perf_counter()
        work(i)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        if i >= 0:
            taken.append(time.perf_counter() - begin)
    return taken


def products(n: int, d: int, features: int, dtype: torch.dtype, device: str) -> Callable[[int], object]:
    """The five matrix products of a dense step: encode, decode, and three for the gradients."""
    x, f = torch.randn(n, d).to(device, dtype), torch.randn(n, features).to(device, dtype)
    W_enc, W_dec = torch.randn(d, features).to(device, dtype), torch.randn(features, d).to(device, dtype)
    return lambda i: (x @ W_enc, f @ W_dec, f.t() @ x, x @ W_dec.t(), x.t() @ f)


if __name__ == "__main__":
    main()
