"""Sparse training on one GPU: every Triton kernel checked against plain torch, then timed, in one call of less than three minutes.

    python benchmarks/gpu_train.py [--quick]

Needs the repository, PyTorch and Triton. Checks: selection (ties, rows with too few positive values), gradients, the update, a training curve of
500 steps, the same bytes twice and after a resume, no wait for the device within a step. Timings at d 1,024, F 32,768, k 32: tokens per second of
the whole step, milliseconds of each part, beside the matrix product and the copy that this machine reaches in the same run, the dense algebra in
torch, and peak memory. Prints one line of JSON per result; what fails prints its traceback and the rest goes on; exits with 1 when a check failed.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_checks import checks
from gpu_setup import Section
from gpu_timings import timings

from stagediff.sae.sparse.kernels import Kernels
from stagediff.sae.sparse.reference import Reference

failures = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu: tries the script itself, with whatever kernels a CPU has")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", choices=["checks", "timings"], help="half of it")
    given = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    device, begin = torch.device(given.device), time.perf_counter()
    say({"machine": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "torch": torch.__version__})
    kernels = kernels_for(device)
    sections: list[Section] = []
    if given.only != "timings":
        sections += checks(kernels, device, given.quick)
    if given.only != "checks":
        sections += timings(kernels, device, given.quick)
    for name, section in sections:
        begun = time.perf_counter()
        guarded(name, section)
        print(f"# {name}: {time.perf_counter() - begun:.1f} s", flush=True)
    print(f"# {time.perf_counter() - begin:.0f} s, {failures} failed", flush=True)
    sys.exit(1 if failures else 0)


def kernels_for(device: torch.device) -> Kernels:
    if device.type == "cuda":
        from stagediff.sae.sparse.gpu import TritonKernels

        return TritonKernels(device)
    return Reference()


def say(result: dict[str, Any]) -> None:
    print(json.dumps(result), flush=True)


def guarded(name: str, section: Callable[[], Iterator[dict[str, Any]]]) -> None:
    """Runs a section; a failure is told and counted, and ends this section alone."""
    global failures
    try:
        for result in section():
            failures += result.get("passed") is False
            say(result)
    except Exception:
        failures += 1
        say({"check": name, "passed": False, "raised": True})
        traceback.print_exc(file=sys.stdout)


if __name__ == "__main__":
    with torch.no_grad():
        main()
