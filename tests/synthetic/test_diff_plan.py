"""The planted diff, the whole way on a very small world; what its artifacts are to whoever reads them; and what the command says."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from typer import Typer
from typer.testing import CliRunner

from stagediff import steps
from stagediff.diff.stages import STAGE_START
from stagediff.errors import UserError
from stagediff.lm.activations import ActivationReader
from stagediff.plan import execute
from stagediff.progress import Progress
from stagediff.sae.dictionary import SAE
from stagediff.sae.spec import Budget, DictionaryConfig
from stagediff.store import Store
from stagediff.synthetic import command as module
from stagediff.synthetic import diff_figure, diff_ladder
from stagediff.synthetic.diff_judge import ALL_SCORES, SCORES
from stagediff.synthetic.diff_ladder import diff_medians, score_world
from stagediff.synthetic.diff_plan import diff_plan
from stagediff.synthetic.diff_rungs import DIFF_RUNGS, DiffRecipe, diff_world
from stagediff.synthetic.diff_spec import DiffWorld, PlantedDiffHarvestSpec
from stagediff.synthetic.diff_world import PlantedDiff

QUIET = Progress(interactive=False)
WORLD = DiffWorld(seed=1, d=24, unchanged=30, model_only=4, data_only=3, appears=4, differs=2, turns=2, l0=2.5, topics=4, new_share=0.2)
RECIPE = DiffRecipe(
    dictionary=DictionaryConfig(features=128, l1=2.0),
    train=Budget(tokens=262_144, batch=512, lr=3e-3),
    finetune=Budget(tokens=131_072, batch=512, lr=3e-3),
    rows=4096,
    heldout_rows=1024,
)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A finished score: (store, its rows)."""
    store = Store(str(tmp_path_factory.mktemp("planted") / "store"))
    return store, score_world("tiny", WORLD, RECIPE, store, device="cpu", progress=QUIET)


@pytest.fixture(scope="module")
def plan():
    return diff_plan(WORLD, RECIPE)


def test_every_score_is_there_for_every_class(scored):
    table = scored[1]
    assert set(table.score) == set(SCORES)
    assert set(table["class"]) == {"all", "appears", "differs", "turns"}
    assert len(table) == 4 * len(SCORES)
    assert (table.groupby("class").planted.first()[["all", "appears", "differs", "turns"]] == [8, 4, 2, 2]).all()


def test_what_was_born_is_what_the_dictionaries_hold(scored, plan):
    """Births again, latent by latent, from the weights."""
    store, table = scored
    planted = PlantedDiff(WORLD)
    new, base = (planted.directions["finetuned", data] for data in ("new", "base"))
    published = store.artifact(plan["diff"].ref).read_table("features.parquet")
    for stage in ("F_D", "F_M"):
        rows = SAE.load(store.artifact(plan[f"finetune-{stage}"].ref)).directions().double().numpy()
        born = set()
        for i in np.flatnonzero(published[f"alive_{stage}"]):
            cosines = {("new", g): float(rows[i] @ new[g]) for g in range(len(planted))}
            cosines |= {("base", g): float(rows[i] @ base[g]) for g in range(len(planted)) if planted.classes[g] != "appears"}
            (data, g), best = max(cosines.items(), key=lambda item: item[1])
            if data == "new" and g in planted.targets and best >= 0.75:
                born.add(g)
        assert table[f"born_{stage}"].iloc[0] == pytest.approx(len(born) / 8)


def test_scores_are_given_where_features_were_born_and_left_out_where_they_were_not(scored, plan):
    store, table = scored
    short = RECIPE.model_copy(update={"finetune": Budget(tokens=1024, batch=512, lr=1e-5)})
    untrained = score_world("tiny", WORLD, short, store, device="cpu", progress=QUIET)
    assert untrained.undertrained.all()
    assert untrained.average_precision.isna().all()
    assert not table.undertrained.any()
    every = table[table["class"] == "all"].set_index("score")
    assert every.average_precision.notna().all()
    assert every.average_precision["pair_novelty"] > 2 * every.hits["pair_novelty"] / every.candidates["pair_novelty"]  # chance
    features = store.artifact(plan["score"].ref).read_table("features.parquet")
    assert features.rank_pair_novelty.notna().mean() >= 0.9


@pytest.fixture(scope="module")
def beside_rivals(scored):
    """The same world with crosscoders and the difference SAE: (store, its rows)."""
    store, _ = scored
    return store, score_world("tiny", WORLD, RECIPE, store, rivals=True, device="cpu", progress=QUIET)


def test_rivals_stand_beside_the_diffs_scores(scored, beside_rivals):
    table = beside_rivals[1]
    assert list(dict.fromkeys(table.score)) == list(ALL_SCORES)
    own = table[table.score.isin(SCORES)].reset_index(drop=True).drop(columns="artifact")
    pd.testing.assert_frame_equal(own, scored[1].drop(columns="artifact"))
    every = table[table["class"] == "all"].set_index("score")
    for name in ("l1_norm_new", "batchtopk_norm_new"):
        assert every.average_precision[name] > 2 * every.hits[name] / every.candidates[name]  # chance


@pytest.mark.parametrize("method", ["crosscoder-l1", "difference-sae"])
def test_rivals_births_are_what_their_dictionaries_hold(beside_rivals, method):
    store, table = beside_rivals
    plan, planted = diff_plan(WORLD, RECIPE, rivals=True), PlantedDiff(WORLD)
    rows = SAE.load(store.artifact(plan[method].ref)).W_dec.double().numpy()
    alive = store.artifact(plan[f"latents-{method}"].ref).read_table("latents.parquet").alive
    whole = {data: planted.directions["finetuned", data].copy() for data in ("new", "base")}
    if method == "difference-sae":
        whole = {data: u - planted.directions["base", data] for data, u in whole.items()}
    else:
        rows = rows[:, WORLD.d :]
    born = set()
    for row in rows[alive]:
        cosines = {}
        for data, u in whole.items():
            for g in range(len(planted)):
                if (norm := np.linalg.norm(u[g])) > 0 and (data == "new" or planted.classes[g] != "appears"):
                    cosines[data, g] = row @ u[g] / norm / np.linalg.norm(row)
        (data, g), best = max(cosines.items(), key=lambda item: item[1])
        if data == "new" and g in planted.targets and best >= 0.75:
            born.add(g)
    births = store.artifact(plan["score"].ref).read_table("births.parquet")
    assert births[(births["class"] == "all") & (births.stage == method)].born.iloc[0] == pytest.approx(len(born) / 8)
    assert born or method != "crosscoder-l1"
    assert table.average_precision.notna().any()


def test_rivals_are_scored_where_the_paths_are_undertrained(beside_rivals):
    short = RECIPE.model_copy(update={"finetune": Budget(tokens=1024, batch=512, lr=1e-5)})
    table = score_world("tiny", WORLD, short, beside_rivals[0], rivals=True, device="cpu", progress=QUIET)
    every = table[table["class"] == "all"]
    assert table.undertrained.all()
    assert every[every.score.isin(SCORES)].average_precision.isna().all()
    assert every[~every.score.isin(SCORES)].average_precision.notna().all()


def test_cuts_are_counted_against_the_truth(scored, plan):
    store, table = scored
    cuts = store.artifact(plan["score"].ref).read_table("cuts.parquet").set_index("cut")
    null = store.artifact(plan["retrain-null"].ref).read_table("features.parquet")
    assert cuts.selected["index_q"] == (null.q <= 0.1).sum()
    paired = store.artifact(plan["align"].ref).read_table("features.parquet")
    assert cuts.selected["pair_q"] == (paired.pair_q <= 0.1).sum()
    assert cuts.share["pair_q"] == pytest.approx((paired.pair_q <= 0.1).sum() / (paired.partner >= 0).sum())
    assert (cuts.right <= cuts.selected).all()
    assert table.recall_pair_q.iloc[0] == pytest.approx(cuts.recall["pair_q"])


@pytest.mark.slow
def test_of_two_identical_models_nothing_is_called(tmp_path):
    """At most 1 % of the alive features, and of the pairs, at q 0.1."""
    same = WORLD.model_copy(update={"appears": 0, "angle": 0.0, "model_angle": 0.0, "jitter": 0.0})
    row = score_world("same", same, RECIPE, Store(str(tmp_path / "store")), device="cpu", progress=QUIET).iloc[0]
    assert row.share_index_q <= 0.01
    assert row.share_pair_q <= 0.01


def test_what_is_there_is_not_computed_again(scored, plan):
    store, table = scored
    ran = []
    execute(plan, store, device="cpu", keep="tables", progress=QUIET, on_done=ran.append)
    assert not ran
    assert score_world("tiny", WORLD, RECIPE, store, device="cpu", progress=QUIET).equals(table)


def test_stages_read_their_cell_and_nulls_go_on_with_it(plan):
    side = {n.ref: n.spec.side for n in plan if isinstance(n.spec, PlantedDiffHarvestSpec)}
    cells = {"D": ("base", True), "M": ("finetuned", False), "F_D": ("finetuned", True), "F_M": ("finetuned", True)}
    cells["F_direct"] = ("finetuned", True)
    for stage, start in STAGE_START.items():
        spec = plan[f"finetune-{stage}"].spec
        assert spec.start == plan["train-S" if start == "S" else f"finetune-{start}"].ref
        assert (side[spec.data.base], spec.data.mix is not None) == cells[stage]
    for stage in ("D", "M"):
        null, real = plan[f"null-{stage}-0"].spec, plan[f"finetune-{stage}"].spec
        assert null.start == plan[f"finetune-{stage}"].ref
        assert null.model_copy(update={"start": real.start}) == real


def test_the_mix_holds_new_rows_of_the_same_model(tmp_path, plan):
    store = Store(str(tmp_path / "store"))
    for name in ("tokenizer", "tokens-heldout-base", "tokens-heldout-new", "mix-heldout"):
        steps.run(plan[name].spec, store, device="cpu", progress=QUIET)
    for name in ("harvest-finetuned-base-heldout", "harvest-finetuned-new-heldout"):
        steps.run(plan[name].spec, store, device="cpu", progress=QUIET)
    reader = ActivationReader(store, plan["statistics-F_D"].spec.data)
    x, (row, _, is_new) = reader.read_shard(0), reader.locate(0)
    assert reader.d == 24
    assert is_new.mean() == pytest.approx(0.2, abs=0.01)
    planted = PlantedDiff(WORLD)
    first = planted.activations(planted.topics("new", "heldout", 0)[:1], "new", "heldout", 0, "finetuned")
    at = row[is_new][0]
    assert torch.equal(x[torch.from_numpy(row == at)], torch.from_numpy(first).to(torch.bfloat16))


def test_two_workers_and_one_write_the_same_activations(tmp_path, plan):
    store = Store(str(tmp_path / "store"))
    for name in ("tokenizer", "tokens-train-base"):
        steps.run(plan[name].spec, store, device="cpu", progress=QUIET)
    spec = plan["harvest-base-base-train"].spec.model_copy(update={"shard_rows": 1024})
    alone = steps.run(spec, store, device="cpu", progress=QUIET)
    whole = store.artifact(alone).array("data").read_rows(0, 4096 * 16)
    store.remove(alone)
    for part in range(2):
        steps.run(spec, store, device="cpu", progress=QUIET, part=(part, 2))
    np.testing.assert_array_equal(store.artifact(alone).array("data").read_rows(0, 4096 * 16), whole)


def test_a_harvest_skips_no_positions(plan):
    body = plan["harvest-base-base-train"].spec.model_dump()
    with pytest.raises(ValidationError, match="skip no positions"):
        PlantedDiffHarvestSpec.model_validate({**body, "skip_positions": (0,)})


def test_world_and_recipe_say_everything_that_decides_a_key(plan):
    usual = {n.name: n.ref for n in plan}
    other = {n.name: n.ref for n in diff_plan(WORLD.model_copy(update={"seed": 2}), RECIPE)}
    assert all(usual[name] != other[name] for name in usual if name != "tokenizer")
    turned = {n.name: n.ref for n in diff_plan(WORLD.model_copy(update={"angle": 40.0}), RECIPE)}
    assert turned["score"] != usual["score"]
    longer = RECIPE.model_copy(update={"finetune": RECIPE.finetune.model_copy(update={"lr": 1e-3})})
    longer_refs = {n.name: n.ref for n in diff_plan(WORLD, longer)}
    assert longer_refs["train-S"] == usual["train-S"]
    assert longer_refs["finetune-D"] != usual["finetune-D"]


def test_medians_leave_out_what_was_not_scored(scored):
    table = scored[1]
    three = [table.assign(seed=s, average_precision=v, undertrained=u) for s, v, u in ((1, 0.2, False), (2, 0.6, False), (3, np.nan, True))]
    middle = diff_medians(pd.concat(three))
    np.testing.assert_allclose(middle.average_precision, 0.4)
    assert set(middle.seeds) == {2}
    assert set(middle.undertrained) == {1}


@pytest.fixture
def cli(monkeypatch, scored):
    """The command with worlds that are scored already."""

    def ladder(rungs, seeds, *_, **__):
        return pd.concat([scored[1].assign(rung=r, seed=s) for r in rungs for s in seeds], ignore_index=True)

    monkeypatch.setattr(diff_ladder, "diff_ladder", ladder)
    app = Typer()
    app.command()(module.command)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_the_command_prints_json_and_a_table_of_every_seed_with_medians(cli):
    printed = json.loads(cli("--seed", "3", "--seed", "4", "--json").output)
    assert {row["seed"] for row in printed["scores"]} == {3, 4}
    assert {row["rung"] for row in printed["medians"]} == {"middle"}
    assert {row["score"] for row in printed["scores"]} == set(SCORES)
    said = cli("--seed", "3", "--seed", "4", "--rung", "small").output
    assert "rung small" in said
    assert said.count("median") == len(SCORES)
    for name in ("paired novelty", "no change", "x + y by index (published)"):
        assert name in said


def test_out_draws_every_scored_seed(cli, scored, tmp_path):
    out = tmp_path / "ladder.png"
    cli("--seed", "3", "--seed", "4", "--out", str(out))
    first = out.read_bytes()
    assert first.startswith(b"\x89PNG")
    cli("--seed", "3", "--seed", "4", "--out", str(out))
    assert out.read_bytes() == first
    twice = pd.concat([scored[1].assign(seed=1), scored[1].assign(seed=2, undertrained=True, average_precision=None)], ignore_index=True)
    panel, lower = diff_figure.figure(twice).axes
    dots = {
        points.get_label(): points.get_offsets()[:, 1].tolist() for points in panel.collections if points.get_label() in SCORES.values()
    }
    novelty = scored[1].set_index(["score", "class"]).average_precision["pair_novelty", "all"]
    assert dots[SCORES["pair_novelty"]] == [novelty]
    assert [tick.get_text() for tick in lower.get_xticklabels()] == ["tiny\n1 of 2 worlds"]


@pytest.mark.parametrize(("more", "said"), [(["--track"], "leave them out"), ([], "cannot be written")])
def test_out_is_refused_before_anything_runs(cli, monkeypatch, tmp_path, more, said):
    monkeypatch.setattr(diff_ladder, "diff_ladder", lambda *_, **__: pytest.fail("something ran"))
    (tmp_path / "file").touch()
    error = cli("--out", str(tmp_path / "file" / "ladder.png"), *more).exception
    assert isinstance(error, UserError)
    assert said in str(error)


def test_all_rungs_can_be_asked_for(cli):
    printed = json.loads(cli("--rung", "all", "--json").output)
    assert {row["rung"] for row in printed["scores"]} == set(DIFF_RUNGS)


def test_an_unknown_rung_is_refused(cli):
    error = cli("--rung", "steep").exception
    assert isinstance(error, UserError)
    assert "small, middle" in str(error)


def test_a_rungs_world_takes_the_seed():
    assert diff_world("rare", 9).seed == 9
