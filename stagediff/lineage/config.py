"""The config of a run of both methods (`kind: both`): a `track` group and a `stagewise` group.

The stage-wise base model is the track's last checkpoint, and S its last dictionary, settled with the stage-wise `train` budget. What both need
(data, hook, context, harvest, dictionary) is said once, under `track`.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator

from stagediff.config import RunConfig
from stagediff.diff.config import StagewiseConfig
from stagediff.track.config import TrackConfig

__all__ = ["BothConfig"]

_FROM_RUN = ("store", "name", "seed", "keep")
_FROM_TRACK = ("hook", "context", "harvest", "dictionary", "tokens")


class BothConfig(RunConfig):
    """One lineage: tracked, then diffed."""

    kind: Literal["both"]
    track: TrackConfig
    stagewise: StagewiseConfig

    @model_validator(mode="before")
    @classmethod
    def _said_once(cls, body: Any) -> Any:
        if not isinstance(body, Mapping) or not all(isinstance(body.get(name), Mapping) for name in ("track", "stagewise")):
            return body
        run = {name: body[name] for name in _FROM_RUN if name in body}
        track = {**run, **body["track"], "kind": "track"}
        stagewise = {**{name: track[name] for name in _FROM_TRACK if name in track}, **run, **body["stagewise"], "kind": "stagewise"}
        stagewise["models"] = {"base": _last(track), **(stagewise.get("models") or {})}
        base = {k: v for k, v in (track.get("data") or {}).items() if k not in ("heldout", "seed")}
        own = {k: v for k, v in (track.get("data") or {}).items() if k in ("heldout", "seed")}
        stagewise["data"] = {**own, "base": base, **(stagewise.get("data") or {})}
        return {**body, "track": track, "stagewise": stagewise}

    @model_validator(mode="after")
    def _one_lineage(self) -> "BothConfig":
        if self.stagewise.hook != self.track.hook or self.stagewise.context != self.track.context:
            raise ValueError(
                "stagewise and track read different hook points or contexts; a dictionary belongs to one of them: say both under track"
            )
        if self.stagewise.start is not None:
            raise ValueError("stagewise.start cannot be set in a run of kind both: S is the track's last dictionary, settled")
        if self.track.checkpoints.direction == "backward":
            raise ValueError(
                "a backward chain ends at the first checkpoint; kind both needs direction: forward, so that it ends at the base model"
            )
        return self


def _last(track: Mapping[str, Any]) -> dict[str, Any]:
    """The track's last checkpoint as a stage-wise base model."""
    model, checkpoints = track.get("model") or {}, track.get("checkpoints") or {}
    steps = checkpoints.get("steps") or ()
    if model.get("name") and steps:
        return {k: model[k].replace("{step}", str(steps[-1])) for k in ("name", "revision") if model.get(k)}
    return {"organism": model.get("organism")}
