"""The report's part about the decomposition: what one path alone could have told, in numbers and as a picture."""

import base64
from typing import Any

import pandas as pd

from stagediff.evidence.decomposition.figure import figure_files
from stagediff.markup import facts, number, table
from stagediff.sections import ReportContext, Section

__all__ = ["section"]

VIEW_NAMES = {
    "both": "both paths: x and y",
    "data_path": "S → D → F alone: x and cos(S, D)",
    "model_path": "S → M → F alone: y and cos(S, M)",
}
GROUP_NAMES = {
    "lower_left": "lower left",
    "lower_right": "lower right (low y)",
    "upper_left": "upper left (low x)",
    "upper_right": "upper right",
    "others": "all others",
    "carriers": "features that carry the new data",
}


def section(context: ReportContext) -> Section | None:
    """None for a run without the step."""
    artifact, diff = context.artifact("decomposition"), context.artifact("diff")
    if artifact is None or diff is None:
        return None
    f, mixing = artifact.manifest.figures, artifact.read_table("mixing.parquet")
    files = figure_files(diff.read_table("features.parquet"))
    picture = base64.b64encode(files["decomposition.png"]).decode()
    html = (
        "<p>The four quadrants of the run's cut keep their colours while one axis is replaced: y by cos(S, D), so that only the path over the data is seen, "
        "and x by cos(S, M), so that only the path over the model is. Features that turned on both paths should be told apart by both together, and mix with "
        "a neighbouring group along one.</p>"
        f"{_said(f)}{facts(_facts(f))}"
        f'<figure><img src="data:image/png;base64,{picture}" style="max-width:100%" alt="Three scatters of all alive features: both paths, the data path '
        'alone, the model path alone, coloured by the quadrants of the first"></figure>'
        + _table(mixing)
        + '<p class="small muted">AUROC: how often a feature of the group has the lower sum of the two cosines than one of the others (0.5: mixed). In '
        "brackets the 95 % interval of a bootstrap over features. Separable: the share of the group below the lowest 1 % of the others. The groups are made of "
        "x and y, so that the first view tells them apart by construction. "
        'Pictures for papers: <a href="decomposition.svg">decomposition.svg</a>, <a href="decomposition.png">decomposition.png</a>.</p>'
    )
    return Section("decomposition", "Decomposition", 15, html, figures=files)


def _said(f: dict[str, Any]) -> str:
    if not f.get("features"):
        return '<p class="warn">The lower-left quadrant of this run\'s cut is empty, so there is no group to follow.</p>'
    return (
        f"<p>The lower left has {number(f['features'])} features. Along the data path alone its neighbour is the upper left: how often one of the lower left "
        f"has the lower sum falls from {_three(f['auroc_both_upper_left'])} by x + y to {_three(f['auroc_data_path_upper_left'])}. Along the model path alone "
        f"it is the lower right: from {_three(f['auroc_both_lower_right'])} to {_three(f['auroc_model_path_lower_right'])}. 0.5 means mixed. Against all "
        "others the group looks separable either way, since nearly all of them turned on neither axis.</p>"
    )


def _facts(f: dict[str, Any]) -> list[tuple[str, str, str]]:
    shown = (
        ("both", "upper_left", "both paths"),
        ("data_path", "upper_left", "data path alone"),
        ("both", "lower_right", "both paths"),
        ("model_path", "lower_right", "model path alone"),
    )
    return [
        (
            _three(f.get(f"auroc_{view}_{against}")),
            f"AUROC of the lower left against the {against.replace('_', ' ')}, {what}",
            f"95 %: {_three(f.get(f'low_{view}_{against}'))} to {_three(f.get(f'high_{view}_{against}'))}",
        )
        for view, against, what in shown
    ]


def _table(mixing: pd.DataFrame) -> str:
    head = ("Group", "Against", *(name for view in VIEW_NAMES.values() for name in (f"AUROC, {view}", "Separable")))
    rows = []
    for (group, against), part in mixing.groupby(["group", "against"], sort=False):
        by = part.set_index("view")
        first = part.iloc[0]
        cells: list[Any] = [f"{GROUP_NAMES[group]}, {int(first.features):,}", f"{GROUP_NAMES[against]}, {int(first.others):,}"]
        for view in VIEW_NAMES:
            r = by.loc[view]
            cells += [f"{_three(r.auroc)} ({_three(r.low)}–{_three(r.high)})", _percent(r.separable)]
        rows.append(cells)
    return table(head, rows, caption="How far the groups can be told apart", text_columns=2)


def _three(value: Any) -> str:
    return "–" if value is None or value != value else f"{float(value):.3f}"


def _percent(value: Any) -> str:
    return "–" if value is None or value != value else f"{100 * float(value):.3g} %"
