"""Runs a step in several processes of this machine, by torchrun as a subprocess: the side that starts them.

`steps.run` with more hands. A sharded step (harvest) is shared out by shards: the processes know nothing of each other, the store's claims keep
them apart. A training is shared out by slices of every batch: the first rank keeps checkpoints and writes the artifact, the others assist
(`steps.Step.assist`). A process that dies ends the others, and the step fails with RankLostError, a fault of the moment: run again, it goes on from
the last shard or training checkpoint.
"""

import json
import logging
import os
import sys
import tempfile
from pathlib import Path

from stagediff import steps
from stagediff.errors import DamagedError, StagediffError, UserError
from stagediff.progress import Progress
from stagediff.ranks.progress import Told
from stagediff.ranks.tree import Ended, run_tree
from stagediff.spec import Ref, Spec
from stagediff.store import Store

__all__ = ["RANKS", "SHARD", "RankLostError", "command", "is_shared", "ranks_here", "run", "shard_here"]

log = logging.getLogger("stagediff")

RANKS = "STAGEDIFF_RANKS"
"""Environment variable: how many processes share a step that can be shared; a cluster's job gets it with its GPUs."""
SHARD = "STAGEDIFF_SHARD"
"""Environment variable: what of a training its ranks share out: batch (the default) or features (`stagediff.sae.sharded`)."""
_KINDS = {"UserError": UserError, "DamagedError": DamagedError, "StagediffError": StagediffError}


class RankLostError(ConnectionError):
    """A process of several that share a step has died. Nothing is wrong with the input: running the step again continues it."""


def ranks_here() -> int:
    """How many processes this job was given (STAGEDIFF_RANKS); 1 by default."""
    text = os.environ.get(RANKS, "1")
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"{RANKS} is {text!r}; expected the number of processes that share a step, at least 1.")
    return int(text)


def is_shared(spec: Spec, ranks: int) -> bool:
    """Whether `ranks` processes, where there are so many, compute this step together."""
    return ranks > 1 and steps.get(spec.step).by_ranks and not spec.is_made_by_readers


def shard_here() -> str:
    """What ranks of a training share out (STAGEDIFF_SHARD): batch or features."""
    text = os.environ.get(SHARD, "batch")
    if text not in ("batch", "features"):
        raise UserError(f"{SHARD} is {text!r}; expected batch or features: what the ranks of a training share out.")
    return text


def run(
    spec: Spec,
    store: Store,
    *,
    device: str = "auto",
    part: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
    force: bool | str = False,
    name: str | None = None,
    ranks: int | None = None,
) -> Ref:
    """As `steps.run`, in `ranks` processes (None: as STAGEDIFF_RANKS says) where the step can be shared, else in this one.

    Call it in the main thread (see `run_tree`). Raises RankLostError when a process dies, and what `steps.run` raises.
    """
    ranks = ranks_here() if ranks is None else ranks
    if not is_shared(spec, ranks):
        return steps.run(spec, store, device=device, part=part, progress=progress, force=force, name=name)
    if steps.is_done(spec, store, force):
        return spec.ref
    for ref in spec.refs():
        store.artifact(ref).require()
    from stagediff.numerics import resolve_device

    if ":" in resolve_device(device):
        raise UserError(
            f"{ranks} processes are to share {name or spec.step}, but the device {device!r} is a single one. Use cuda, or one process."
        )
    steps.make_room(spec, store, force)  # here and once: to the ranks it is a step that is not done
    called = f"{name or spec.step} {spec.key[:8]}"
    with tempfile.TemporaryDirectory(prefix="stagediff-ranks-") as folder:
        order = {"step": spec.step, "spec": spec.model_dump(mode="json"), "store": store.root, "device": device, "part": part, "name": name}
        (Path(folder) / "order.json").write_text(json.dumps(order))
        shown = progress or Progress()
        with shown.step(f"{called} in {ranks} processes"), Told(shown) as told:
            ended = run_tree(command(ranks, "stagediff.ranks", folder), lambda line: None if told.take(line) else _say(line))
        if ended.code:
            _raise(called, ended, Path(folder))
    return spec.ref


def command(ranks: int, module: str, *arguments: str) -> list[str]:
    """The torchrun command for a module in `ranks` processes of this machine."""
    return [sys.executable, "-m", "stagediff.ranks.torchrun", "--standalone", f"--nproc-per-node={ranks}", "-m", module, *arguments]


def _say(line: str) -> None:
    if line.strip():
        log.info("%s", line)


def _raise(called: str, ended: Ended, folder: Path) -> None:
    """Raises what a rank left word of; RankLostError where none did."""
    left = [json.loads(path.read_text()) for path in sorted(folder.glob("failed-*.json"))]
    for kind, error in _KINDS.items():
        for word in left:
            if word["kind"] == kind:
                raise error(word["text"])
    for word in left:
        if word["kind"] == "OSError":
            raise OSError(word["text"])
        if word["kind"] == "defect":
            raise RuntimeError(f"{called}: rank {word['rank']} failed: {word['text']}")
    tail = "\n".join(ended.tail)
    raise RankLostError(f"{called}: a process that shares the step was lost ({ended.how}). Its last lines:\n{tail}")
