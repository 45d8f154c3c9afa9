"""One rank of a step, started by torchrun: does its share, or leaves word of why it could not."""

import json
import logging
import os
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

from stagediff import steps
from stagediff.errors import DamagedError, StagediffError, UserError
from stagediff.progress import Progress
from stagediff.ranks.launch import RankLostError
from stagediff.ranks.progress import Teller
from stagediff.ranks.tree import die_with_parent
from stagediff.store import Store

WAITING = timedelta(days=7)
"""How long ranks wait for each other: the first may wait for another trainer of the artifact. That a rank died is torchrun's to notice."""


def main(folder: Path) -> None:
    die_with_parent(signal.SIGKILL)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format=f"[rank {rank}] %(message)s" if rank else "%(message)s")
    try:
        _work(json.loads((folder / "order.json").read_text()), rank, ranks)
    except RankLostError:
        raise  # another one knows why
    except BaseException as error:
        _leave_word(error, rank, folder)
        raise


def _work(order: dict[str, Any], rank: int, ranks: int) -> None:
    import torch

    spec = steps.spec_from_json(order["step"], order["spec"])
    store = Store(order["store"])
    device = order["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    options: dict[str, Any] = {
        "device": device,
        "name": order["name"],
        "progress": Progress(interactive=False, log_every=float("inf"), listener=Teller(rank)),
    }
    step = steps.get(spec.step)
    if step.resources.sharded:
        del os.environ["WORLD_SIZE"]  # no word of a numerics class: a share's bytes do not depend on how many there are
        i, of = order["part"]
        steps.run(spec, store, part=(i * ranks + rank, of * ranks), **options)
        return
    from accelerate import PartialState

    group = PartialState(cpu=device == "cpu", timeout=WAITING)
    assert group.num_processes == ranks
    if rank == 0:
        steps.run(spec, store, **options)
    else:
        assert step.assist is not None
        steps.resolve(step.assist)(spec, store, device)
    group.destroy_process_group()


def _leave_word(error: BaseException, rank: int, folder: Path) -> None:
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return
    kind = next((c.__name__ for c in (UserError, DamagedError, StagediffError, OSError) if isinstance(error, c)), "defect")
    text = "".join(traceback.format_exception(error)) if kind == "defect" else str(error)
    (folder / f"failed-{rank}.json").write_text(json.dumps({"kind": kind, "text": text, "rank": rank}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
