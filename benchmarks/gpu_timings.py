"""Timings of sparse training on a GPU (`gpu_train.py`): the whole step and its parts, beside this machine's product and copy and beside dense algebra."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_setup import BETAS, Planted, Section, engine, trained
from torch import Tensor

from stagediff.sae.sparse.engine import Engine
from stagediff.sae.sparse.kernels import Kernels
from stagediff.sae.sparse.reference import Reference


def timings(kernels: Kernels, device: torch.device, quick: bool) -> list[Section]:
    d, F, k, batches = (64, 1024, 16, (512,)) if quick else (1024, 32768, 32, (4096, 8192, 16384))
    limits: dict[str, float] = {}
    return [
        ("ceilings", lambda: ceilings(device, quick, limits)),
        *((f"batch {n}", lambda n=n: sparse_step(kernels, device, d, F, k, n, limits, quick)) for n in batches),  # type: ignore[misc]
        ("others", lambda: others(kernels, device, d, F, k, batches[len(batches) // 2], quick)),
        ("profile", lambda: profile(kernels, device, d, F, k, batches[len(batches) // 2])),
    ]


def milliseconds(work: Callable[[], object], device: torch.device, times: int = 20, warm: int = 3) -> float:
    """The median of one call, by the device's own clock."""
    for _ in range(warm):
        work()
    taken = []
    for _ in range(times):
        if device.type == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            work()
            events[1].record()
            events[1].synchronize()
            taken.append(events[0].elapsed_time(events[1]))
        else:
            begin = time.perf_counter()
            work()
            taken.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(taken)


def ceilings(device: torch.device, quick: bool, limits: dict[str, float]) -> Iterator[dict[str, Any]]:
    n = 512 if quick else 8192
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    limits["flops"] = 2 * n**3 / milliseconds(lambda: a @ b, device) * 1e3
    values = 1 << (20 if quick else 29)
    source, target = (torch.randn(values, device=device) for _ in range(2))
    limits["bytes"] = 8 * values / milliseconds(lambda: target.copy_(source), device) * 1e3
    yield {"ceiling": "bf16 matrix product", "tflops": round(limits["flops"] / 1e12, 1)}
    yield {"ceiling": "copy", "gb_per_second": round(limits["bytes"] / 1e9)}


def sparse_step(
    kernels: Kernels, device: torch.device, d: int, F: int, k: int, n: int, limits: dict[str, float], quick: bool
) -> Iterator[dict[str, Any]]:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    e, data = engine(d, F, k, torch.bfloat16, kernels, device), Planted(d, F // 2, k, device)
    trained(e, data, n, 10 if quick else 100)
    xs = [data.batch(n) for _ in range(4)]
    count = iter(range(1 << 30))

    def step() -> None:
        e.update(e.gradient(xs[next(count) % 4], 0.0, None), 1e-4, 0.0, {})

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    alone = milliseconds(step, device)
    host = time.perf_counter()
    for _ in range(20):
        step()
    host = time.perf_counter() - host
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        row = 100
        begin = time.perf_counter()
        for _ in range(row):
            step()
        torch.cuda.synchronize(device)
        in_a_row = (time.perf_counter() - begin) / row * 1e3
    else:
        in_a_row = alone
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    product = 2 * n * d * F / limits["flops"] * 1e3
    adam = (28 + 8 + 2 + 2) * 2 * d * F / limits["bytes"] * 1e3  # masters, moments; gradients written and read; copies written and read
    pre = 2 * 2 * n * F / limits["bytes"] * 1e3  # written and read
    yield {
        "timing": "sparse step",
        "d": d,
        "F": F,
        "k": k,
        "batch": n,
        "tokens_per_second": round(n / in_a_row * 1e3),
        "ms": round(in_a_row, 3),
        "ms_alone": round(alone, 3),
        "ms_host": round(host / 20 * 1e3, 3),
        "floor_ms": {"product": round(product, 3), "weights": round(adam, 3), "pre-activations": round(pre, 3)},
        "share_of_floor": round((product + adam + pre) / in_a_row, 3),
        "share_of_product": round(product / in_a_row, 3),
        "peak_gib": peak and round(peak, 2),
    }
    yield {"timing": "parts of it", "batch": n, "ms": parts(e, xs[0], k, device)}


def parts(e: Engine, x: Tensor, k: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of each part by itself."""
    w, ks, n = e.weights, e.kernels, len(x)
    W_enc, bias = w.copy_of("W_enc").t(), w.rows["b_enc"].bfloat16()
    inner = (x - w.rows["b_dec"]).bfloat16()
    outcome = e.gradient(x, 0.0, None)
    pairs = outcome.f
    decoded, by_feature = ks.decode(w, pairs, x), ks.by_feature(pairs, w.features)  # type: ignore[arg-type]
    pre = torch.addmm(bias, inner, W_enc)
    works: dict[str, Callable[[], object]] = {
        "input": lambda: (x - w.rows["b_dec"]).bfloat16(),
        "product": lambda: torch.addmm(bias, inner, W_enc, out=pre),
        "largest": lambda: ks.largest(pre, k),
        "decode": lambda: ks.decode(w, pairs, x),  # type: ignore[arg-type]
        "sort": lambda: ks.by_feature(pairs, w.features),  # type: ignore[arg-type]
        "gradients": lambda: ks.gradients(w, pairs, by_feature, decoded, inner, None, True),  # type: ignore[arg-type]
        "b_dec": lambda: decoded.error.sum(0) - outcome.gradients["b_enc"] @ w.rows["W_enc"],
        "gradient, all": lambda: e.gradient(x, 0.0, None),
        "update": lambda: e.update(outcome, 1e-6, 0.0, {}),
    }
    if device.type == "cuda":
        from stagediff.sae.sparse import gpu_select

        works["largest: maxima of groups"] = lambda: gpu_select.group_maxima(pre, gpu_select.group_size(w.features, k))
    counts = by_feature.start.diff()
    found = {name: round(milliseconds(work, device), 3) for name, work in works.items()}
    return found | {"pairs of the hottest feature": float(counts.max()), "features that fire": float((counts > 0).sum()), "n": float(n)}


def others(kernels: Kernels, device: torch.device, d: int, F: int, k: int, n: int, quick: bool) -> Iterator[dict[str, Any]]:
    """batchtopk, AuxK over a fifth of the features, fp32, the plain torch kernels, and the dense algebra."""
    data = Planted(d, F // 2, k, device)
    xs = [data.batch(n) for _ in range(2)]
    dead = torch.arange(0, F, 5, device=device)
    cases: list[tuple[str, Kernels, str, torch.dtype, int]] = [
        ("batchtopk", kernels, "batchtopk", torch.bfloat16, 0),
        ("topk with AuxK, a fifth dead", kernels, "topk", torch.bfloat16, d // 2),
        ("topk, fp32", kernels, "topk", torch.float32, 0),
        ("topk, plain torch", Reference(), "topk", torch.bfloat16, 0),
    ]
    for name, ks, architecture, compute, auxk in cases:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        e = engine(d, F, k, compute, ks, device, architecture, auxk)
        taken = milliseconds(lambda e=e, auxk=auxk: e.update(e.gradient(xs[0], 0.0, dead if auxk else None), 1e-4, 0.0, {}), device, 5)  # type: ignore[misc]
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
        yield {"timing": name, "batch": n, "tokens_per_second": round(n / taken * 1e3), "ms": round(taken, 2), "peak_gib": round(peak, 2)}
        del e
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    step = dense_step(d, F, k, device)
    taken = milliseconds(lambda: step(xs[0]), device, 5)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    yield {
        "timing": "dense algebra, torch",
        "batch": n,
        "tokens_per_second": round(n / taken * 1e3),
        "ms": round(taken, 2),
        "peak_gib": round(peak, 2),
    }


def dense_step(d: int, F: int, k: int, device: torch.device) -> Callable[[Tensor], None]:
    """TopK as it is without sparse kernels: torch.topk, five dense products in bf16, torch's fused Adam."""
    W_dec = torch.nn.functional.normalize(torch.randn(F, d, device=device), dim=1)
    p = {"W_enc": W_dec.t().contiguous(), "b_enc": torch.zeros(F, device=device), "W_dec": W_dec, "b_dec": torch.zeros(d, device=device)}
    adam = torch.optim.Adam(list(p.values()), lr=1e-4, betas=BETAS, fused=True)

    def step(x: Tensor) -> None:
        n, t = len(x), torch.bfloat16
        inner, W_enc, W_dec = (x - p["b_dec"]).to(t), p["W_enc"].to(t), p["W_dec"].to(t)
        values, indices = torch.addmm(p["b_enc"].to(t), inner, W_enc).topk(k, sorted=False)
        f = torch.zeros(n, F, dtype=t, device=device).scatter_(1, indices, values.relu_())
        error = torch.mm(f, W_dec).float() + p["b_dec"] - x
        scaled = (error * (2 / n)).to(t)
        g_W_dec = torch.mm(f.t(), scaled).float()
        g_pre = torch.mm(scaled, W_dec.t())
        g_pre = torch.ops.aten.threshold_backward.grad_input(g_pre, f, 0, grad_input=g_pre)
        b_enc = torch.mm(g_pre.new_ones(1, n), g_pre)[0].float()
        g_W_dec -= (g_W_dec * p["W_dec"]).sum(1, keepdim=True) * p["W_dec"]
        p["W_enc"].grad, p["b_enc"].grad, p["W_dec"].grad = torch.mm(inner.t(), g_pre).float(), b_enc, g_W_dec
        p["b_dec"].grad = error.sum(0) * (2 / n) - p["W_enc"] @ b_enc
        torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
        adam.step()
        p["W_dec"] /= p["W_dec"].norm(dim=1, keepdim=True)

    return torch.no_grad()(step)


def profile(kernels: Kernels, device: torch.device, d: int, F: int, k: int, n: int) -> Iterator[dict[str, Any]]:
    """Which kernels a step consists of, with their mean time."""
    if device.type != "cuda":
        return
    x, dead = Planted(d, F // 2, k, device).batch(n), torch.arange(0, F, 5, device=device)
    for name, architecture, auxk in (("topk", "topk", 0), ("batchtopk", "batchtopk", 0), ("AuxK, a fifth dead", "topk", d // 2)):
        e = engine(d, F, k, torch.bfloat16, kernels, device, architecture, auxk)

        def step(e: Engine = e, auxk: int = auxk) -> None:
            e.update(e.gradient(x, 0.0, dead if auxk else None), 1e-4, 0.0, {})

        for _ in range(3):
            step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            for _ in range(5):
                step()
            torch.cuda.synchronize(device)
        events = sorted(trace.key_averages(), key=lambda event: -event.device_time_total)
        for event in events[:24]:
            yield {
                "of": name,
                "kernel": event.key[:90],
                "us_per_step": round(event.device_time_total / 5, 1),
                "calls_per_step": event.count / 5,
            }
