"""The efficiency step: its figures are the upstream artifacts' own, one by one; what is missing is null with a reason."""

import numpy as np
import pandas as pd
import pytest
import torch

from stagediff import steps
from stagediff.errors import UserError
from stagediff.lm.spec import ActivationData, ModelSource, TokenizerSource
from stagediff.progress import Progress
from stagediff.sae.spec import Budget, FinetuneSpec, QualitySpec, StatisticsSpec
from stagediff.spec import Ref
from stagediff.track.spec import EfficiencyRow, EfficiencySpec

DATA = ActivationData(base=Ref("activations/" + "1" * 20), rows=10)
FULL, SHORT = 300_000, 15_000


def run(rows, store):
    return store.artifact(steps.run(EfficiencySpec(rows=tuple(rows)), store, device="cpu", progress=Progress(interactive=False)))


@pytest.fixture
def row(store, bare_chain):
    """A row of the spec with its artifacts; `made`: the dictionary's figures. None for a figure: not measurable."""

    def make(step, how, tokens, ev=0.8, l0=10.0, dead=0.1, recovered=0.9, made=None):
        budget = Budget(tokens=tokens)
        start = Ref("dictionaries/" + "1" * 20)
        bare_chain.commit(store, trained := FinetuneSpec(start=start, data=DATA, budget=budget, seed=step * 10 + len(how)), figures=made)
        statistics = StatisticsSpec(dictionary=trained.ref, data=DATA)
        bare_chain.commit(store, statistics, figures={"explained_variance": ev, "l0": l0, "dead_share": dead, "tokens": 1})
        quality = QualitySpec(dictionary=trained.ref, model=ModelSource(digest="m"), data=DATA)
        table = pd.DataFrame({"group": ["base", "all"], "loss_recovered": [-5.0, recovered]}).astype({"loss_recovered": float})
        bare_chain.commit(store, quality, {"quality.parquet": table})
        return EfficiencyRow(step=step, how=how, tokens=tokens, dictionary=trained.ref, statistics=statistics.ref, quality=quality.ref)

    return make


@pytest.fixture
def rows(row):
    """A chain of four, worse by 0.03 than from scratch at 4 and by 0.1 at 8."""
    scale = {"input_scale": 0.5, "revived": 7}
    return [
        row(8, "chained", SHORT, ev=0.7, dead=0.3, recovered=0.8, made=scale),
        row(0, "chained", FULL, ev=0.9, dead=0.02, recovered=0.95, made=scale),
        row(4, "chained", SHORT, ev=0.82, l0=12.5, dead=0.1, recovered=0.9, made=scale),
        row(2, "chained", SHORT, ev=0.85, dead=0.05, recovered=0.92, made=scale),
        row(4, "scratch_full", FULL, ev=0.85, recovered=0.93),
        row(8, "scratch_full", FULL, ev=0.8, recovered=0.85),
        row(8, "scratch_short", SHORT, ev=0.6, recovered=0.5),
    ]


def test_the_table_holds_every_dictionarys_own_figures(rows, store):
    table = run(rows, store).read_table("quality.parquet")
    assert list(zip(table.step, table.how, strict=True)) == sorted((r.step, r.how) for r in rows)
    mine = table[(table.step == 4) & (table.how == "chained")].iloc[0]
    assert (mine.tokens, mine.explained_variance, mine.l0, mine.dead, mine.loss_recovered) == (SHORT, 0.82, 12.5, 0.1, 0.9)
    assert (mine.input_scale, mine.revived) == (0.5, 7)
    assert table[["input_scale", "revived"]][table.how != "chained"].isna().all(axis=None)
    assert table.reason.isna().all()
    assert list(table.attrs["columns"]) == list(table.columns)


def test_the_chain_is_compared_where_there_is_another(rows, store):
    artifact = run(rows, store)
    table = artifact.read_table("compared.parquet")
    assert list(zip(table.step, table.how, strict=True)) == [(4, "scratch_full"), (8, "scratch_full"), (8, "scratch_short")]
    assert table.ev_chained.tolist() == [0.82, 0.7, 0.7]
    assert table.ev_other.tolist() == [0.85, 0.8, 0.6]
    assert table.ev_gap.tolist() == pytest.approx([-0.03, -0.1, 0.1])
    assert table.loss_recovered_gap.tolist() == pytest.approx([-0.03, -0.05, 0.3])
    figures = artifact.manifest.figures
    assert figures["ev_gap_largest"] == pytest.approx(0.1)
    assert figures["ev_gap_largest_step"] == 8
    assert figures["ev_gap_largest_short"] == pytest.approx(-0.1)
    assert (figures["ev_lowest_chained"], figures["ev_lowest_chained_step"]) == (0.7, 8)
    assert (figures["dead_largest_chained"], figures["dead_largest_chained_step"]) == (0.3, 8)
    assert figures["tokens_chained"] == FULL + 3 * SHORT
    assert figures["tokens_share"] == pytest.approx((FULL + 3 * SHORT) / (4 * FULL))


def test_the_chains_own_start_is_no_proof_that_it_keeps_up(row, store):
    """There it is a dictionary from scratch itself, equal to scratch_full."""
    made = [row(0, "chained", FULL, ev=0.9), row(0, "scratch_full", FULL, ev=0.9)]
    made += [row(4, "chained", SHORT, ev=0.87), row(4, "scratch_full", FULL, ev=0.85)]
    artifact = run(made, store)
    assert artifact.read_table("compared.parquet").ev_gap.tolist() == pytest.approx([0, 0.02])
    assert artifact.manifest.figures["ev_gap_largest"] == pytest.approx(-0.02)
    assert artifact.manifest.figures["ev_gap_largest_step"] == 4


def test_a_chain_alone_is_compared_with_nothing(row, store):
    artifact = run([row(0, "chained", FULL), row(1, "chained", SHORT)], store)
    assert len(artifact.read_table("compared.parquet")) == 0
    figures = artifact.manifest.figures
    assert figures["ev_gap_largest"] is None
    assert figures["tokens_share"] == pytest.approx((FULL + SHORT) / (2 * FULL))


def test_what_cannot_be_measured_is_null_with_a_reason(row, store):
    table = run([row(0, "chained", FULL, ev=None), row(1, "chained", SHORT, recovered=None)], store).read_table("quality.parquet")
    assert table.explained_variance.isna().tolist() == [True, False]
    assert table.loss_recovered.isna().tolist() == [False, True]
    assert table.reason.tolist() == ["the activations do not vary", "replacing the activations by their mean costs the model nothing"]


def test_two_dictionaries_of_one_sort_at_a_step_are_refused(row, store):
    with pytest.raises(UserError, match="Step 3 has two dictionaries of the sort chained"):
        run([row(3, "chained", FULL), row(3, "chained", SHORT)], store)


def test_no_dictionaries_are_refused(store):
    with pytest.raises(UserError, match="no dictionary to compare"):
        run([], store)


def test_quality_without_a_row_for_all_groups_is_refused(row, store, bare_chain):
    good = row(0, "chained", FULL)
    other = QualitySpec(dictionary=good.dictionary, model=ModelSource(digest="other"), data=DATA)
    bare_chain.commit(store, other, {"quality.parquet": pd.DataFrame({"group": ["base"], "loss_recovered": [0.5]})})
    with pytest.raises(UserError, match="no row for all groups"):
        run([good.model_copy(update={"quality": other.ref})], store)


def test_figures_of_really_computed_statistics_are_those_of_the_probe_rows(store, probe_chain, encoded_chain, bare_chain):
    """Explained variance, L0 and dead share of a real dictionary on real activations, against float64 arithmetic."""
    rng = np.random.default_rng(0)
    rows, context, d, F = 40, 9, 6, 10
    x = torch.from_numpy(rng.normal(size=(rows * (context - 1), d))).to(torch.bfloat16).float()
    chain = probe_chain.ProbeChain(store, rng.integers(0, 5, (rows, context)), x, TokenizerSource(digest="t"))
    encoder = torch.from_numpy(rng.normal(size=(d, F))).float()
    bias = torch.full((F,), -1.0)
    bias[[3, 7]] = -1000  # never fire
    sae = encoded_chain.dictionary(encoder, bias)
    point = encoded_chain.add_point(chain, 0, x, sae)
    quality = QualitySpec(dictionary=point.dictionary, model=ModelSource(digest="m"), data=ActivationData(base=point.probe, rows=rows))
    bare_chain.commit(store, quality, {"quality.parquet": pd.DataFrame({"group": ["all"], "loss_recovered": [0.5]})})
    spec = EfficiencyRow(step=0, how="chained", tokens=FULL, dictionary=point.dictionary, statistics=point.statistics, quality=quality.ref)
    found = run([spec], store).read_table("quality.parquet").iloc[0]
    codes = encoded_chain.plain_codes(sae, x.double().numpy())
    error = codes @ sae.W_dec.double().numpy() - x.double().numpy()
    spread = x.double().numpy() - x.double().numpy().mean(0)
    assert found.explained_variance == pytest.approx(1 - (error**2).sum() / (spread**2).sum(), abs=1e-5)
    assert found.l0 == pytest.approx((codes > 0).sum(1).mean())
    assert found.dead == pytest.approx((~(codes > 0).any(0)).mean()) == 0.2
