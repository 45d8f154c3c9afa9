"""The mix (the step `mix`): which base rows are replaced by which new rows. An index, never a copy of rows or activations.

round(rows * share) rows are replaced, one at a seeded random place in each of as many equal blocks of rows: however many rows a stage
reads from the start, new rows make up the share of them to within one row. The j-th replaced row gets new row j.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from stagediff.errors import UserError
from stagediff.lm.spec import MixSpec

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["OVERLAY_COLUMNS", "compute", "replaced_rows"]

OVERLAY_COLUMNS = {
    "row": ("index", "base row that is replaced; ascending"),
    "new_row": ("index", "row of the new data that stands in its place; ascending"),
}


def replaced_rows(rows: int, share: float, seed: int) -> np.ndarray:
    """The rows that are replaced, ascending, int64 [round(rows * share)]."""
    count = round(rows * share)
    edges = np.array([j * rows // count for j in range(count + 1)], np.int64) if count else np.zeros(1, np.int64)
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:], dtype=np.int64)


def compute(spec: MixSpec, job: "Job") -> dict[str, Any]:
    """Writes overlay.parquet. Raises UserError when base or new has too few rows, or their contexts differ."""
    import pandas as pd

    if not 0 <= spec.share <= 1:
        raise UserError(f"The share of new rows is {spec.share}; expected a number from 0 to 1.")
    base, new = job.artifact(spec.base).array("rows"), job.artifact(spec.new).array("rows")
    if base.shape[1] != new.shape[1]:
        raise UserError(
            f"Base rows have {base.shape[1]} tokens, new rows {new.shape[1]}; a mix needs rows of one context. Draw both with the "
            "same `context`."
        )
    if base.shape[0] < spec.rows:
        raise UserError(
            f"A mix of {spec.rows} rows was asked for, but there are only {base.shape[0]} base rows. Draw more base rows, or mix fewer."
        )
    replaced = replaced_rows(spec.rows, spec.share, spec.seed)
    if new.shape[0] < len(replaced):
        raise UserError(
            f"A share of {spec.share} of {spec.rows} rows needs {len(replaced)} new rows, but there are only {new.shape[0]}. Draw "
            "more new rows, or ask for a smaller share."
        )
    overlay = pd.DataFrame({"row": replaced, "new_row": np.arange(len(replaced), dtype=np.int64)})
    job.writer.write_table("overlay.parquet", overlay, columns=OVERLAY_COLUMNS)
    return {"rows": spec.rows, "new_rows": len(replaced), "share": len(replaced) / spec.rows if spec.rows else 0.0}
