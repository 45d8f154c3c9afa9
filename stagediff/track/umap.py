"""The step `umap`: maps of chosen features' datapoints at chosen checkpoints (SAE-Track, arXiv 2412.17626; UMAP: McInnes et al. 2018).

`apart` fits every checkpoint by itself, as the paper does: only what lies together means something, not where, and the same point may land anywhere at
the next checkpoint. `aligned` (AlignedUMAP) fits all checkpoints together and holds a point near its places before and after, the more its neighbours there
are the same, so that it can be followed; it wants fewer neighbours than the paper's 100 (see UmapRule). Both work on the residual-stream vectors of the
positions, each position once, though it may be a datapoint of several features.

One thread and a fixed seed: the same settings give the same bytes, with the same versions of umap-learn and numba (in the notes).
"""

import importlib.metadata
import itertools
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stagediff.errors import UserError
from stagediff.track.formation_tables import LIVING, final_kinds
from stagediff.track.probe import Probe
from stagediff.track.spec import KINDS, MEASURES, FormationSpec, UmapRule, UmapSpec

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["choose", "compile_maps", "compute", "spread"]

RANDOM = -1
"""In place of a feature: the random positions."""
FEWEST = 10
"""Positions below which there is no map to speak of, and UMAP's spectral start fails."""
NAMED, BY_RULE = "named in the settings", "largest final M of its kind"


def compute(spec: UmapSpec, job: "Job") -> dict[str, Any]:
    """Writes the tables of UmapSpec. Raises UserError for inputs of another chain, features that cannot be shown, and too few positions."""
    began = time.monotonic()
    probe = Probe(spec.points, job)
    formation = job.artifact(spec.formation)
    made_from = formation.spec()
    if not isinstance(made_from, FormationSpec) or made_from.points != spec.points:
        raise UserError(f"{spec.formation} is no formation of these checkpoints. Compute formation on the same points.")
    formed = formation.read_table("formed.parquet", columns=["feature", "set", "measure", "final_m", "datapoints"])
    top = formed[(formed["set"] == "top") & (formed["measure"] == MEASURES[0])].sort_values("feature")
    kind = final_kinds(job.artifact(spec.kinds), spec.points[-1].step, len(top))
    chosen = choose(spec.rule, kind, top.final_m.to_numpy(), top.datapoints.to_numpy(), made_from.rule.datapoints)

    regions = formation.read_table("regions.parquet", columns=["feature", "row", "position"])
    regions = regions[regions["feature"].isin(chosen)]
    shown = pd.concat([regions, formation.read_table("random.parquet").assign(feature=RANDOM)], ignore_index=True).drop_duplicates()
    at, where = np.unique(probe.flat(shown["row"].to_numpy(), shown["position"].to_numpy()), return_inverse=True)
    if len(at) < FEWEST:
        raise UserError(
            f"The chosen features and the random positions are {len(at)} positions; a map needs {FEWEST}. Choose more features or datapoints."
        )
    points = [spec.points[t] for t in spread(len(spec.points), spec.rule.checkpoints)]
    vectors = [probe.vectors(point, at).float().numpy() for point in points]
    parts = []
    with job.progress.task("umap", (2 if _aligns(points, spec.rule) else 1) * len(points), "maps") as task:
        for fit, i, uv in _maps(vectors, spec.rule):
            parts.append(shown.assign(fit=fit, step=points[i].step, u=uv[where, 0], v=uv[where, 1]))
            task.advance()
    names = np.array([*KINDS, None], object)[kind[chosen]]
    features = pd.DataFrame({"feature": chosen.astype(np.int32), "kind": pd.Series(names, dtype="str")})
    features["why"] = NAMED if spec.rule.features else BY_RULE
    table = pd.concat(parts, ignore_index=True)[list(UMAP_COLUMNS)]
    types = {
        "fit": "category",
        "step": np.int64,
        "feature": np.int32,
        "row": np.int32,
        "position": np.int16,
        "u": np.float32,
        "v": np.float32,
    }
    job.writer.write_table("umap.parquet", table.astype(types), columns=UMAP_COLUMNS)
    job.writer.write_table("features.parquet", features, columns=FEATURE_COLUMNS)
    job.notes["versions"] = {name: importlib.metadata.version(name) for name in ("umap-learn", "numba")}
    job.notes["seconds"] = round(time.monotonic() - began, 2)
    return {"features": len(chosen), "positions": len(at), "checkpoints": len(points)}


def choose(rule: UmapRule, kind: np.ndarray, final_m: np.ndarray, datapoints: np.ndarray, asked: int) -> np.ndarray:
    """Features to show, ascending: those named, or `rule.count` by turns from the kinds of LIVING, each kind's largest final M first.

    kind [F] codes into KINDS, final_m [F], datapoints [F], all of the top set; features with fewer datapoints than `asked` come behind all others of their
    kind. Raises UserError for a named feature that does not exist or has no datapoints, and where there is none to choose.
    """
    if rule.features:
        named = np.unique(rule.features)
        if outside := [i for i in named.tolist() if not 0 <= i < len(kind)]:
            raise UserError(f"umap.features names {outside}, but the chain has features 0 to {len(kind) - 1}.")
        if empty := named[datapoints[named] == 0].tolist():
            raise UserError(
                f"umap.features names {empty}, which are never active on the final probe: there is nothing to show. Name others."
            )
        return named
    turns = []
    for code in range(len(LIVING)):
        of = np.flatnonzero((kind == code) & np.isfinite(final_m))
        turns.append(of[np.lexsort((of, -final_m[of], datapoints[of] < asked))].tolist())
    found = [i for turn in itertools.zip_longest(*turns) for i in turn if i is not None][: rule.count]
    if not found:
        raise UserError(
            "No feature of the final checkpoint has a kind and a pair of datapoints, so there is nothing to show. Leave umap out (umap: null)."
        )
    return np.sort(np.array(found, np.int64))


def spread(checkpoints: int, count: int) -> list[int]:
    """Indices of `count` checkpoints (fewer where there are not so many), evenly spread from the first to the last; one alone is the last."""
    if count == 1:
        return [checkpoints - 1]
    return np.unique(np.linspace(0, checkpoints - 1, min(count, checkpoints)).round().astype(int)).tolist()


def compile_maps() -> None:
    """Makes both kinds of maps of a few random points, so that umap-learn is compiled ahead of its first use (numba keeps it on disk)."""
    g = np.random.default_rng(0)
    for _ in _maps([g.standard_normal((100, 8)).astype(np.float32) for _ in range(2)], UmapRule()):
        pass


def _maps(vectors: Sequence[np.ndarray], rule: UmapRule) -> Iterator[tuple[str, int, np.ndarray]]:
    """(fit, checkpoint, [n, 2]) of vectors [n, d] per checkpoint. A single checkpoint has nothing to be aligned with."""
    for i, x in enumerate(vectors):
        yield "apart", i, _apart(x, rule)
    if _aligns(vectors, rule):
        for i, uv in enumerate(_aligned(vectors, rule)):
            yield "aligned", i, uv


def _aligns(checkpoints: Sequence[Any], rule: UmapRule) -> bool:
    return rule.aligned and len(checkpoints) > 1


def _apart(x: np.ndarray, rule: UmapRule) -> np.ndarray:
    with _quiet():
        from umap import UMAP  # here, because numba takes seconds to start

        return UMAP(n_neighbors=min(rule.neighbors, len(x) - 1), n_jobs=1, **_settings(rule)).fit_transform(x)


def _aligned(vectors: Sequence[np.ndarray], rule: UmapRule) -> list[np.ndarray]:
    n = len(vectors[0])
    with _quiet():
        from umap import AlignedUMAP

        fitted = AlignedUMAP(n_neighbors=min(rule.aligned_neighbors, n - 1), **_settings(rule))
        fitted.fit(list(vectors), relations=[{i: i for i in range(n)}] * (len(vectors) - 1))
        return [np.asarray(uv) for uv in fitted.embeddings_]


def _settings(rule: UmapRule) -> dict[str, Any]:
    return {"min_dist": rule.min_dist, "metric": "cosine", "random_state": rule.seed}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that a seed means one thread, and of what umap-learn's own dependencies deprecate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


UMAP_COLUMNS = {
    "fit": ("name", "apart: every checkpoint by itself; aligned: all together"),
    "step": ("steps", "training step of the model"),
    "feature": ("index", "whose datapoint it is (-1: a random position)"),
    "row": ("index", "token row of the probe"),
    "position": ("index", "token position in the row"),
    "u": ("map", "first coordinate; maps of one fit share them only if aligned"),
    "v": ("map", "second coordinate"),
}
FEATURE_COLUMNS = {
    "feature": ("index", "feature of the chain"),
    "kind": ("name", "at the final checkpoint"),
    "why": ("text", "how it was chosen"),
}
