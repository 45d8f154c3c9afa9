"""What a room hands to the report: a section made of plain values, so that rooms need not know the report."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stagediff.spec import Ref

if TYPE_CHECKING:
    from stagediff.store import Artifact, Store

__all__ = ["ReportContext", "Section"]


@dataclass(frozen=True)
class ReportContext:
    """What a section may read: the run's artifacts by their names in the plan, and the run's config."""

    store: "Store"
    nodes: dict[str, Ref]
    config: dict[str, Any]
    examples: int
    seed: int

    def artifact(self, name: str) -> "Artifact | None":
        """The complete artifact of that node, or None when the run has no such node."""
        return self.store.artifact(self.nodes[name]).require() if name in self.nodes else None


@dataclass(frozen=True)
class Section:
    """One part of the page. `html` is trusted markup; `data` goes into the page as JSON and is found by the script under the section's name."""

    name: str
    title: str
    order: int
    html: str
    data: dict[str, Any] = field(default_factory=dict)
    scripts: tuple[str, ...] = ()
    """JavaScript sources, included once each."""
    figures: dict[str, bytes] = field(default_factory=dict)
    """Files beside the page ("scatter.svg", "scatter.png")."""
