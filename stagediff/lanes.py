"""Steps side by side on one machine: worker processes that stay, each of which computes one step at a time.

A small step does not fill a machine: two of them with half of its cores each are done sooner than one after the other. A lane is a process with its
share of the cores, that has torch and compiled kernels loaded and takes step after step; on a machine with several GPUs it has one of them for itself.
Progress, log lines and errors come back through a pipe. A lane that dies (out of memory, say) is replaced, and its step fails with RankLostError, a fault
of the moment: run again, it goes on from what it had stored. Lanes end with the process that opened them, however that ends.

How many threads a step computes with follows from the step and the number of lanes alone, and so do its last bits (`numerics`).
"""

import logging
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from contextvars import copy_context
from multiprocessing import connection, get_context, parent_process
from typing import Any

from stagediff import ranks, steps
from stagediff.errors import DamagedError, StagediffError, UserError
from stagediff.plan import Node, Plan, Run
from stagediff.plan import execute as one_by_one
from stagediff.progress import Progress, Task
from stagediff.ranks.launch import RankLostError, is_shared
from stagediff.spec import Ref, Spec
from stagediff.store import Store

__all__ = ["Lanes", "execute", "execute_plan", "run"]

log = logging.getLogger("stagediff")

GRACE = 10.0
"""Seconds that a lane has to end by itself."""
_KINDS = {kind.__name__: kind for kind in (UserError, DamagedError, StagediffError, OSError)}
_current: "Lanes | None" = None


def run(spec: Spec, store: Store, **options: Any) -> Ref:
    """As `ranks.run`; in one of the open lanes where there are any, and the step is not shared by several processes anyway."""
    if _current is None or is_shared(spec):
        return ranks.run(spec, store, **options)
    return _current.run(spec, store, **options)


def execute(run: Run, count: int, compute: Callable[[Node], Any], on_done: Callable[[Node], Any] | None = None) -> None:
    """Runs what is missing of a plan, `count` steps at a time; of those that could start, the one with the longest chain after it comes first.

    `compute(node)` is called in a thread of its own and calls `run` of this module. Where a step fails, those beside it come to their end, no other is
    started, and its error is raised.
    """
    failed: BaseException | None = None
    going: dict[Future[Any], Node] = {}
    with Lanes(count) as lanes, ThreadPoolExecutor(count, thread_name_prefix="lane") as pool:
        try:
            while True:
                for node in _startable(run, going, count) if failed is None else []:
                    going[pool.submit(copy_context().run, compute, node)] = node
                if not going:
                    break
                for future in wait(going, return_when=FIRST_COMPLETED).done:
                    node = going.pop(future)
                    error = future.exception()
                    if error is None:
                        run.finished(node)
                        if on_done:
                            on_done(node)
                    else:
                        failed = failed or error
        except BaseException:
            lanes.end()  # or the pool would wait for them
            raise
    if failed is not None:
        raise failed


def execute_plan(
    plan: Plan,
    store: Store,
    jobs: int = 1,
    *,
    device: str = "auto",
    force: Iterable[str] = (),
    keep: str = "all",
    progress: Progress | None = None,
) -> None:
    """Runs what is missing of a plan, without Prefect: `jobs` steps at a time, or one after the other in this process."""
    if jobs == 1:
        one_by_one(plan, store, device=device, force=force, keep=keep, progress=progress)
        return
    going = Run(plan, store, force=force, keep=keep)
    execute(going, jobs, lambda node: run(node.spec, store, device=device, force=going.is_forced(node), name=node.name, progress=progress))


def _startable(run: Run, going: dict[Future[Any], Node], count: int) -> list[Node]:
    out: list[Node] = []
    beside = list(going.values())
    for node in run.urgent(run.startable({node.ref for node in beside})):
        if len(beside) == count or any(_is_alone(n) for n in beside) or (_is_alone(node) and beside):
            break
        beside.append(node)
        out.append(node)
    return out


def _is_alone(node: Node) -> bool:
    return steps.get(node.spec.step).resources.alone


class Lanes:
    """`count` worker processes; `run` may be called from as many threads. Use it in a `with` statement."""

    def __init__(self, count: int):
        if count < 2:
            raise UserError(f"{count} steps at a time: side by side begins with 2 (--jobs).")
        self.count = count
        self._free: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        self._all: list[_Lane] = []
        self._lock = threading.Lock()
        self._ended = False

    def __enter__(self) -> "Lanes":
        global _current
        assert _current is None
        for index in range(self.count):
            self._free.put(self._opened(index))
        _current = self
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None
        self.end()

    def end(self) -> None:
        """Ends all of them; what they compute is left as a killed run leaves it."""
        with self._lock:
            self._ended = True
            for lane in self._all:
                lane.end()

    def run(
        self,
        spec: Spec,
        store: Store,
        *,
        device: str = "auto",
        part: tuple[int, int] = (0, 1),
        progress: Progress | None = None,
        force: bool | str = False,
        name: str | None = None,
    ) -> Ref:
        """As `steps.run`, in a lane. Raises RankLostError where the lane dies."""
        if steps.is_done(spec, store, force):
            return spec.ref
        alone = steps.get(spec.step).resources.alone
        order = {
            "step": spec.step,
            "spec": spec.model_dump(mode="json"),
            "store": store.root,
            "threads": _cores() if alone else max(1, _cores() // self.count),
            "options": {"device": device, "part": part, "force": force, "name": name},
        }
        lane = self._free.get()
        try:
            lane.compute(order, progress or Progress())
        except BaseException as error:
            if lane.is_busy:  # lost, or left in the middle of its step, of which it would go on telling
                with self._lock:
                    if self._ended:
                        raise StagediffError(f"{name or spec.step}: stopped.") from None  # nothing to try again
                    lane.end()
                    self._all.remove(lane)
                    lane = self._opened(lane.index)
            raise error
        finally:
            self._free.put(lane)
        return spec.ref

    def _opened(self, index: int) -> "_Lane":
        lane = _Lane(index)
        self._all.append(lane)
        return lane


class _Lane:
    """One worker process, seen from the side that gives it work."""

    def __init__(self, index: int):
        self.index = index
        self.is_busy = False
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, index, log.getEffectiveLevel()), name=f"lane {index}", daemon=True)
        self._process.start()
        theirs.close()

    def compute(self, order: dict[str, Any], progress: Progress) -> None:
        called = order["options"]["name"] or order["step"]
        self.is_busy = True
        try:
            self._pipe.send(order)
            with progress.shown(), ExitStack() as open_tasks:
                shown: dict[str, Task] = {}
                while True:
                    kind, word = self._pipe.recv()
                    if kind == "progress":
                        if word["name"] not in shown:
                            task = progress.task(f"{called}: {word['name']}", word["total"], word["unit"])
                            shown[word["name"]] = open_tasks.enter_context(task)
                        shown[word["name"]].advance(word["done"] - shown[word["name"]].done, word["note"])
                    elif kind == "log":
                        logging.getLogger(word.name).handle(word)
                    else:
                        break
        except (EOFError, OSError):
            self._process.join(GRACE)
            if self._process.is_alive():  # it cannot be heard any more
                self._process.kill()
                self._process.join()
            code = self._process.exitcode
            how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            raise RankLostError(f"{called}: the process that computed it was lost ({how}).") from None
        self.is_busy = False
        if kind == "failed":
            _raise(called, *word)

    def end(self) -> None:
        self._pipe.close()
        if not self.is_busy:
            self._process.join(GRACE)  # it reads the end of its orders, and leaves in order
        self._process.terminate()
        self._process.join(GRACE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _raise(called: str, kind: str, text: str) -> None:
    if kind in _KINDS:
        raise _KINDS[kind](text)
    raise RuntimeError(f"{called} failed: {text}")


# In the worker


def _serve(pipe: connection.Connection, index: int, level: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that gives the work, and it ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    lock = threading.Lock()

    def tell(kind: str, word: Any) -> None:
        with lock:
            pipe.send((kind, word))

    logging.basicConfig(level=level, handlers=[_Teller(tell)])
    logging.getLogger("stagediff").setLevel(level)
    logging.captureWarnings(True)
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            return
        try:
            _work(order, index, tell)
        except Exception as error:
            kind = next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "defect")
            tell("failed", (kind, traceback.format_exc() if kind == "defect" else str(error)))
        else:
            tell("done", None)


def _work(order: dict[str, Any], index: int, tell: Any) -> None:
    import torch

    torch.set_num_threads(order["threads"])
    spec = steps.spec_from_json(order["step"], order["spec"])
    options = order["options"]
    if options["device"] in ("auto", "cuda") and torch.cuda.device_count() > 1:
        options["device"] = f"cuda:{index % torch.cuda.device_count()}"

    def listen(task: Task) -> None:
        tell("progress", {"name": task.name, "total": task.total, "unit": task.unit, "done": task.done, "note": task.note})

    steps.run(spec, Store(order["store"]), progress=Progress(interactive=False, log_every=float("inf"), listener=listen), **options)


class _Teller(logging.Handler):
    """Hands log records to the process that shows them."""

    def __init__(self, tell: Any):
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + "".join(traceback.format_exception(*record.exc_info))
        record.msg, record.args, record.exc_info = text, None, None  # as text: anything may be in there
        self._tell("log", record)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
