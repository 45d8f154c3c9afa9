"""The scatter's section: every feature's numbers packed for the script, and the frame the plot and the feature's panel live in."""

from importlib import resources
from typing import Any

import numpy as np
import pandas as pd

from stagediff.diff.cuts import QUADRANTS
from stagediff.diff.spec import STAGES, Cut
from stagediff.packing import pack, pack_linear, pack_log

__all__ = ["asset", "pack_features"]

COSINES = ("x", "y", "cos_s_d", "cos_s_m", "cos_d_m", "cos_f_f", "cos_s_f_direct")
FLAGS = ("alive", "selected", "born")


def pack_features(features: pd.DataFrame, cut: Cut, bounds: dict[str, Any], pair_novelty: np.ndarray | None = None) -> dict[str, Any]:
    """Columns of the diff's table in feature order, about 45 bytes per feature before base64; `bounds` is the diff's cut.json.

    `pair_novelty` [F], where the run has aligned scores: that of the pair which the feature's latent of F via D is in.
    """
    data: dict[str, Any] = {name: pack_linear(features[name].to_numpy(), -1.0, 1.0) for name in COSINES if name in features}
    for stage in STAGES:
        data[f"norm_{stage}"] = pack_log(features[f"norm_{stage}"].to_numpy())
        data[f"density_{stage}"] = pack_log(features[f"density_{stage}"].to_numpy())
    for name in ("new_mass", "new_top"):
        if name in features:
            data[name] = pack_linear(features[name].to_numpy(), 0.0, 1.0)
    if pair_novelty is not None:
        data["pair_novelty"] = pack_linear(pair_novelty, -2.0, 2.0)
    flags = np.zeros(len(features), dtype=np.uint8)
    for bit, name in enumerate(FLAGS):
        flags |= features[name].to_numpy(bool).astype(np.uint8) << bit
    alive = np.zeros(len(features), dtype=np.uint8)
    for bit, stage in enumerate(STAGES):
        alive |= features[f"alive_{stage}"].to_numpy(bool).astype(np.uint8) << bit
    code = features["quadrant"].map({q: i + 1 for i, q in enumerate(QUADRANTS)}).fillna(0).to_numpy(np.uint8)
    return {
        "n": len(features),
        "columns": data,
        "flags": pack(flags),
        "alive": pack(alive),
        "quadrant": pack(code),
        "quadrants": list(QUADRANTS),
        "stages": list(STAGES),
        "cut": {"kind": cut.kind, "value": cut.value, "x": bounds["x"], "y": bounds["y"], "score": bounds["score"]},
    }


def asset(name: str) -> str:
    """A file of this section's assets."""
    return resources.files("stagediff.diff.section").joinpath("assets", name).read_text(encoding="utf-8")
