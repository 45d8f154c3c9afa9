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
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
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
LR, L1 = 1e-3, 3.0
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

Evaluate = Callable[[Tensor], Tensor]


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


class Clock:
    """The batches in order, with the time at which each was asked for."""

    def __init__(self, pool: list[Tensor], steps: int, device: str, now: Callable[[], float]):
        self._pool, self.steps, self._device, self._now = pool, steps, device, now
        self._stamps: list[float] = []

    def __iter__(self) -> Iterator[Tensor]:
        for step in range(self.steps):
            self._stamp()
            yield self._pool[step % len(self._pool)]
        self._stamp()
        while True:  # some ask for one more
            yield self._pool[0]

    def _stamp(self) -> None:
        if self._device.startswith("cuda"):
            torch.cuda.synchronize()
        self._stamps.append(self._now())

    def seconds(self) -> list[float]:
        """Of each step, without the first tenth."""
        if len(self._stamps) == self.steps:
            self._stamp()  # who never asked for one more
        pairs = zip(self._stamps, self._stamps[1:], strict=False)
        return [b - a for a, b in pairs][max(2, self.steps // 10) :]


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


def lr_of(case: dict[str, Any]) -> float:
    return case.get("lr", LR)


def under(variant: str, device: str) -> Any:
    is_bf16 = variant in ("bf16", "autocast")
    return torch.autocast(device.partition(":")[0], dtype=torch.bfloat16) if is_bf16 else contextlib.nullcontext()


def stagediff(case: dict[str, Any], variant: str, given: argparse.Namespace) -> Any:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from stagediff.sae.initial import fresh
    from stagediff.sae.spec import Budget, DictionaryConfig
    from stagediff.sae.trainer import Trainer

    compute = torch.float32 if variant == "fp32" else torch.bfloat16
    kind: dict[str, Any] = (
        {"architecture": "topk", "k": case["k"]}
        if case["k"]
        else {"architecture": "relu", "l1": L1, "initial_norm": 1.0, "subtract_b_dec": True}  # as both peers do
    )
    if variant == "free":
        kind["decoder_norm"] = "free"
    small = fresh(DictionaryConfig(**{**kind, "features": 64, **({"k": 4} if case["k"] else {})}), 1.0, torch.zeros(16), seed=0)
    Trainer(small.to(given.device), Budget(tokens=1), 1, True, compute).train_on(
        torch.randn(64, 16, device=given.device)
    )  # loads the kernels

    def run(clock: Clock, begin: dict[str, Tensor]) -> Evaluate:
        sae = fresh(DictionaryConfig(features=case["features"], **kind), 1.0, begin["b_dec"].cpu(), seed=0).to(given.device)
        sae.W_dec.copy_(begin["W_dec"])
        sae.W_enc.copy_(begin["W_dec"].t())
        sae.b_dec.copy_(begin["b_dec"])
        sae.b_enc.copy_(begin["b_enc"] if sae.config.subtract_b_dec else begin["b_enc"] - begin["b_dec"] @ sae.W_enc)
        budget = Budget(tokens=clock.steps * case["batch"], batch=case["batch"], lr=lr_of(case), decay=0.0)
        trainer = Trainer(sae, budget, clock.steps, True, compute)
        del sae
        for step, x in enumerate(clock):
            if step == clock.steps:
                break
            trainer.train_on(x)
        trained = trainer.dictionary()
        return lambda x: trained.decode(trained.encode(x))

    return run


def sae_lens(case: dict[str, Any], variant: str, given: argparse.Namespace) -> Any:
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    def run(clock: Clock, begin: dict[str, Tensor]) -> Evaluate:
        sparse, shape = variant == "sparse", {"d_in": case["d"], "d_sae": case["features"], "device": given.device}
        if case["k"]:
            options = {"k": case["k"], "use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": not sparse}
            sae: Any = TopKTrainingSAE(TopKTrainingSAEConfig(**shape, **options))
        else:
            sae = StandardTrainingSAE(StandardTrainingSAEConfig(**shape, l1_coefficient=L1))
        sae.W_dec.data.copy_(begin["W_dec"])
        sae.W_enc.data.copy_(begin["W_dec"].t())
        sae.b_dec.data.copy_(begin["b_dec"])
        sae.b_enc.data.copy_(begin["b_enc"] if sae.cfg.apply_b_dec_to_input else begin["b_enc"] - begin["b_dec"] @ sae.W_enc.data)
        tokens = clock.steps * case["batch"]
        warm = max(1, clock.steps // 20)
        config = SAETrainerConfig(
            total_training_samples=tokens,
            train_batch_size_samples=case["batch"],
            lr=lr_of(case),
            lr_end=lr_of(case),
            lr_warm_up_steps=warm,
            autocast=variant == "autocast",
            device=given.device,
        )
        SAETrainer(config, sae, (x.float() for x in clock)).fit()

        def evaluate(x: Tensor) -> Tensor:
            f = sae.encode(x)
            return sae.decode(f)

        return evaluate

    return run


def dictionary_learning(case: dict[str, Any], variant: str, given: argparse.Namespace) -> Any:
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    def run(clock: Clock, begin: dict[str, Tensor]) -> Evaluate:
        shape = {"steps": clock.steps, "activation_dim": case["d"], "dict_size": case["features"], "layer": 0, "lm_name": "none"}
        more = {"lr": lr_of(case), "warmup_steps": max(1, clock.steps // 20), "device": given.device}
        trainer: Any = (
            TopKTrainer(**shape, **more, k=case["k"]) if case["k"] else StandardTrainer(**shape, **more, sparsity_warmup_steps=None)
        )
        ae = trainer.ae
        ae.encoder.weight.data.copy_(begin["W_dec"])
        ae.decoder.weight.data.copy_(begin["W_dec"].t())
        ae.encoder.bias.data.copy_(begin["b_enc"])
        if not case["k"]:
            ae.bias.data.copy_(begin["b_dec"])  # TopK's trainer sets its own
        for step, x in enumerate(clock):
            if step == clock.steps:
                break
            with under(variant, given.device):
                trainer.update(step, x.float())
        return lambda x: ae.decode(ae.encode(x))

    return run


def sparsify(case: dict[str, Any], variant: str, given: argparse.Namespace) -> Any:
    if not given.device.startswith("cuda"):
        torch.cuda.is_bf16_supported = lambda *a, **k: False  # it is asked at import
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    def run(clock: Clock, begin: dict[str, Tensor]) -> Evaluate:
        if not case["k"]:
            raise ValueError("sparsify has no ReLU with L1")
        sae = SparseCoder(case["d"], SparseCoderConfig(num_latents=case["features"], k=case["k"]), device=given.device, dtype=torch.float32)
        sae.encoder.weight.data.copy_(begin["W_dec"])
        sae.W_dec.data.copy_(begin["W_dec"])
        sae.b_dec.data.copy_(begin["b_dec"])
        optimiser = torch.optim.Adam(sae.parameters(), lr=lr_of(case))
        warm = max(1, clock.steps // 20)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / warm))
        silent = torch.zeros(case["features"], dtype=torch.long, device=given.device)
        for step, x in enumerate(clock):  # as its own trainer's loop
            if step == clock.steps:
                break
            sae.set_decoder_norm_to_unit_norm()
            with under(variant, given.device):
                out = sae(x.float(), dead_mask=silent > 10_000_000)
            (out.fvu + out.auxk_loss / 32).backward()
            sae.remove_gradient_parallel_to_decoder_directions()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            silent += len(x)
            silent[out.latent_indices.flatten()] = 0

        def evaluate(x: Tensor) -> Tensor:
            values, indices, *_ = sae.encode(x)
            return sae.decode(values, indices)

        return evaluate

    return run


PREPARE = {"stagediff": stagediff, "sae_lens": sae_lens, "dictionary_learning": dictionary_learning, "sparsify": sparsify}

if __name__ == "__main__":
    main()
