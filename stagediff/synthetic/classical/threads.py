"""One thread for everything, while methods are timed against each other.

Their steps are small and some of them can use one thread only; with several, idle threads that wait for each other count as processor time, and a busy
machine multiplies the rest (docs/decisions/007).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter, process_time

import torch
from threadpoolctl import threadpool_limits

__all__ = ["Seconds", "one_thread"]


@contextmanager
def one_thread() -> Iterator[None]:
    """torch's and the BLAS libraries' threads: one, and as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


class Seconds:
    """`with Seconds() as taken:` measures a block: `taken.wall` and `taken.processor`."""

    wall = processor = 0.0

    def __enter__(self) -> "Seconds":
        self._start = perf_counter(), process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.processor = perf_counter() - self._start[0], process_time() - self._start[1]
