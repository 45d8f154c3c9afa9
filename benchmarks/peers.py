"""Training speed beside the peers' own packages: the same activations, the same start, the same number of tokens.

    python benchmarks/peers.py --case A --peers-python PATH/TO/ENV/bin/python       # interleaved, a process per contestant and round
    python benchmarks/peers.py --case A --one sparsify:bf16                         # one contestant, in this process

The peers want an environment of their own: `python -m venv ENV && ENV/bin/pip install sae-lens dictionary-learning eai-sparsify`, with this machine's
torch. Activations are sparse mixtures of more directions than the dictionary has features, with Zipf frequencies and noise, of mean norm sqrt(d); decoder and
encoder start tied at the same random unit rows, b_dec at the data's mean. One line of JSON per run: tokens per second of the median step, FVU on held-out
activations after all steps, and the memory used beyond data, imports and loaded kernels (GPU: peak allocated). stagediff:free is bf16 with free decoder
norms, as SAELens has them; the others' rows have norm 1. With --peers-python at the end a table of medians over the
rounds. A contestant that fails says so and the others go on. On a busy machine `--threads 1 --processor-time` counts the seconds that each computed.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from contestants import PREPARE, Clock, Evaluate
from torch import Tensor

CASES: dict[str, dict[str, Any]] = {
    "A": {"d": 512, "features": 16384, "k": 32, "batch": 4096},
    "B": {"d": 128, "features": 1024, "k": 16, "batch": 2048},
    "C": {"d": 512, "features": 16384, "k": None, "batch": 4096},
    "C64": {"d": 512, "features": 16384, "k": None, "batch": 4096, "active": 64, "lr": 1e-5},
    "gpu": {"d": 1024, "features": 32768, "k": 32, "batch": 8192},
    "tiny": {"d": 32, "features": 128, "k": 4, "batch": 64},
}
"""k None: ReLU with L1. active: biases are such that about so many features are active per token, as in a trained dictionary, and lr is so low that it
stays like that; otherwise everyone starts with half of them.
"""
PEERS = (
    "sae_lens:fp32",
    "sae_lens:autocast",
    "sae_lens:sparse",
    "dictionary_learning:fp32",
    "dictionary_learning:bf16",
    "sparsify:fp32",
    "sparsify:bf16",
)
HELDOUT = 4
POOL = 32
"""Batches held in memory; a longer training reads them again."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), default="A")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor-time", action="store_true", help="of all threads, so with --threads 1")
    parser.add_argument("--one", help="LIBRARY:VARIANT, in this process; ours is stagediff:bf16, stagediff:fp32 or stagediff:free")
    parser.add_argument("--peers-python", help="the interpreter of the peers' environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contestants", help="comma-separated, instead of all")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given)), flush=True)
        return
    names = given.contestants.split(",") if given.contestants else ["stagediff:bf16", "stagediff:fp32", "stagediff:free", *PEERS]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(given.rounds):
        for name in names:
            result = in_own_process(name, given)
            print(json.dumps(result), flush=True)
            found[name].append(result)
    print(table(found))


def in_own_process(name: str, given: argparse.Namespace) -> dict[str, Any]:
    python = sys.executable if name.startswith("stagediff") else given.peers_python or sys.executable
    options = ["--processor-time"] * given.processor_time + [
        "--case",
        given.case,
        "--steps",
        str(given.steps),
        "--device",
        given.device,
        "--threads",
        str(given.threads),
        "--one",
        name,
    ]
    done = subprocess.run([python, str(Path(__file__).resolve()), *options], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"contestant": name, "failed": done.stderr.strip().splitlines()[-1:] or done.returncode}


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Medians over the rounds; ratios to the first contestant, round by round."""
    lines = ["| | tokens/s | of ours | FVU | memory, MiB |", "|---|---|---|---|---|"]
    first = next(iter(found.values()))
    for name, results in found.items():
        good = [r for r in results if "tokens_per_second" in r]
        if not good:
            lines.append(f"| {name} | failed: {results[-1].get('failed')} | | | |")
            continue
        speed, fvu, memory = (statistics.median(r[key] for r in good) for key in ("tokens_per_second", "fvu", "memory_mib"))
        pairs = [r["tokens_per_second"] / f["tokens_per_second"] for r, f in zip(results, first, strict=True) if "fvu" in r and "fvu" in f]
        lines.append(f"| {name} | {speed:,.0f} | {statistics.median(pairs) if pairs else float('nan'):.3f} | {fvu:.4f} | {memory:,.0f} |")
    return "\n".join(lines)


def one(given: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(given.threads)
    os.environ |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    case = CASES[given.case]
    library, _, variant = given.one.partition(":")
    result = {"contestant": given.one, "case": given.case, "device": given.device, "steps": given.steps, "torch": torch.__version__}
    try:
        prepare = PREPARE[library](case, variant, given)  # imports
        batches = activations(case, given.device, min(POOL, given.steps) + HELDOUT)
        pool, heldout = batches[HELDOUT:], batches[:HELDOUT]
        clock = Clock(pool, given.steps, given.device, time.process_time if given.processor_time else time.perf_counter)
        with Memory(given.device) as memory:
            evaluate = prepare(clock, start(case, pool))
        taken = clock.seconds()
        result |= {
            "tokens_per_second": round(case["batch"] / statistics.median(taken)),
            "best": round(case["batch"] / min(taken)),
            "fvu": round(fvu(evaluate, heldout, pool[0].float().mean(0)), 5),
            "memory_mib": round(memory.peak / 2**20),
        }
    except Exception as error:
        result["failed"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    return {**result, "load": round(os.getloadavg()[0], 2)}


def activations(case: dict[str, Any], device: str, count: int) -> list[Tensor]:
    """Batches [batch, d] in bf16, of mean norm sqrt(d): 2 k of 2 F directions each, with Zipf frequencies, and noise."""
    d, directions, active = case["d"], 2 * case["features"], 2 * (case["k"] or 32)
    generator = torch.Generator(device).manual_seed(1)
    atoms = torch.randn(directions, d, generator=generator, device=device)
    atoms /= atoms.norm(dim=1, keepdim=True)
    often = 1 / torch.arange(10, directions + 10, device=device, dtype=torch.float32)
    batches = []
    for _ in range(count):
        which = torch.multinomial(often, case["batch"] * active, replacement=True, generator=generator).view(case["batch"], active)
        size = torch.rand(which.shape, generator=generator, device=device) + 0.5
        x = torch.nn.functional.embedding_bag(which, atoms, per_sample_weights=size, mode="sum")
        x += 0.1 * torch.randn(x.shape, generator=generator, device=device) + 0.5
        batches.append((x * (d**0.5 / x.norm(dim=1).mean())).bfloat16())
    return batches


def start(case: dict[str, Any], pool: list[Tensor]) -> dict[str, Tensor]:
    """The weights everyone starts with: unit decoder rows [F, d], the data's mean [d], and the encoder's biases [F] (beside b_dec subtracted from inputs)."""
    generator = torch.Generator().manual_seed(2)  # not the data's seed: the start would be the answer
    rows = torch.randn(case["features"], case["d"], generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    rows, b_dec = rows.to(pool[0].device), torch.stack([x.float().mean(0) for x in pool]).mean(0)
    b_enc = torch.zeros(case["features"], device=rows.device)
    if case.get("active"):
        pre = (pool[0][:256].float() - b_dec) @ rows.t()
        b_enc -= pre.flatten().kthvalue(pre.numel() - 256 * case["active"]).values
    return {"W_dec": rows, "b_dec": b_dec, "b_enc": b_enc}


class Memory:
    """Peak of what a training takes beyond what was there before."""

    def __init__(self, device: str):
        self._cuda = device.startswith("cuda")
        self.peak = 0

    def __enter__(self) -> "Memory":
        gc.collect()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._before, self._over = self._resident(), threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self.peak = torch.cuda.max_memory_allocated() - self._before
        else:
            self._over.set()
            self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.peak = max(self.peak, self._resident() - self._before)

    @staticmethod
    def _resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
def fvu(evaluate: Evaluate, heldout: list[Tensor], mean: Tensor) -> float:
    """Share of the held-out variance about the training mean that is left unexplained."""
    left = total = 0.0
    for x in heldout:
        for part in x.float().split(1024):
            left += float((evaluate(part).float() - part).square().sum())
            total += float((part - mean).square().sum())
    return left / total


if __name__ == "__main__":
    main()
