"""Sub-command bench: this machine's speed beside its own ceilings and beside other packages, a table each. The scripts lie in benchmarks/."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from stagediff.cli.options import AsJson
from stagediff.cli.output import print_json
from stagediff.errors import StagediffError, UserError
from stagediff.numerics import cores

__all__ = ["bench", "machine"]

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
TRAINING = {
    "A": ["--architecture", "topk", "--case", "A"],
    "B": ["--architecture", "topk", "--case", "B"],
    "C": ["--architecture", "relu", "--case", "C"],
    "C, 64 active": ["--architecture", "relu", "--case", "C", "--active", "64"],
}
"""Case -> options of benchmarks/train.py; a step of A and C takes about a second on two cores."""
STEPS = {"A": "12", "B": "100", "C": "8", "C, 64 active": "8"}
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def bench(
    what: Annotated[
        Literal["train", "peers", "harvest", "gpu"],
        typer.Argument(
            help="train: dictionaries on this processor, beside the floor; peers: beside other packages; harvest: beside the forward pass alone; "
            "gpu: all checks and times of the kernels on one GPU."
        ),
    ] = "train",
    case: Annotated[str, typer.Option(help="peers: A, B, C or gpu; train: one of A, B, C instead of all.")] = "",
    peers_python: Annotated[str, typer.Option(help="peers: the interpreter of an environment that has the other packages.")] = "",
    threads: Annotated[int, typer.Option(min=1, help="train, peers, harvest.")] = cores(),
    as_json: AsJson = False,
) -> None:
    """Measures this machine: training and harvest beside what it could do, and beside other packages."""
    if case and case not in ("A", "B", "C", "gpu"):
        raise UserError(f"--case {case!r} is none of A, B, C and gpu.")
    if what == "peers" and not peers_python:
        raise UserError(
            "The other packages want an environment of their own: python -m venv ENV && ENV/bin/pip install sae-lens dictionary-learning eai-sparsify; "
            "then stagediff bench peers --peers-python ENV/bin/python."
        )
    here = machine()
    if what == "train":
        rows = [row for name in _cases(case) for row in _training(name, threads)]
    elif what == "peers":
        rows = _peers(case or "A", peers_python, threads)
    elif what == "harvest":
        rows = _harvest(threads)
    else:
        rows = [_flat(found) for found in _run("gpu_train.py")]
    if as_json:
        print_json({"machine": here, "rows": rows})
        return
    _show(what, here, rows)


def machine() -> dict[str, Any]:
    """Processor, the instruction sets that decide its speed, cores, and what else keeps it busy."""
    import torch

    fields: dict[str, str] = {}
    if (info := Path("/proc/cpuinfo")).exists():
        for line in info.read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())  # the first processor's
    return {
        "processor": fields.get("model name", platform.processor() or platform.machine()),
        "flags": [flag for flag in FLAGS if flag in fields.get("flags", "").split()],
        "cores": cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
    }


def _cases(case: str) -> list[str]:
    found = [name for name in TRAINING if not case or name[0] == case]
    if not found:
        raise UserError(f"bench train measures the cases A, B and C, not {case!r}.")
    return found


def _training(case: str, threads: int) -> list[dict[str, Any]]:
    (found,) = _run("train.py", *TRAINING[case], "--steps", STEPS[case], "--threads", str(threads))
    shape = (
        f"d {found['d']}, F {found['features']:,}" + (f", k {found['k']}" if case in ("A", "B") else ", L1") + f", batch {found['batch']:,}"
    )
    kernels = found["kernels"]
    rows = [
        {"case": case, "shape": shape, "kernels": name} | {k: v for k, v in speeds.items() if k in _SPEEDS}
        for name, speeds in kernels.items()
    ]
    return [*rows, {"case": case, "shape": shape, "kernels": "floor", "tokens_per_second": found["floor"], "best": found["floor_best"]}]


def _peers(case: str, python: str, threads: int) -> list[dict[str, Any]]:
    return [_flat(found) for found in _run("peers.py", "--case", case, "--peers-python", python, "--threads", str(threads))]


def _harvest(threads: int) -> list[dict[str, Any]]:
    (found,) = _run("harvest.py", "--threads", str(threads))
    rates = [{"what": name, "tokens_per_second": rate} for name, rate in found["tokens_per_second"].items()]
    shares = [{"what": name.replace("_", " "), "share": value} for name, value in found.items() if name.startswith("harvest_")]
    return rates + shares


_SPEEDS = ("tokens_per_second", "best", "share_of_floor")


def _run(script: str, *options: str) -> list[dict[str, Any]]:
    """The script's lines of JSON. Raises UserError where the scripts are not there, StagediffError where one fails."""
    path = SCRIPTS / script
    if not path.exists():
        raise UserError(
            f"The benchmarks are no part of an installed package: clone the repository and run the command in it (looked for {path})."
        )
    done = subprocess.run([sys.executable, str(path), *options], stdout=subprocess.PIPE, text=True, check=False)
    found = _objects(done.stdout)
    if done.returncode and not found:
        raise StagediffError(f"{script} ended with {done.returncode} and measured nothing; what it said stands above.")
    return found


def _objects(text: str) -> list[dict[str, Any]]:
    """JSON objects among other lines; one object may take several lines."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while (start := text.find("{", at)) >= 0:
        try:
            value, at = decoder.raw_decode(text, start)
        except ValueError:
            at = start + 1
            continue
        found.append(value)
    return found


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    return {k: v if isinstance(v, str | int | float) else json.dumps(v) for k, v in found.items()}


def _show(what: str, here: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    about = f"{here['processor']} ({', '.join(here['flags']) or 'no bf16 products'}), {here['cores']} cores, torch {here['torch']}, load {here['load']:g}"
    table = Table(title=f"{what}: {here['gpu'] + ', ' if here['gpu'] and what == 'gpu' else ''}{about}", title_justify="left")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    numeric = {name for name in columns if all(isinstance(row.get(name, 0), int | float) for row in rows)}
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right" if name in numeric else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in columns))
    Console(width=max(100, Console().width)).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
