"""Steps side by side on one machine: worker processes that stay, each of which computes one step at a time.

A small step does not fill a machine: two of them with half of its cores each are done sooner than one after the other. A lane is a process with its
share of the cores, that has torch and compiled kernels loaded and takes step after step; on a machine with several GPUs it has one of them for itself.
Progress, log lines and errors come back through a pipe. A lane that dies (out of memory, say) is replaced, and its step fails with RankLostError, a fault
of the moment: run again, it goes on from what it had stored. Lanes end with the process that opened them, however that ends.

How many threads a step computes with follows from the step, the number of lanes and the cores that this process may use (affinity,
OMP_NUM_THREADS), not from what runs beside it, and so do its last bits (`numerics`).
"""

import logging
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from contextvars import copy_context
from multiprocessing import connection, get_context, parent_process
from typing import Any

from stagediff import ranks, steps
from stagediff.errors import DamagedError, StagediffError, UserError
from stagediff.numerics import cores
from stagediff.plan import Node, Plan, Run
from stagediff.plan import execute as one_by_one
from stagediff.progress import Progress, Task
from stagediff.ranks.launch import RANKS, RankLostError, ranks_here
from stagediff.spec import Ref, Spec
from stagediff.store import Store

__all__ = ["Lanes", "execute", "execute_plan", "run"]

log = logging.getLogger("stagediff")

GRACE = 10.0
"""Seconds that a lane has to end by itself."""
_KINDS = {kind.__name__: kind for kind in (UserError, DamagedError, StagediffError, OSError)}
_current: "Lanes | None" = None


def run(spec: Spec, store: Store, **options: Any) -> Ref:
    """As `ranks.run`; in one of the open lanes where there are any."""
    return ranks.run(spec, store, **options) if _current is None else _current.run(spec, store, **options)


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
                    elif failed is None:
                        failed = error
                    else:  # of those that come to their end
                        log.error("%s: %s", node.name, error)
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
        if ranks_here() > 1:  # a step's processes are ended from the main thread alone, and each wants the machine for itself
            raise UserError(
                f"{RANKS} gives every step that can be shared {ranks_here()} processes, and {count} steps are to run at a time (--jobs). Choose one: "
                "--jobs 1, or no ranks."
            )
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
            for lane in self._all:  # before waiting for any: a second signal may cut that short, and a step would go on for hours
                lane.stop()
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
            "threads": _threads(1 if alone else self.count),
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
                    if lane in self._all:  # or none could be opened in its place
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
                        record = logging.makeLogRecord(word)
                        logger = logging.getLogger(record.name)
                        if logger.isEnabledFor(record.levelno):
                            logger.handle(record)
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

    def stop(self) -> None:
        """Ends the step it computes, if any."""
        if self.is_busy:
            self._process.terminate()

    def end(self) -> None:
        self._pipe.close()
        if not self.is_busy:
            self._process.join(GRACE)  # it reads the end of its orders, and leaves in order
        self._process.terminate()
        self._process.join(GRACE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _threads(lanes: int) -> int:
    """How many threads a step computes with where so many lanes share the cores: not more than OMP_NUM_THREADS allows any process."""
    allowed = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    share = max(1, cores() // lanes)
    return min(share, max(1, int(allowed))) if allowed.isdigit() else share


def _raise(called: str, kind: str, text: str) -> None:
    if kind in _KINDS:
        raise _KINDS[kind](text)
    raise RuntimeError(f"{called} failed: {text}")


# In the worker


def _serve(pipe: connection.Connection, index: int, level: int) -> None:
    for name in ("SIGINT", "SIGHUP"):  # Ctrl-C, or a terminal that closes, is for the process that gives the work, and it ends this one
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
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
    from threadpoolctl import threadpool_limits

    with suppress(ImportError):  # it comes with others' packages, and with a BLAS of its own, which is limited here or never
        import scipy.linalg  # noqa: F401
    torch.set_num_threads(order["threads"])
    threadpool_limits(order["threads"], user_api="blas")  # numpy's and scipy's
    spec = steps.spec_from_json(order["step"], order["spec"])
    options = order["options"]
    if options["device"] in ("auto", "cuda") and torch.cuda.device_count() > 1:
        options["device"] = f"cuda:{index % torch.cuda.device_count()}"

    def listen(task: Task) -> None:
        tell("progress", {"name": task.name, "total": task.total, "unit": task.unit, "done": task.done, "note": task.note})

    try:
        steps.run(spec, Store(order["store"]), progress=Progress(interactive=False, log_every=float("inf"), listener=listen), **options)
    finally:
        if torch.cuda.is_initialized():  # what this lane does not use belongs to the others on the same GPU
            torch.cuda.empty_cache()


class _Teller(logging.Handler):
    """Hands log records to the process that shows them."""

    def __init__(self, tell: Any):
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except Exception:  # as every handler: a library's slip in logging is no fault of the step
            self.handleError(record)
            return
        if record.exc_info:
            text += "\n" + "".join(traceback.format_exception(*record.exc_info))
        kept = ("name", "levelno", "levelname", "pathname", "lineno", "created", "process", "processName")
        self._tell("log", {**{name: getattr(record, name) for name in kept}, "msg": text})  # as text: anything may be in the rest


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
