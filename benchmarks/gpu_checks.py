"""Checks of sparse training on a GPU (`gpu_train.py`): every kernel against plain torch, the same bytes twice, no wait within a step."""

from collections.abc import Iterator
from typing import Any

import torch
from gpu_setup import Planted, Section, engine, trained
from torch import Tensor

from stagediff.sae.sparse.kernels import Kernels
from stagediff.sae.sparse.reference import Reference


def checks(kernels: Kernels, device: torch.device, quick: bool) -> list[Section]:
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
