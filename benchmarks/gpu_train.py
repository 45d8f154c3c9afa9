"""Sparse training on one GPU: every Triton kernel checked against plain torch, then timed, in one call of less than three minutes.

    python benchmarks/gpu_train.py [--quick]

Needs the repository, PyTorch and Triton. Checks: selection (ties, rows with too few positive values), gradients, the update, a training curve of
500 steps, the same bytes twice and after a resume, no wait for the device within a step. Timings at d 1,024, F 32,768, k 32: tokens per second of
the whole step, milliseconds of each part, beside the matrix product and the copy that this machine reaches in the same run, the dense algebra in
torch, and peak memory. Prints one line of JSON per result; what fails prints its traceback and the rest goes on; exits with 1 when a check failed.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stagediff.sae.sparse.engine import Engine
from stagediff.sae.sparse.kernels import Kernels
from stagediff.sae.sparse.reference import Reference

BETAS = (0.9, 0.999)
failures = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu: tries the script itself, with whatever kernels a CPU has")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", choices=["checks", "timings"], help="half of it")
    given = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    device, begin = torch.device(given.device), time.perf_counter()
    say({"machine": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "torch": torch.__version__})
    kernels = kernels_for(device)
    sections = []
    if given.only != "timings":
        sections += checks(kernels, device, given.quick)
    if given.only != "checks":
        sections += timings(kernels, device, given.quick)
    for name, section in sections:
        begun = time.perf_counter()
        guarded(name, section)
        print(f"# {name}: {time.perf_counter() - begun:.1f} s", flush=True)
    print(f"# {time.perf_counter() - begin:.0f} s, {failures} failed", flush=True)
    sys.exit(1 if failures else 0)


def kernels_for(device: torch.device) -> Kernels:
    if device.type == "cuda":
        from stagediff.sae.sparse.gpu import TritonKernels

        return TritonKernels(device)
    return Reference()


def say(result: dict[str, Any]) -> None:
    print(json.dumps(result), flush=True)


def guarded(name: str, section: Callable[[], Iterator[dict[str, Any]]]) -> None:
    """Runs a section; a failure is told and counted, and ends this section alone."""
    global failures
    try:
        for result in section():
            failures += result.get("passed") is False
            say(result)
    except Exception:
        failures += 1
        say({"check": name, "passed": False, "raised": True})
        traceback.print_exc(file=sys.stdout)


def config_of(architecture: str, k: int, auxk: int = 0) -> Any:
    return SimpleNamespace(
        architecture=architecture, k=k, subtract_b_dec=True, decoder_norm="unit", auxk=auxk, auxk_weight=1 / 32, dead_after=10_000_000
    )


def engine(
    d: int, F: int, k: int, compute: torch.dtype, kernels: Kernels, device: torch.device, architecture: str = "topk", auxk: int = 0
) -> Engine:
    """A dictionary at its start: random unit rows, tied."""
    g = torch.Generator(device=device).manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(F, d, generator=g, device=device), dim=1)
    parameters = {
        "W_enc": W_dec.t().clone(),
        "b_enc": torch.zeros(F, device=device),
        "W_dec": W_dec,
        "b_dec": torch.zeros(d, device=device),
    }
    return Engine(parameters, config_of(architecture, k, auxk), SimpleNamespace(betas=BETAS, clip=1.0), compute, kernels)  # type: ignore[arg-type]


class Planted:
    """Activations [n, d] of norm about sqrt(d): sums of some of `features` directions with Zipf's frequencies, and a mean."""

    def __init__(self, d: int, features: int, active: int, device: torch.device, seed: int = 1):
        self._g = torch.Generator(device=device).manual_seed(seed)
        self._directions = torch.nn.functional.normalize(torch.randn(features, d, generator=self._g, device=device), dim=1)
        self._shares = torch.arange(1, features + 1, device=device).float().pow(-0.6)
        self._mean = 0.5 * torch.randn(d, generator=self._g, device=device) / d**0.5
        self._active, self._scale = active, (d / active) ** 0.5 / 1.6

    def batch(self, n: int) -> Tensor:
        index = torch.multinomial(self._shares, n * self._active, replacement=True, generator=self._g).view(n, self._active)
        weight = 0.5 + torch.randn(n, self._active, generator=self._g, device=index.device).abs()
        x = torch.nn.functional.embedding_bag(index, self._directions, per_sample_weights=weight, mode="sum")
        return (x + self._mean + 0.1 * torch.randn(x.shape, generator=self._g, device=index.device) / x.shape[1] ** 0.5) * self._scale


def checks(kernels: Kernels, device: torch.device, quick: bool) -> list[tuple[str, Callable[[], Iterator[dict[str, Any]]]]]:
    return [
        ("selection", lambda: selection(kernels, device, quick)),
        ("selection over the batch", lambda: selection_of_all(kernels, device, quick)),
        ("gradients and update", lambda: one_step(kernels, device, quick)),
        ("curve", lambda: curve(kernels, device, quick)),
        ("same bytes", lambda: same_bytes(kernels, device, quick)),
        ("no wait", lambda: no_wait(kernels, device)),
        ("trainer", lambda: trainer(kernels, device)),
    ]


def awkward(n: int, F: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Pre-activations with ties everywhere, one row that ties altogether, and rows with few or no positive values."""
    g = torch.Generator(device=device).manual_seed(F)
    pre = torch.randn(n, F, generator=g, device=device).to(dtype)
    pre[0] = 1.0
    pre[1] = -1.0
    pre[2] = -1.0
    pre[2, 5] = 0.5
    pre[3] = (pre[3] * 2).round() / 2
    pre[4, : F // 2] = float(pre[4].float().topk(3).values[-1])
    return pre


def sorted_rows(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    order = found[0].argsort(1)
    return found[0].gather(1, order), found[1].gather(1, order)


def selection(kernels: Kernels, device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    sizes = (
        [(64, 1024, 16), (33, 1000, 7)]
        if quick
        else [(512, 32768, 32), (256, 24576, 100), (128, 1000, 7), (64, 3000, 512), (16, 262144, 64)]
    )
    for dtype in (torch.bfloat16, torch.float32):
        for n, F, k in sizes:
            pre = awkward(n, F, dtype, device)
            here, there = (sorted_rows(ks.largest(pre, k)) for ks in (kernels, Reference()))
            passed = all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
            exact = torch.equal(here[1].sort(1, descending=True).values, pre.float().relu().topk(k).values)
            yield {"check": "k largest", "n": n, "F": F, "k": k, "dtype": str(dtype), "passed": passed and exact}


def selection_of_all(kernels: Kernels, device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    for n, F, k in [(64, 1024, 16)] if quick else [(512, 32768, 32), (300, 1000, 7)]:
        pre = awkward(n, F, torch.bfloat16, device)
        here, there = (ks.largest_of_all(pre, n * k) for ks in (kernels, Reference()))
        passed = all(torch.equal(a, b) for a, b in zip(here[0], there[0], strict=True)) and torch.equal(here[1], there[1])
        exact = torch.equal(here[0].value.sort(descending=True).values, pre.float().relu().flatten().topk(n * k).values)
        yield {"check": "k B largest", "n": n, "F": F, "k": k, "passed": passed and exact}


def relative(here: Tensor, there: Tensor) -> float:
    return float((here - there).double().norm() / there.double().norm().clamp_min(1e-30))


def one_step(kernels: Kernels, device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Gradients on a batch with features that fire on most tokens, and the weights that they lead to."""
    sizes = [(64, 512, 8, 256)] if quick else [(1024, 32768, 32, 4096), (768, 24576, 100, 1024), (100, 1000, 7, 500)]
    for d, F, k, n in sizes:
        for architecture in ("topk", "batchtopk"):
            for compute in (torch.float32, torch.bfloat16):
                for auxk in (0, 32):
                    found = []
                    for ks in (kernels, Reference()):
                        e = engine(d, F, k, compute, ks, device, architecture, auxk)
                        dead = torch.arange(0, F, 3, device=device) if auxk else None
                        x = Planted(d, F // 2, 16, device).batch(n)
                        x[:, 0] += d**0.5
                        outcome = e.gradient(x, 0.0, dead)
                        home = {name: value.clone() for name, value in e.parameters.items()}
                        e.update(outcome, 1e-3, 0.01, home)
                        found.append((outcome, e))
                    (mine, a), (theirs, b) = found
                    errors = {f"gradient {name}": relative(mine.gradients[name], theirs.gradients[name]) for name in a.parameters}
                    errors |= {f"first moment {name}": relative(a.weights.first[name], b.weights.first[name]) for name in a.weights.rows}
                    errors |= {name: relative(a.parameters[name], b.parameters[name]) for name in ("W_enc", "W_dec")}
                    errors["loss"] = relative(mine.loss, theirs.loss)
                    total = sum(float(g.double().square().sum()) for g in mine.gradients.values())
                    errors["norm"] = abs(total - float(mine.squares)) / total  # type: ignore[arg-type]
                    rounded = all(torch.equal(a.weights.copy_of(name), a.weights.rows[name].to(compute)) for name in ("W_enc", "W_dec"))
                    worst = max(errors, key=lambda name: errors[name])
                    hottest = int(torch.bincount(mine.f.feature[mine.f.value > 0]).max())  # type: ignore[union-attr]
                    yield {
                        "check": "one step",
                        "d": d,
                        "F": F,
                        "k": k,
                        "n": n,
                        "architecture": architecture,
                        "compute": str(compute),
                        "auxk": auxk,
                        "worst": worst,
                        "error": errors[worst],
                        "hottest": hottest,
                        "copies_rounded": rounded,
                        "passed": errors[worst] < (1e-4 if compute == torch.float32 else 2e-2) and rounded,
                    }


def trained(e: Engine, data: Planted, n: int, steps: int, lr: float = 1e-3) -> Tensor:
    """Trains; the error of each step as a share of the batch's variance [steps]."""
    shares = []
    for step in range(steps):
        x = data.batch(n)
        outcome = e.gradient(x, 0.0, None)
        e.update(outcome, lr * min(1.0, (step + 1) / 50), 0.0, {})
        shares.append(outcome.error / ((x - x.mean(0)).square().sum() / n))
    return torch.stack(shares)


def curve(kernels: Kernels, device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    d, F, k, n, steps = (32, 256, 8, 256, 60) if quick else (256, 4096, 32, 2048, 500)
    for compute in (torch.float32, torch.bfloat16):
        curves = [trained(engine(d, F, k, compute, ks, device), Planted(d, F, 32, device), n, steps) for ks in (kernels, Reference())]
        here, there = (c[-steps // 10 :].mean() for c in curves)
        apart = float(((curves[0] - curves[1]).abs() / curves[1]).max())
        yield {
            "check": f"curve of {steps} steps",
            "compute": str(compute),
            "fvu": float(here),
            "fvu_reference": float(there),
            "largest_difference": apart,
            "passed": bool((here / there - 1).abs() < 0.01) and apart < 0.05,
        }


def same_bytes(kernels: Kernels, device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    d, F, k, n = (32, 256, 8, 256) if quick else (1024, 32768, 32, 4096)
    for architecture in ("topk", "batchtopk"):
        runs = []
        for resumed in (False, False, True):
            e, data = engine(d, F, k, torch.bfloat16, kernels, device, architecture), Planted(d, F // 2, 32, device)
            trained(e, data, n, 10)
            if resumed:
                state = {name: value.clone() for name, value in (e.state() | e.parameters).items()}
                e = engine(d, F, k, torch.bfloat16, kernels, device, architecture)
                for name, value in e.parameters.items():
                    value.copy_(state[name])
                e.restore(state)
            trained(e, data, n, 10)
            runs.append(e)
        for name, other in (("twice", runs[1]), ("resumed", runs[2])):
            same = all(torch.equal(value, other.parameters[key]) for key, value in runs[0].parameters.items())
            same &= all(torch.equal(value, other.state()[key]) for key, value in runs[0].state().items())
            yield {"check": f"same bytes, {name}", "architecture": architecture, "passed": same}


def no_wait(kernels: Kernels, device: torch.device) -> Iterator[dict[str, Any]]:
    if device.type != "cuda":
        return
    for architecture in ("topk", "batchtopk"):
        e, data = engine(128, 2048, 16, torch.bfloat16, kernels, device, architecture, 32), Planted(128, 1024, 16, device)
        x, dead = data.batch(512), torch.arange(0, 2048, 5, device=device)
        e.update(e.gradient(x, 0.0, dead), 1e-3, 0.0, {})
        torch.cuda.set_sync_debug_mode("error")
        try:
            e.update(e.gradient(x, 0.0, dead), 1e-3, 0.0, {})
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield {"check": "no wait for the device", "architecture": architecture, "passed": True}


def trainer(kernels: Kernels, device: torch.device) -> Iterator[dict[str, Any]]:
    """The whole trainer, where its needs (pydantic) are there."""
    try:
        from stagediff.sae.initial import fresh
        from stagediff.sae.spec import Budget, DictionaryConfig
        from stagediff.sae.trainer import Trainer
    except ImportError as error:
        yield {"check": "trainer", "skipped": str(error)}
        return
    for architecture in ("topk", "batchtopk"):
        data = Planted(64, 256, 8, device)
        config = DictionaryConfig(architecture=architecture, features=256, k=8, auxk=16, dead_after=2048)  # type: ignore[arg-type]
        sae = fresh(config, 1.0, torch.zeros(64), 0).to(device)
        t = Trainer(sae, Budget(tokens=300 * 512, batch=512, lr=2e-3), 300, True, torch.bfloat16)
        losses = [t.train_on(data.batch(512)).loss for _ in range(300)]
        found = t._engine.kernels.name  # type: ignore[union-attr]
        yield {
            "check": "trainer",
            "kernels": found,
            "first": float(losses[0]),
            "last": float(losses[-1]),
            "passed": bool(losses[-1] < losses[0]),
        }


def timings(kernels: Kernels, device: torch.device, quick: bool) -> list[tuple[str, Callable[[], Iterator[dict[str, Any]]]]]:
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


if __name__ == "__main__":
    with torch.no_grad():
        main()
