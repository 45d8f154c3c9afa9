"""What every named feature does on base and on new rows in every stage, as small multiples: how many tokens make it fire how strongly.

The counts are those of the stages' statistics (held-out rows of the mix, each stage's own model). Both axes are logarithmic and the same in every panel.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from stagediff.diff.section.examples import histogram_counts
from stagediff.diff.section.tables import STAGE_NAMES, STAGE_STORY
from stagediff.diff.spec import STAGES, DiffSpec
from stagediff.evidence.labels.section.words import percent
from stagediff.markup import escape, number
from stagediff.sections import ReportContext

__all__ = ["Panels", "distributions_html", "outline", "read_panels"]

WIDTH, HEIGHT = 136, 56
LOWEST = 1e-6
"""Share of tokens at the panel's bottom; its top is 1."""


@dataclass(frozen=True)
class Panels:
    """Of one stage, rows in the order of `features` as given."""

    edges: np.ndarray
    """[bins + 1] activations."""
    shares: np.ndarray
    """[2, n, bins] share of the base rows' and of the new rows' tokens in each bin."""

    @property
    def density(self) -> np.ndarray:
        """[2, n] share of tokens on which it fires."""
        return self.shares.sum(2)


def read_panels(context: ReportContext, spec: DiffSpec, features: np.ndarray) -> dict[str, Panels]:
    """Stage -> panels of `features` [n]."""
    ascending = np.sort(features)
    back = np.searchsorted(ascending, features)
    found = {}
    for stage in STAGES:
        artifact = context.store.artifact(spec.statistics[stage]).require()
        edges, counts = histogram_counts(artifact, ascending)
        tokens = np.array([artifact.manifest.figures[f"tokens_{rows}"] for rows in ("base", "new")], float)
        found[stage] = Panels(np.asarray(edges), counts[:, back] / np.maximum(tokens, 1)[:, None, None])
    return found


def distributions_html(context: ReportContext, spec: DiffSpec, named: pd.DataFrame) -> str:
    """One row per named feature, one column per stage; grey base rows, red new rows."""
    if named.empty:
        return "<p>No feature is named.</p>"
    panels = read_panels(context, spec, named.feature.to_numpy())
    first, last = _bins_in_use(panels)
    head = "".join(f'<th scope="col" title="{escape(STAGE_STORY[s])}">{escape(STAGE_NAMES[s])}</th>' for s in STAGES)
    rows = []
    for i, r in enumerate(named.itertuples(index=False)):
        flag = ' <span class="tag hot">flagged</span>' if r.flagged else ""
        cells = "".join(f"<td>{_panel(panels[s], i, first, last)}</td>" for s in STAGES)
        rows.append(
            f'<tr><th scope="row"><strong>{r.number}</strong> · feature {r.feature}{flag}<br>{escape(r.label or "–")}</th>{cells}</tr>'
        )
    edges = panels[STAGES[0]].edges
    return (
        f"<p>How strongly each named feature fires, in every stage's own model, on held-out base rows (grey) and on new rows (red). Across: activation, from "
        f"{number(float(edges[first]))} to {number(float(edges[last]))}, logarithmic; upwards: share of those rows' tokens that fall into a bin, from "
        f"{LOWEST:g} to 1, logarithmic (a line per factor of 100). Below each: the share of tokens on which it fires, base and new.</p>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="Activation distributions"><table class="plain multiples"><thead><tr><th scope="col">'
        f"Feature</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def outline(shares: np.ndarray) -> str:
    """An SVG path around the steps of a histogram [bins], log scale, closed at the panel's bottom; empty where nothing fires."""
    if not (shares > 0).any():
        return ""
    step = WIDTH / len(shares)
    with np.errstate(divide="ignore"):
        height = np.clip(1 - np.log10(shares) / np.log10(LOWEST), 0, 1)
    height[shares <= 0] = 0
    tops = HEIGHT * (1 - height)
    d = f"M0 {HEIGHT}"
    for i, top in enumerate(tops):
        d += f"V{top:.1f}H{step * (i + 1):.1f}"
    return f"{d}V{HEIGHT}Z"


def _panel(panels: Panels, i: int, first: int, last: int) -> str:
    grid = "".join(f"M0 {HEIGHT * k / 3:.1f}H{WIDTH}" for k in (1, 2))
    base, new = (outline(panels.shares[k, i, first:last]) for k in (0, 1))
    rates = " · ".join(percent(float(panels.density[k, i])) for k in (0, 1))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true"><path class="faint" stroke="currentColor" stroke-opacity=".12" '
        f'd="{grid}"/><path class="base" d="{base}"/><path class="new" d="{new}"/></svg><span class="rates">{rates}</span>'
    )


def _bins_in_use(panels: dict[str, Panels]) -> tuple[int, int]:
    used = np.flatnonzero(np.any([p.shares.any((0, 1)) for p in panels.values()], axis=0))
    return (int(used[0]), int(used[-1]) + 1) if len(used) else (0, next(iter(panels.values())).shares.shape[2])
