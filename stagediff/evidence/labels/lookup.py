"""What the labellers in a store say of one feature of a diff."""

from dataclasses import dataclass

from stagediff.evidence.labels.spec import LabelsSpec
from stagediff.spec import Ref
from stagediff.store import Store

__all__ = ["Said", "said_of"]


@dataclass(frozen=True)
class Said:
    """One labeller's word."""

    who: str
    label: str
    flagged: bool
    unclear: bool
    topic: str
    examples: int
    examples_flagged: int


def said_of(store: Store, diff: Ref, feature: int) -> list[Said]:
    """One entry per finished labelling of that diff that asked about the feature, in the order of their keys."""
    found = []
    for ref in store.refs("labels"):
        artifact = store.artifact(ref)
        if not artifact.is_complete:
            continue
        spec = artifact.spec()
        if not isinstance(spec, LabelsSpec) or spec.diff != diff:
            continue
        table = artifact.read_table("labels.parquet", columns=["feature", *(f for f in Said.__dataclass_fields__ if f != "who")])
        who = spec.model.name if spec.model else spec.labeller
        for row in table[table.feature == feature].drop(columns="feature").itertuples(index=False):
            found.append(Said(who, *row))
    return found
