"""The numerics class of a computation: what besides the spec decides its last bits. Recorded in every manifest."""

import ctypes
import importlib.metadata
import os
import platform
import re
from typing import Any

from stagediff.errors import UserError

__all__ = ["cores", "describe", "has_bf16_products", "resolve_device", "reuse_freed_memory"]

_VERSIONS = ("stagediff", "torch", "transformers", "zarr", "numpy", "numba", "triton", "pyarrow", "safetensors")


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""glibc's names of these settings for mallopt (malloc.h)."""


def reuse_freed_memory() -> None:
    """Lets this process keep up to 256 MiB of freed memory for its next tensors, on Linux with glibc; elsewhere does nothing.

    By default a tensor of some megabytes is mapped when it is made and unmapped when it goes, and every page of the next one is zeroed by the kernel again: a
    tenth of the CPU time of a training at the demo's size. What a user sets by MALLOC_* in the environment stays.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
    libc.mallopt(_TRIM_THRESHOLD, 256 << 20)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_device(device: str) -> str:
    """ "auto" becomes the first CUDA device where there is one, else the CPU."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"Device {device!r} is not known. Expected auto, cpu, cuda or cuda:1 (--device).")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"Device {device!r} was asked for, but torch {torch.__version__} sees no CUDA device here. Use --device cpu, or install a CUDA build of torch."
        )
    if ":" in device and int(device.partition(":")[2]) >= torch.cuda.device_count():
        raise UserError(
            f"Device {device!r} was asked for, but there are only {torch.cuda.device_count()} CUDA devices here, from cuda:0 on."
        )
    return device


def has_bf16_products(device: str) -> bool:
    """Whether the device multiplies matrices in bf16 itself. x86 without AVX512-BF16 or AMX does not, and what stands in for it there takes
    several times as long as fp32. Trainings compute in fp32 then: the same to bf16's rounding, and sooner.
    """
    import torch

    if not device.startswith("cpu") or platform.machine() not in ("x86_64", "AMD64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def describe(device: str) -> dict[str, Any]:
    """Device kind, threads and library versions. Two runs of one spec give the same bytes when these agree."""
    import torch

    versions = {}
    for name in _VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    kind = torch.cuda.get_device_name(device) if device.startswith("cuda") else torch.backends.cpu.get_cpu_capability()
    return {
        "device": kind,
        "bf16_products": has_bf16_products(device),
        "threads": torch.get_num_threads(),
        "world_size": ranks,
        **({"shard": "features"} if ranks > 1 and os.environ.get("STAGEDIFF_SHARD") == "features" else {}),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
    }
