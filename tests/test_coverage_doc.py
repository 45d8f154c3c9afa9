"""docs/coverage.md names tests, configs and commands: all of them exist, and what is not built says so."""

import ast
import re
from pathlib import Path

import pytest
import typer

from stagediff import steps
from stagediff.cli.app import app
from stagediff.cli.options import load

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "coverage.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("|") and not line.startswith(("|---", "| Figure", "| What |", "| Point"))
]


def named(pattern: str) -> list[str]:
    found = sorted(set(re.findall(pattern, TEXT)))
    assert found, pattern
    return found


@pytest.mark.parametrize("path", named(r"tests/[\w/]+\.py(?:::\w+)?"))
def test_every_test_exists(path):
    file, _, name = path.partition("::")
    body = ast.parse((ROOT / file).read_text())
    functions = {node.name for node in ast.walk(body) if isinstance(node, ast.FunctionDef)}
    assert name in functions if name else any(f.startswith("test_") for f in functions)


@pytest.mark.parametrize("path", named(r"(?:configs|docs)/[\w./-]+\.(?:yaml|md)"))
def test_every_file_exists(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("command", named(r"`stagediff (\w+)"))
def test_every_command_exists(command):
    assert command in {*typer.main.get_command(app).commands, *steps.commands()}


def test_every_config_loads_with_the_settings_beside_it():
    found = re.findall(r"`stagediff (?:run|plan|seeds) (configs/[\w.-]+\.yaml)((?: --set \S+?)*)[ `]", TEXT)
    assert len(found) > 5
    for config, sets in found:
        load(ROOT / config, None, sets.split()[1::2])


@pytest.mark.parametrize("target", named(r"`make (\w+)`"))
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("row", [r for r in ROWS if len(r) == 3], ids=lambda r: r[0][:40])
def test_every_row_has_a_command_and_a_test_or_is_not_built_yet(row):
    _, made, guarded = row
    if made.startswith("not built yet"):
        return
    assert "`tests/" in guarded
    assert re.search(r"`stagediff |`make |report|the same|parquet", made)
