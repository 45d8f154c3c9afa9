"""The rivals' table: the ranking figures of one method, what a score rests on, the plan, the seeds' columns and the report's section."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_config

from stagediff import steps
from stagediff.config import make_plan, parse_config
from stagediff.diff.spec import STAGES
from stagediff.errors import UserError
from stagediff.evidence.rivals.baseline import mean_nearest, peak_entropy
from stagediff.evidence.rivals.baseline_section import section as baseline_section
from stagediff.evidence.rivals.section import section
from stagediff.evidence.rivals.spec import CrosscoderSpec, DifferenceSpec, RivalsSpec
from stagediff.evidence.rivals.table import judge
from stagediff.evidence.seeds import RIVAL_FIGURES, rivals
from stagediff.plan import execute
from stagediff.progress import Progress
from stagediff.sections import ReportContext
from stagediff.store import Store

RUNS = {"finetuned": "diff", "baseline": "baseline-diff"}


def candidates() -> pd.DataFrame:
    """Ten latents, of which numbers 0, 1, 2 and 5 carry the new data; number 9 is dead, number 8 has no score."""
    score = [0.1, 0.2, 0.7, 0.3, 0.4, 0.5, 0.6, 0.8, np.nan, 0.0]
    new_top = [1, 0.5, 0.9, 0.4, 0, 0.6, np.nan, 0, 1, 1]
    return pd.DataFrame({"alive": [True] * 9 + [False], "new_top": new_top, "nu": score})


def test_hits_and_recall_are_counted_among_equal_numbers_of_candidates():
    row = judge(candidates(), "crosscoder-l1", "nu", "latent", 3)
    assert (row["candidates"], row["carriers"], row["n"]) == (8, 4, 3)
    assert (row["hits_n"], row["recall_n"]) == (2, 0.5)  # 0, 1 and 3 come first
    assert (row["hits_2n"], row["recall_2n"]) == (3, 0.75)  # then 4, 5 and 6
    assert row["average_precision"] == pytest.approx((1 + 1 + 3 / 5 + 4 / 7) / 4)
    assert row["auroc"] == pytest.approx((4 + 4 + 1 + 2) / 16)


def test_where_nothing_carries_the_new_data_there_is_no_ranking():
    row = judge(candidates().assign(new_top=0.0), "crosscoder-l1", "nu", "latent", 3)
    assert (row["carriers"], row["hits_n"]) == (0, 0)
    assert all(np.isnan(row[name]) for name in ("auroc", "average_precision", "recall_n"))


def test_a_seeds_row_has_every_figure_of_every_score():
    row = {**judge(candidates(), "crosscoder-l1", "nu", "latent", 3), "tokens": 7}
    columns = rivals(pd.DataFrame([row]))
    assert set(columns) == {f"rivals/crosscoder-l1/nu/{f}" for f in RIVAL_FIGURES}
    assert columns["rivals/crosscoder-l1/nu/recall_n"] == 0.5


def planned(store, **settings):
    body = tiny_config(store, rivals=settings, decomposition={})
    return make_plan(parse_config(body), Store(store))


def test_rivals_read_the_rows_of_the_stages_with_the_whole_paths_budget(tmp_path):
    plan = planned(str(tmp_path), k=5, shared=0.25)
    for name in ("crosscoder-l1", "crosscoder-batchtopk", "difference-sae"):
        spec = plan[name].spec
        assert (spec.base, spec.finetuned) == (plan["finetune-D"].spec.data, plan["finetune-F_D"].spec.data)
        assert spec.budget.tokens == 64_000 + 4 * 32_000
        assert spec.order_seed == plan["finetune-F_D"].spec.order_seed
    l1, batchtopk, difference = (plan[n].spec for n in ("crosscoder-l1", "crosscoder-batchtopk", "difference-sae"))
    assert isinstance(l1, CrosscoderSpec)
    assert (l1.dictionary.architecture, l1.shared, l1.dictionary.l1) == ("relu", 0.25, 3.0)
    assert (batchtopk.dictionary.architecture, batchtopk.dictionary.k, batchtopk.shared) == ("batchtopk", 5, 0.0)
    assert isinstance(difference, DifferenceSpec)
    table = plan["rivals"].spec
    assert isinstance(table, RivalsSpec)
    assert table.trainings["F_M"] == tuple(plan[n].ref for n in ("train-S", "finetune-M", "finetune-F_M"))
    assert set(table.trainings) == {*STAGES, *table.latents}


def test_a_run_without_the_settings_has_no_rivals_and_the_same_keys(tmp_path):
    plain = make_plan(parse_config(tiny_config(str(tmp_path))), Store(str(tmp_path)))
    more = planned(str(tmp_path))
    assert "rivals" not in plain
    assert "decomposition" not in plain
    assert plain["align"].ref == more["align"].ref


def test_wrong_settings_are_explained(tmp_path):
    with pytest.raises(UserError, match=r"rivals\.k is 9999, but the crosscoder has 256 latents"):
        planned(str(tmp_path), k=9999)
    with pytest.raises(UserError, match="names one twice"):
        planned(str(tmp_path), methods=["difference-sae", "difference-sae"])
    with pytest.raises(UserError, match=r"rivals\.method is not a setting, did you mean methods"):
        planned(str(tmp_path), method=["difference-sae"])


@pytest.fixture(scope="module")
def judged(finished_run, tmp_path_factory):
    """A tiny run with its rivals: (plan, store)."""
    _, store = finished_run
    root = tmp_path_factory.mktemp("rivals") / "store"
    shutil.copytree(store.root, root)
    plan = planned(str(root), k=8, baseline=True)
    plan.nodes = [n for n in plan.nodes if n.spec.step != "report"]
    copy = Store(str(root))
    execute(plan, copy, device="cpu", progress=Progress(interactive=False))
    return plan, copy


def test_a_whole_run_ranks_every_method_and_the_report_shows_each(judged):
    plan, store = judged
    table = store.artifact(plan["rivals"].ref).read_table("rivals.parquet")
    enriched = store.artifact(plan["diff"].ref).read_table("enrichment.parquet").set_index("measure")
    of_diff = table[table.method == "diff"].set_index("measure")
    for name in ("score", "x", "y", "cos_s_d", "cos_s_m", "cos_s_f_direct"):
        assert of_diff.auroc[name] == pytest.approx(enriched.auroc[name], nan_ok=True)
    path = plan["train-S"].spec.budget.tokens // 1024 * 1024 + 4 * (32_000 // 1024 * 1024)
    assert of_diff.tokens["score"] == path
    assert of_diff.tokens["x"] == path - 2 * (32_000 // 1024 * 1024)
    assert set(table.method) == {"diff", "crosscoder-l1", "crosscoder-batchtopk", "difference-sae"}
    assert (table.n == enriched.flagged["score"]).all()
    context = ReportContext(store, {n.name: n.ref for n in plan}, {}, 10, 0)
    html = section(context).html
    for said in (
        "crosscoder, BatchTopK",
        "latent scaling ν, error",
        "SAE on the difference",
        "x + y by index",
        "paired novelty × contrast (needs labels)",
        "contrast alone (needs labels)",
    ):
        assert said in html
    assert "beyond retraining" not in html  # without a retrain null
    assert "nan" not in html


def test_latents_are_the_same_when_measured_again(judged):
    plan, store = judged
    node = plan["latents-crosscoder-l1"]
    before = {f.path: f.crc32c for f in store.artifact(node.ref).manifest.files}
    steps.run(node.spec, store, device="cpu", force=True, progress=Progress(interactive=False))
    assert {f.path: f.crc32c for f in store.artifact(node.ref).manifest.files} == before
    assert store.artifact(node.ref).manifest.same_bytes


def test_the_baseline_reads_the_base_model_wherever_the_run_reads_the_finetuned_one(tmp_path):
    plan = planned(str(tmp_path), baseline=True)
    base = plan["finetune-D"].spec.data
    assert plan["baseline-F_D"].spec.data == plan["baseline-F_M"].spec.data == plan["baseline-F_direct"].spec.data == base
    assert (plan["baseline-M"].spec.data.base, plan["baseline-M"].spec.data.mix) == (base.base, None)
    starts = {s: plan[f"baseline-{s}"].spec.start for s in ("M", "F_D", "F_M", "F_direct")}
    own = {"M": "train-S", "F_D": "finetune-D", "F_M": "baseline-M", "F_direct": "train-S"}
    assert starts == {s: plan[name].ref for s, name in own.items()}
    harvests = {n.ref for n in plan if n.name.startswith("harvest-finetuned")}
    assert not harvests & {ref for n in plan if "baseline-" in n.name for ref in n.spec.refs()}
    assert plan["statistics-baseline-M"].spec.base_rows_only


def test_the_baseline_stands_beside_the_run(judged):
    plan, store = judged
    table = store.artifact(plan["baseline"].ref).read_table("baseline.parquet").set_index(["run", "group"])
    enriched = {n: store.artifact(plan[d].ref).read_table("enrichment.parquet").set_index("measure").loc["score"] for n, d in RUNS.items()}
    for run, row in enriched.items():
        assert (table.carrying[run, "region"], table.features[run, "region"]) == (row.region_flagged, row.region)
        assert (table.carrying[run, "random"], table.features[run, "random"]) == (row.random_flagged, row.random)
        assert table.p[run, "region"] == pytest.approx(row.p)
    assert table.entropy.between(0, 4.33).all()
    assert table.clustering.between(-1, 1).all()
    html = baseline_section(ReportContext(store, {n.name: n.ref for n in plan}, {}, 10, 0)).html
    assert "baseline, lowest 1 % by x + y" in html
    assert "nan" not in html


def test_entropy_of_peak_tokens():
    assert peak_entropy(np.array([7] * 20)) == (0.0, 1.0)
    assert peak_entropy(np.arange(16)) == (4.0, 1 / 16)
    assert peak_entropy(np.array([1, 1, 2, 2])) == (1.0, 0.5)


def test_the_nearest_others_leave_the_latent_itself_out():
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = mean_nearest(rows[:5], rows, 3)
    for i in range(5):
        cosines = sorted((float(torch.cosine_similarity(rows[i], rows[j], dim=0)) for j in range(30) if j != i), reverse=True)
        assert found[i] == pytest.approx(np.mean(cosines[:3]))
