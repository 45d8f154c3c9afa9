"""Time and peak memory of SAE-Track's analysis steps over a made-up chain of any size.

    python benchmarks/track_memory.py --features 65536 --checkpoints 30 [--alive 1.0] [--datapoints 25] [--steps kinds,drift,patterns,phases,formation]

The chain is written, not trained: random encoders and decoders that turn a little from checkpoint to checkpoint, Gaussian activations, and for every alive
feature as many examples as the rules look at. So features, checkpoints and datapoints are those of a large run, at the price of writing them. Every step runs
in a process of its own, on one thread; prints one line of JSON per step, with what `stagediff plan` would say of it beside it. Linux.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from stagediff.estimate import estimate_plan
from stagediff.lm.spec import ActivationData, CorpusSource, HarvestSpec, HookPoint, ModelSource, TokenizerSource, TokensSpec
from stagediff.plan import Plan
from stagediff.sae.dictionary import SAE, resolved
from stagediff.sae.layout import CFG, WEIGHTS, to_bytes
from stagediff.sae.spec import Budget, DictionaryConfig, StatisticsSpec, TrainSpec
from stagediff.spec import Ref, Spec
from stagediff.store import Store
from stagediff.store.shards import from_bf16
from stagediff.track.spec import DriftSpec, FormationRule, FormationSpec, KindsSpec, PatternsSpec, PhasesSpec, Point

STEPS = ("kinds", "formation", "drift", "patterns", "phases")
WORDS, CONTEXT, TOP = 997, 17, 25
THRESHOLD = 3.0
"""Standard deviations of a pre-activation that a feature needs to fire: one token in 740 does."""

RUN = """
import json, sys, time
from stagediff import steps
from stagediff.progress import Progress
from stagediff.store import Store
store, spec = Store(sys.argv[1]), steps.get(sys.argv[2]).spec.model_validate_json(open(sys.argv[3]).read())
from stagediff.numerics import describe
describe("cpu")
began, used = time.monotonic(), time.process_time()
ref = steps.run(spec, store, device="cpu", progress=Progress(interactive=False))
found = {"seconds": round(time.monotonic() - began, 1), "processor_seconds": round(time.process_time() - used, 1)}
peak = next(int(l.split()[1]) / 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(json.dumps({**found, "peak_mib": round(peak), "bytes": store.artifact(ref).manifest.size}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=65536)
    parser.add_argument("--checkpoints", type=int, default=30)
    parser.add_argument("--alive", type=float, default=1.0, help="share of the features that fire")
    parser.add_argument("--datapoints", type=int, default=25)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--rows", type=int, default=1024, help=f"probe rows of {CONTEXT} tokens")
    parser.add_argument("--steps", default=",".join(STEPS))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chain = MadeUpChain(Path(folder), given.features, given.checkpoints, width=given.width, rows=given.rows, alive=given.alive)
        specs = chain.specs(given.datapoints)
        for name, spec in specs.items():
            chain.plan.add(name, spec)
        prices = {row.name: row for row in estimate_plan(chain.plan, chain.store)}
        for name in STEPS:
            if name in given.steps.split(","):
                said = {"estimated_seconds": round(prices[name].seconds or 0, 1), "estimated_bytes": prices[name].bytes}
                size = {
                    "step": name,
                    "features": given.features,
                    "checkpoints": given.checkpoints,
                    "alive": given.alive,
                    "width": given.width,
                }
                print(
                    json.dumps({**size, "datapoints": given.datapoints, **said, **measured(chain.store, specs[name], Path(folder))}),
                    flush=True,
                )


def measured(store: Store, spec: Spec, folder: Path) -> dict[str, Any]:
    """Runs the step in a process of its own, on one thread: seconds, processor_seconds, peak_mib, bytes (of the artifact)."""
    (folder / "spec.json").write_text(spec.model_dump_json())
    command = [sys.executable, "-c", RUN, store.root, spec.step, str(folder / "spec.json")]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


class MadeUpChain:
    """What the analysis steps of a chain of F features and T checkpoints read, in a store below `folder`."""

    def __init__(self, folder: Path, features: int, checkpoints: int, *, width: int = 16, rows: int = 1024, alive: float = 1.0):
        self.store, self.rows, self.plan = Store(str(folder / "store")), rows, Plan("made up")
        self.model = str(folder / "model")
        Path(self.model).mkdir()
        (folder / "model" / "config.json").write_text(json.dumps({"hidden_size": width, "num_hidden_layers": 2}))
        self.rng, self.generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
        self.tokenizer = _tokenizer(folder / "tokenizer")
        ids = self.rng.integers(0, WORDS, (rows, CONTEXT)).astype(np.int32)
        spec = TokensSpec(corpus=CorpusSource(digest="made up"), tokenizer=self.tokenizer, context=CONTEXT, rows=rows)
        with self.store.write(spec) as writer:
            array = writer.array("rows", shape=ids.shape, dtype="int32", chunk_rows=rows, shard_rows=rows)
            array.write_shard(next(iter(array.pending())), ids)
            writer.commit(figures={})
        self.tokens = self.plan.add("tokens", spec)
        self.reference = self._activations("reference", HookPoint(layer=1, site="resid_post"), width)
        living = np.arange(features) < round(alive * features)
        encoder = torch.randn(width, features, generator=self.generator)
        self.points = tuple(self._point(t, encoder, living) for t in range(checkpoints))

    def specs(self, datapoints: int = TOP) -> dict[str, Spec]:
        """Name -> spec of every analysis step; those that read others' tables need these to have run."""
        kinds = KindsSpec(points=self.points, tokenizer=self.tokenizer, reference=self.reference)
        formation = FormationSpec(points=self.points, kinds=kinds.ref, rule=FormationRule(datapoints=datapoints))
        drift = DriftSpec(points=self.points)
        patterns = PatternsSpec(points=self.points, kinds=kinds.ref)
        phases = PhasesSpec(points=self.points, kinds=kinds.ref, drift=drift.ref)
        return dict(zip(STEPS, (kinds, formation, drift, patterns, phases), strict=True))

    def _point(self, step: int, encoder: torch.Tensor, living: np.ndarray) -> Point:
        width, features = encoder.shape
        probe = ActivationData(base=self._activations(f"step{step}", HookPoint(layer=1), width), rows=self.rows)
        turned = encoder + 0.2 * torch.randn(width, features, generator=self.generator)
        bias = torch.where(torch.from_numpy(living), -THRESHOLD * turned.norm(dim=0), -1e4)
        decoder = (turned / turned.norm(dim=0)).T.contiguous()
        config = resolved(DictionaryConfig(features=features, subtract_b_dec=False), width)
        sae = SAE(turned, bias, decoder, torch.zeros(width), config)
        dictionary = TrainSpec(data=probe, budget=Budget(tokens=1), dictionary=config, seed=step)
        with self.store.write(dictionary) as writer:
            for name, body in zip((CFG, WEIGHTS), to_bytes(sae), strict=True):
                writer.write_bytes(name, body)
            writer.commit(figures={})
        statistics = StatisticsSpec(dictionary=dictionary.ref, data=probe, base_rows_only=True, top=TOP)
        of = np.flatnonzero(living).astype(np.int32)
        examples = pd.DataFrame({"feature": np.repeat(of, TOP), "rank": np.tile(np.arange(TOP, dtype=np.int32), len(of))})
        examples["activation"] = (3.0 - 0.01 * examples["rank"]).astype(np.float32)
        start = self.rng.integers(0, self.rows, len(of))
        examples["row"] = ((start[:, None] + np.arange(TOP)) % self.rows).ravel().astype(np.int32)  # one example per row
        examples["position"] = self.rng.integers(1, CONTEXT, len(examples)).astype(np.int16)
        table = pd.DataFrame({"feature": np.arange(features, dtype=np.int32), "firings": np.where(living, 100, 0)})
        table["density"], table["decoder_norm"], table["max"] = table.firings / 1e5, 1.0, np.where(living, 4.0, 0.0)
        with self.store.write(statistics) as writer:
            writer.write_table("features.parquet", table)
            writer.write_table("examples.parquet", examples)
            writer.commit(figures={})
        self.plan.add(f"dictionary-{step}", dictionary)
        self.plan.add(f"statistics-{step}", statistics)
        return Point(step=step, dictionary=dictionary.ref, statistics=statistics.ref, probe=probe.base)

    def _activations(self, model: str, hook: HookPoint, width: int) -> Ref:
        shard = min(self.rows, 64)
        spec = HarvestSpec(
            model=ModelSource(name=self.model, digest=model), tokens=self.tokens, rows=self.rows, hook=hook, shard_rows=shard, batch_rows=1
        )
        per_row = CONTEXT - 1
        with self.store.write(spec) as writer:
            array = writer.array(
                "data",
                shape=(self.rows * per_row, width),
                dtype="uint16",
                chunk_rows=shard * per_row,
                shard_rows=shard * per_row,
                attributes={"encoding": "bfloat16"},
            )
            for i in array.pending():
                kept = min(shard, self.rows - i * shard) * per_row
                array.write_shard(i, from_bf16(torch.randn(kept, width, generator=self.generator).bfloat16()))
            writer.commit(figures={})
        return self.plan.add(f"activations-{model}", spec)


def _tokenizer(folder: Path) -> TokenizerSource:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return TokenizerSource(name=str(folder))


if __name__ == "__main__":
    main()
