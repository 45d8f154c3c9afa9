"""GPU slots: how many steps may compute at once on machines that no cluster manager looks after.

Two things have to hold. Over all machines of a work pool no more slots are taken than the pool has GPUs: a global concurrency limit of the Prefect
server, held by a lease that the step renews, so that a killed step's slots come back by themselves. And on each machine two steps never get the same
GPU: a lock file per GPU, which the kernel lets go when its holder dies. Whoever holds the lock of GPU 2 sees only GPU 2.

Both are on where the deployment's environment says so (`make deploy` sets it for process pools with GPUs); Slurm and Kubernetes hand out GPUs
themselves. Steps do not wait here in masses: the pool's work queue starts no more of them than there are GPUs.
"""

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import httpx
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import PrefectHTTPStatusError

from flows.children import patiently
from stagediff.errors import UserError

__all__ = ["GPUS", "LIMIT", "gpu_slots", "limit_of"]

LIMIT = "STAGEDIFF_GPU_LIMIT"
"""Environment: the name of the concurrency limit that counts the pool's GPUs. Not set: nothing is held."""
GPUS = "STAGEDIFF_GPUS"
"""Environment: how many GPUs this step takes, from the config's `resources`."""
DEVICES = "STAGEDIFF_GPU_DEVICES"
"""Environment of a worker: the GPUs of its machine that steps may use, "0,1,4"; by default CUDA_VISIBLE_DEVICES, or all there are."""
LEASE = 60.0
"""Seconds after which a killed step's slots are free again."""
AWAY = (httpx.TransportError, PrefectHTTPStatusError)
"""What a request ends with while the server is away or overloaded."""

log = logging.getLogger("stagediff")


def limit_of(pool: str) -> str:
    """The name of the limit that counts a pool's GPUs."""
    return f"{pool}-gpus"


@contextmanager
def gpu_slots(wanted: int, every: float = 1.0) -> Iterator[list[str]]:
    """Waits for `wanted` GPUs and holds them; yields their numbers and hides all others. Does nothing where no limit is set."""
    limit = os.environ.get(LIMIT)
    if not limit:
        yield []
        return
    if wanted < 1:
        with _visible(""):
            yield []
        return
    with _counted(limit, wanted), ExitStack() as locks:
        known = _devices()
        if not known:  # a pool that counts slots on machines without GPUs
            yield []
            return
        if len(known) < wanted:
            raise UserError(f"This step wants {wanted} GPUs and this machine has {len(known)}: lower `gpus` in the config's `resources`.")
        devices = _lock(known, wanted, locks, every)
        log.info("GPU %s", ", ".join(devices))
        with _visible(",".join(devices)):
            yield devices


@contextmanager
def _counted(limit: str, wanted: int) -> Iterator[None]:
    """Holds slots of the server's limit: asked for again while the server is away, and left to lapse where it does not take them back.

    A step that has computed does not fail for that, nor for a lease that could not be renewed: its GPUs stay locked on this machine.
    """

    def taken() -> AbstractContextManager[None]:
        held = concurrency(limit, occupy=wanted, lease_duration=LEASE, strict=True, raise_on_lease_renewal_failure=False)
        try:
            held.__enter__()
        except ConcurrencySlotAcquisitionError as refused:
            if isinstance(refused.__cause__, AWAY):
                raise refused.__cause__ from None
            raise
        return held

    held = patiently(taken)
    try:
        yield
    finally:
        try:
            held.__exit__(None, None, None)
        except AWAY as fault:
            log.warning("the Prefect API does not take the GPU slot back (%s); it is free again %.0f s later", type(fault).__name__, LEASE)


@contextmanager
def _visible(devices: str) -> Iterator[None]:
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = devices
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _devices() -> list[str]:
    named = os.environ.get(DEVICES) or os.environ.get("CUDA_VISIBLE_DEVICES") or ""
    devices = [d.strip() for d in named.split(",") if d.strip()]
    if devices:
        return devices
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def _lock(devices: list[str], wanted: int, locks: ExitStack, every: float) -> list[str]:
    """Locks `wanted` of the devices, the first that are free; waits where too few are."""
    folder = Path(tempfile.gettempdir()) / f"stagediff-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    while True:
        with ExitStack() as tried:
            got = []
            for device in devices:
                file = tried.enter_context((folder / f"{device.replace('/', '_')}.lock").open("w"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                got.append(device)
                if len(got) == wanted:
                    locks.push(tried.pop_all())
                    return got
        time.sleep(every)
