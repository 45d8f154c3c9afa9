"""Speed of dictionary training on this machine, beside the floor of what it cannot do without.

    python benchmarks/train.py --threads 2                                # relu, d 128, F 1,024, batch 2,048, bf16
    python benchmarks/train.py --architecture topk --case A --threads 2   # d 512, F 16,384, k 32, batch 4,096; B: d 128, F 1,024, k 16, batch 2,048
    python benchmarks/train.py --case C --threads 2                       # relu at the shape of A
    python benchmarks/train.py --case C --active 64                       # the same, where 64 features are active per token
    python benchmarks/train.py --architecture topk --case B --threads 1 --parts       # milliseconds of processor time in each part of a step

Prints one line of JSON: tokens per second of the median and the best step (on a busy machine only the best means much), of the floor, and the
share of the floor that the training reaches. Every set of kernels that works here takes turns, step by step, and the dense algebra in torch beside them
(batchtopk has none). The floor is the encoder's product and a copy of as many bytes as Adam reads and writes; of relu and jumprelu, which begin dense, the five
matrix products of a dense step, but with --active. Data are in memory; nothing is read. On a busy machine `--threads 1 --processor-time` counts the
seconds that this process computed.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_timings import dense_step
from torch import Tensor

from stagediff.numerics import reuse_freed_memory
from stagediff.sae.dictionary import ARCHITECTURES
from stagediff.sae.initial import fresh
from stagediff.sae.sparse.kernels import Kernels, choose
from stagediff.sae.sparse.reference import Reference
from stagediff.sae.spec import Budget, DictionaryConfig
from stagediff.sae.trainer import Trainer

CASES = {
    "A": {"d": 512, "features": 16384, "k": 32, "batch": 4096},
    "B": {"d": 128, "features": 1024, "k": 16, "batch": 2048},
    "C": {"d": 512, "features": 16384, "batch": 4096},
}
BYTES_PER_WEIGHT = 28
"""Adam in fp32: weight, two moments and gradient read, the first three written."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="relu", choices=["relu", "topk", "batchtopk", "jumprelu"])
    parser.add_argument("--case", choices=list(CASES), help="sets d, features, k and batch")
    parser.add_argument("--d", type=int, default=128)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument(
        "--active", type=int, help="relu, jumprelu: about so many features per token, instead of an untrained dictionary's half"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compute", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processor-time", action="store_true", help="of all threads, so with --threads 1")
    parser.add_argument("--parts", action="store_true", help="topk, batchtopk: what a step's parts take, in place of its speed")
    a = parser.parse_args()
    vars(a).update(CASES.get(a.case, {}))
    torch.set_num_threads(a.threads)
    reuse_freed_memory()  # as the command does
    dtype = torch.bfloat16 if a.compute == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(1)  # not the start's seed: the start would be the answer
    data = [torch.randn(a.batch, a.d, generator=generator).bfloat16().to(a.device) for _ in range(8)]
    has_k = a.architecture in ("topk", "batchtopk")
    if a.parts:
        print(json.dumps({**vars(a), "milliseconds": parts(a, dtype, data)}))
        return
    is_sparse = has_k or a.active is not None
    if has_k:
        works = {name: stepping(a, dtype, kernels, data) for name, kernels in kernels_here(a.device, dtype).items()}
    else:
        works = {"pairs": stepping(a, dtype, None, data)} if a.active else {}
        works["dense"] = stepping(a, dtype, None, data, gradient=ARCHITECTURES[a.architecture].gradient)
    if a.architecture == "topk" and dtype == torch.bfloat16:
        dense = dense_step(a.d, a.features, a.k, torch.device(a.device))
        works["dense"] = lambda i: dense(data[i % len(data)].float())
    floor = sparse_floor(a.batch, a.d, a.features, dtype, a.device) if is_sparse else products(a.batch, a.d, a.features, dtype, a.device)
    *taken, bound = alternating([*works.values(), floor], a.steps, a.device, time.process_time if a.processor_time else time.perf_counter)
    found = {name: speeds(a.batch, times, min(bound)) for name, times in zip(works, taken, strict=True)}
    print(
        json.dumps(
            {
                **vars(a),
                "kernels": found,
                "floor": round(a.batch / statistics.median(bound)),
                "floor_best": round(a.batch / min(bound)),
                "load": round(os.getloadavg()[0], 2),
            }
        )
    )


def parts(a: argparse.Namespace, dtype: torch.dtype, data: list[Tensor]) -> dict[str, float]:
    """Median processor time of a whole step, of its product, and of each kernel, in milliseconds."""
    kernels = choose(torch.device(a.device), dtype)
    taken: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            begin = time.process_time()
            result = work(*args, **options)
            taken.setdefault(name, []).append(time.process_time() - begin)
            return result

        return run

    for name in ("largest", "largest_of_all", "decode", "by_feature", "gradients", "update"):
        setattr(kernels, name, timed(name, getattr(kernels, name)))
    torch.addmm = timed("product", torch.addmm)
    step = timed("step", stepping(a, dtype, kernels, data))
    for i in range(a.steps):
        step(i)
    return {name: round(1e3 * statistics.median(times), 2) for name, times in taken.items()}


def kernels_here(device: str, dtype: torch.dtype) -> dict[str, Kernels]:
    """By name: what `choose` takes here, and plain torch."""
    return {kernels.name: kernels for kernels in (choose(torch.device(device), dtype), Reference())}


def stepping(
    a: argparse.Namespace, dtype: torch.dtype, kernels: Kernels | None, data: list[Tensor], **more: Any
) -> Callable[[int], object]:
    """Steps of a training that begins anew."""
    sae = fresh(DictionaryConfig(architecture=a.architecture, features=a.features, k=a.k), 1.0, torch.zeros(a.d), seed=0).to(a.device)
    lr = 4e-4
    if a.active:
        pre = data[0][:256].float() @ sae.W_enc + sae.b_enc
        sae.b_enc -= pre.flatten().kthvalue(pre.numel() - 256 * a.active).values - (0 if sae.threshold is None else sae.threshold)
        lr = 1e-9  # so that it stays like that
    trainer = Trainer(sae, Budget(tokens=a.steps * a.batch, batch=a.batch, lr=lr), a.steps, True, dtype, kernels=kernels, **more)
    return lambda i: trainer.train_on(data[i % len(data)])


def speeds(batch: int, taken: list[float], floor: float) -> dict[str, float]:
    return {
        "tokens_per_second": round(batch / statistics.median(taken)),
        "best": round(batch / min(taken)),
        "share_of_floor": round(floor / min(taken), 3),
    }


def seconds(work: Callable[[int], object], times: int, device: str) -> list[float]:
    """Seconds of each call after a tenth of warm-up calls."""
    return alternating([work], times, device)[0]


def alternating(
    works: list[Callable[[int], object]], times: int, device: str, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Seconds of each call of each work, one call of each in turn, after a tenth of warm-up calls."""
    taken: list[list[float]] = [[] for _ in works]
    for i in range(-max(3, times // 10), times):
        for work, times_of_work in zip(works, taken, strict=True):
            begin = clock()
            work(i)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if i >= 0:
                times_of_work.append(clock() - begin)
    return taken


def products(n: int, d: int, features: int, dtype: torch.dtype, device: str) -> Callable[[int], object]:
    """The five matrix products of a dense step: encode, decode, and three for the gradients."""
    x, f = torch.randn(n, d).to(device, dtype), torch.randn(n, features).to(device, dtype)
    W_enc, W_dec = torch.randn(d, features).to(device, dtype), torch.randn(features, d).to(device, dtype)
    return lambda i: (x @ W_enc, f @ W_dec, f.t() @ x, x @ W_dec.t(), x.t() @ f)


def sparse_floor(n: int, d: int, features: int, dtype: torch.dtype, device: str) -> Callable[[int], object]:
    """What a sparse step cannot do without: the encoder's product, and Adam's traffic, as a copy of half as many bytes (each is read and written)."""
    x, W_enc = torch.randn(n, d).to(device, dtype), torch.randn(features, d).to(device, dtype)
    out = torch.empty(n, features, dtype=dtype, device=device)
    source = torch.ones(2 * d * features * BYTES_PER_WEIGHT // 8, device=device)
    target = torch.empty_like(source)
    return lambda i: (torch.mm(x, W_enc.t(), out=out), target.copy_(source))


if __name__ == "__main__":
    main()
