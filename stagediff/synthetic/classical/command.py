"""The command `stagediff classical`: K-SVD and online dictionary learning beside SAEs, on planted atoms or on a photograph."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stagediff.pictures import checked

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["command"]

PLANTED = {
    "recovered": ("found", ".3f"),
    "mmcs": ("MMCS", ".3f"),
    "l0": ("L0", ".2f"),
    "fvu": ("FVU", ".4f"),
    "fvu_pursuit": ("FVU by pursuit", ".4f"),
    "seconds": ("s", ".1f"),
    "processor_seconds": ("processor s", ".1f"),
}
"""Column of `compare` -> its head and format."""
IMAGE = {
    "noisy": ("before", ".2f"),
    "pursuit": ("pursuit to the error", ".2f"),
    "fixed": ("fixed k", ".2f"),
    "atoms": ("atoms", ".2f"),
    "seconds": ("s", ".1f"),
    "processor_seconds": ("processor s", ".1f"),
}
"""Column of `denoise` -> its head and format."""
PLANTED_LEGEND = (
    "Found: share of the planted directions with a cosine above 0.9 to some atom. MMCS: mean of each one's largest cosine. L0 and FVU: held-out vectors, by "
    "the method's own encoder; FVU by pursuit: its atoms, coded by OMP with 4 atoms a vector. Times: learning, one thread. "
    "planted: the true directions; random: vectors of the data. Neither learns."
)
IMAGE_LEGEND = (
    "PSNR in dB, before and after. Pursuit to the error: OMP until the error is the noise's (atoms: how many that takes); fixed k: 2 atoms a patch; "
    "topk (2) and batchtopk (1 on average) by their own encoders, the others by OMP. cosines: a fixed dictionary. Times: learning, one thread."
)


def command(
    seed: Annotated[
        list[int] | None, typer.Option(min=0, help="Of world or noise, and of the learners; may be given several times. Default: 0.")
    ] = None,
    image: Annotated[bool, typer.Option("--image", help="Denoise a photograph instead of finding planted atoms.")] = False,
    photograph: Annotated[str, typer.Option(help="With --image: china or flower, which scikit-learn brings along.")] = "china",
    out: Annotated[Path, typer.Option(help="With --image: the PNG with pictures and atoms of the first seed.")] = Path("runs/denoise.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output on standard output.")] = False,
) -> None:
    """Compares classical dictionaries (K-SVD, online learning) with SAEs."""
    seeds = list(dict.fromkeys(seed or [0]))
    if image:
        from stagediff.synthetic.classical.denoise import denoise
        from stagediff.synthetic.classical.figure import figure_png

        checked(out)
        table, picture = denoise(photograph, seeds)
        out.write_bytes(figure_png(picture))
        title, columns, legend = f"Denoising {photograph}", IMAGE, f"{IMAGE_LEGEND} Pictures: {out}"
    else:
        from stagediff.synthetic.classical.compare import compare

        table = compare(seeds)
        title, columns, legend = "Planted atoms", PLANTED, PLANTED_LEGEND
    if as_json:
        medians = table.drop(columns="seed").groupby("method", sort=False).median().reset_index()
        made = {"rows": table.to_dict("records"), "medians": medians.to_dict("records")}
        print(json.dumps(made | ({"picture": str(out)} if image else {})))
    else:
        _show(table, title, columns, legend)


def _show(table: "pd.DataFrame", title: str, columns: dict[str, tuple[str, str]], legend: str) -> None:
    from rich.console import Console
    from rich.table import Table

    view = Table(title=title, caption=legend, caption_justify="left")
    for head in ("method", "seed", *(head for head, _ in columns.values())):
        view.add_column(head, justify="left" if head == "method" else "right")
    for method, rows in table.groupby("method", sort=False):
        for row in rows.to_dict("records"):
            view.add_row(str(method), str(row["seed"]), *(format(row[name], form) for name, (_, form) in columns.items()))
        if len(rows) > 1:
            middle = rows[list(columns)].median()
            numbers = (format(middle[name], form) for name, (_, form) in columns.items())
            view.add_row("", "median", *numbers, style="bold", end_section=True)
    Console(width=140).print(view)
