"""Configs of small runs over watched checkpoints of a 97-word model: every step runs, in seconds."""

import json
import random
from pathlib import Path
from typing import Any

__all__ = ["tiny_diff", "tiny_watch", "write_texts"]


def write_texts(path: Path, seed: int, documents: int = 600) -> Path:
    """Documents of the words that the tiny models know."""
    chance = random.Random(seed)
    lines = [json.dumps({"text": " ".join(f"w{chance.randint(1, 96)}" for _ in range(40))}) for _ in range(documents)]
    path.write_text("\n".join(lines))
    return path


def tiny_watch(folder: Path, **changes: Any) -> dict[str, Any]:
    """A tracked run over folder/lm/checkpoint-{step}."""
    data = write_texts(folder / "data.jsonl", 0) if not (folder / "data.jsonl").exists() else folder / "data.jsonl"
    return {
        "kind": "track",
        "name": "tiny-watch",
        "store": str(folder / "store"),
        "data": {"path": str(data), "layout": "packed"},
        "hook": {"layer": 0, "site": "resid_post"},
        "context": 32,
        "harvest": {"shard_mib": 1, "batch_rows": 16},
        "dictionary": {"architecture": "relu", "features": 48, "l1": 1.0},
        "train": {"tokens": 8_192, "batch": 512, "lr": 1e-3},
        "follow": {"tokens": 2_048, "batch": 512, "lr": 1e-3},
        "probe": {"tokens": 1_024, "quality_rows": 8},
        "retrain_null": {"repeats": 1},
        "umap": None,
        "watch": {"source": str(folder / "lm"), "every": 1},
        **changes,
    }


def tiny_diff(folder: Path, base: Path, **changes: Any) -> dict[str, Any]:
    """A stage-wise run of every folder/lm/checkpoint-{step} against a base model."""
    for name, seed in (("data.jsonl", 0), ("new.jsonl", 1)):
        if not (folder / name).exists():
            write_texts(folder / name, seed)
    return {
        "kind": "stagewise",
        "name": "tiny-diff",
        "store": str(folder / "store"),
        "models": {"base": {"name": str(base)}},
        "data": {"base": {"path": str(folder / "data.jsonl")}, "new": {"path": str(folder / "new.jsonl")}, "new_share": 0.1},
        "hook": {"layer": 0, "site": "resid_post"},
        "context": 32,
        "tokens": 8_192,
        "harvest": {"shard_mib": 1, "batch_rows": 16},
        "dictionary": {"architecture": "relu", "features": 48, "l1": 1.0},
        "train": {"tokens": 8_192, "batch": 512, "lr": 1e-3},
        "finetune": {"tokens": 2_048, "batch": 512, "lr": 1e-3},
        "diff": {"cut": {"kind": "quantile", "value": 0.1}, "random_sample": 10},
        "statistics": {"tokens": 2_048, "quality_rows": 8},
        "watch": {"source": str(folder / "lm"), "every": 1},
        **changes,
    }
