"""The UMAP step: which features and checkpoints are shown, that every datapoint has its place, planted clusters, and the same bytes for the same seed."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import cdist, pdist

from stagediff import steps
from stagediff.errors import UserError
from stagediff.lm.spec import TokenizerSource
from stagediff.progress import Progress
from stagediff.store import Store
from stagediff.track.spec import KINDS, FormationRule, FormationSpec, KindsSpec, UmapRule, UmapSpec
from stagediff.track.umap import choose, spread

ROWS, CONTEXT, D, F = 40, 9, 16, 5
PER_ROW = CONTEXT - 1
STEPS = (0, 1, 2, 8)
KIND = ["token", "concept", "dead", "noise", "token"]
SHARED = 9
"""A position that is a datapoint of features 0 and 1."""


def members(feature):
    """Flat places of a feature's datapoints: set top, and set levels, which has two of them again."""
    start = 30 * feature
    return [*range(start, start + 12), SHARED], [*range(start + 10, start + 20)]


@pytest.fixture(scope="module")
def made(probe_chain, encoded_chain, tmp_path_factory):
    """(store, spec): at the last checkpoint a feature's datapoints are alike, at the first nothing is. Formation and kinds are written by hand."""
    store, rng = Store(str(tmp_path_factory.mktemp("umap"))), np.random.default_rng(0)
    chain = probe_chain.ProbeChain(store, np.zeros((ROWS, CONTEXT)), torch.zeros(ROWS * PER_ROW, 2), TokenizerSource(digest="t"))
    noise, centres = rng.normal(size=(ROWS * PER_ROW, D)), 4 * rng.normal(size=(F, D))
    sae = encoded_chain.dictionary(torch.randn(D, F, generator=torch.Generator().manual_seed(0)), 0.0)
    points = []
    for t, step in enumerate(STEPS):
        x = noise + 0.2 * rng.normal(size=noise.shape)
        for i in range(F):
            x[30 * i : 30 * i + 20] += t / 3 * centres[i]
        points.append(encoded_chain.add_point(chain, step, torch.from_numpy(x).float(), sae))
    kinds = KindsSpec(points=tuple(points), tokenizer=chain.tokenizer, reference=chain.reference)
    formation = FormationSpec(points=tuple(points), rule=FormationRule(datapoints=13, random=25))
    write(store, kinds, kinds=pd.DataFrame({"feature": np.arange(F), "step": STEPS[-1], "kind": KIND}))
    write(store, formation, **formation_tables())
    return store, UmapSpec(points=tuple(points), formation=formation.ref, kinds=kinds.ref, rule=UmapRule(count=2, checkpoints=3))


def formation_tables():
    parts = []
    for i in range(F):
        for name, at in zip(("top", "levels"), members(i), strict=True):
            row, place = np.divmod(np.array(at), PER_ROW)
            parts.append(
                pd.DataFrame({"feature": i, "set": name, "rank": np.arange(len(at)), "level": 0, "row": row, "position": place + 1})
            )
    random = np.arange(200, 225)
    formed = pd.DataFrame(
        [
            (i, which, measure, m, 13)
            for which in ("top", "levels")
            for measure in ("activation_cosine", "feature_cosine")
            for i, m in enumerate([0.5, 0.6, 0.9, 0.7, 0.4] if (which, measure) == ("top", "activation_cosine") else range(F))
        ],
        columns=["feature", "set", "measure", "final_m", "datapoints"],
    )
    places = pd.DataFrame({"row": random // PER_ROW, "position": random % PER_ROW + 1})
    return {"regions": pd.concat(parts, ignore_index=True), "random": places, "formed": formed}


def write(store, spec, **tables):
    with store.write(spec) as w:
        for name, table in tables.items():
            w.write_table(f"{name}.parquet", table)
        w.commit(figures={})


def run(spec, store, **settings):
    steps.run(spec, store, device="cpu", progress=Progress(interactive=False), **settings)
    return store.artifact(spec.ref)


@pytest.fixture(scope="module")
def maps(made):
    store, spec = made
    return run(spec, store)


def test_features_are_chosen_by_turns_from_the_kinds_by_final_progress():
    kind = np.array([KINDS.index(k) for k in ("token", "token", "token", "concept", "noise", "dead", "concept")] + [-1])
    m = np.array([0.5, 0.9, 0.95, 0.3, 0.1, 0.99, np.nan, 0.99])
    datapoints = np.array([25, 25, 4, 25, 25, 25, 0, 25])
    assert choose(UmapRule(count=2), kind, m, datapoints, 25).tolist() == [1, 3]  # 2 has more, but of few datapoints
    assert choose(UmapRule(count=4), kind, m, datapoints, 25).tolist() == [0, 1, 3, 4]
    assert choose(UmapRule(count=99), kind, m, datapoints, 25).tolist() == [0, 1, 2, 3, 4]
    assert choose(UmapRule(features=(7, 5)), kind, m, datapoints, 25).tolist() == [5, 7]
    with pytest.raises(UserError, match=r"names \[8\], but the chain has features 0 to 7"):
        choose(UmapRule(features=(8,)), kind, m, datapoints, 25)
    with pytest.raises(UserError, match=r"names \[6\], which are never active"):
        choose(UmapRule(features=(6, 1)), kind, m, datapoints, 25)
    with pytest.raises(UserError, match="nothing to show"):
        choose(UmapRule(), np.full(3, -1), m[:3], datapoints[:3], 25)


@pytest.mark.parametrize(
    ("checkpoints", "count", "expected"),
    [(12, 5, [0, 3, 6, 8, 11]), (12, 1, [11]), (3, 5, [0, 1, 2]), (30, 2, [0, 29])],
)
def test_checkpoints_are_spread_over_the_chain_with_the_last_one(checkpoints, count, expected):
    assert spread(checkpoints, count) == expected


@pytest.mark.slow
def test_every_datapoint_has_one_place_in_every_map(made, maps):
    table = maps.read_table("umap.parquet")
    assert maps.read_table("features.parquet").to_dict("list") == {
        "feature": [0, 1],
        "kind": ["token", "concept"],
        "why": ["largest final M of its kind"] * 2,
    }
    assert set(zip(table.fit, table.step, strict=True)) == {(fit, step) for fit in ("apart", "aligned") for step in (0, 2, 8)}
    for _, of in table.groupby(["fit", "step"], observed=True):
        flat = of.row * PER_ROW + of.position - 1
        for i in (0, 1):
            assert sorted(flat[of.feature == i]) == sorted({*members(i)[0], *members(i)[1]})
        assert sorted(flat[of.feature == -1]) == list(range(200, 225))
        assert np.isfinite(of[["u", "v"]].to_numpy()).all()
        both = of[flat == SHARED]
        assert both.feature.tolist() == [0, 1]
        assert both.u.nunique() == both.v.nunique() == 1
    assert maps.manifest.figures == {"features": 2, "positions": 20 + 20 + 25, "checkpoints": 3}  # fewer than the 100 neighbours asked for


@pytest.mark.slow
def test_datapoints_that_become_alike_come_together(maps):
    table = maps.read_table("umap.parquet")
    table = table[(table.feature >= 0) & (table.row * PER_ROW + table.position - 1 != SHARED)]

    def apartness(fit, step):
        """Distance between the two features' datapoints over that within one."""
        of = table[(table.fit == fit) & (table.step == step)]
        one, two = (of[of.feature == i][["u", "v"]].to_numpy() for i in (0, 1))
        return cdist(one, two).mean() / np.mean([pdist(one).mean(), pdist(two).mean()])

    for fit in ("apart", "aligned"):
        assert apartness(fit, 8) > 2
        assert apartness(fit, 0) < 1.5


@pytest.mark.slow
def test_aligned_points_whose_neighbours_stay_can_be_followed(maps):
    table = maps.read_table("umap.parquet")
    of = table[table.fit == "aligned"].drop_duplicates(["step", "row", "position"]).sort_values(["step", "row", "position"])
    before, after = (of[of.step == step][["u", "v"]].to_numpy() for step in (2, 8))  # between them the clusters only sharpen
    assert np.linalg.norm(after - before, axis=1).mean() < 0.5 * cdist(before, after).mean()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(made, maps):
    store, spec = made
    assert run(spec, store, force=True).manifest.same_bytes


@pytest.mark.slow
def test_a_single_checkpoint_is_the_last_one_and_has_nothing_to_be_aligned_with(made):
    store, spec = made
    alone = run(spec.model_copy(update={"rule": UmapRule(features=(3,), checkpoints=1, neighbors=5)}), store)
    table = alone.read_table("umap.parquet")
    assert table.fit.unique().tolist() == ["apart"]
    assert table.step.unique().tolist() == [8]
    assert alone.read_table("features.parquet").why.tolist() == ["named in the settings"]


@pytest.mark.slow
def test_the_aligned_fit_may_be_left_out(made):
    store, spec = made
    apart = run(spec.model_copy(update={"rule": UmapRule(features=(3,), checkpoints=2, neighbors=5, aligned=False)}), store)
    assert apart.read_table("umap.parquet").fit.unique().tolist() == ["apart"]
    assert UmapRule(aligned=True).identity() == {k: v for k, v in UmapRule(aligned=False).identity().items() if k != "aligned"}


def test_a_formation_of_other_checkpoints_is_refused(made):
    store, spec = made
    with pytest.raises(UserError, match="no formation of these checkpoints"):
        run(spec.model_copy(update={"points": spec.points[1:]}), store)
    with pytest.raises(UserError, match="no formation of these checkpoints"):
        run(spec.model_copy(update={"formation": spec.kinds}), store)


def test_kinds_of_another_chain_are_refused(made):
    store, spec = made
    kinds = store.artifact(spec.kinds).spec().model_copy(update={"points": spec.points[1:]})
    write(store, kinds, kinds=pd.DataFrame({"feature": np.arange(F + 1), "step": STEPS[-1], "kind": "noise"}))
    with pytest.raises(UserError, match="another chain"):
        run(spec.model_copy(update={"kinds": kinds.ref}), store)


def test_too_few_positions_are_refused(made):
    store, spec = made
    formation = store.artifact(spec.formation).spec().model_copy(update={"rule": FormationRule(datapoints=4, random=3)})
    tables = formation_tables()
    write(
        store,
        formation,
        regions=tables["regions"].query("rank < 3 and set == 'top'").reset_index(drop=True),
        random=tables["random"][:3],
        formed=tables["formed"],
    )
    with pytest.raises(UserError, match="9 positions; a map needs 10"):
        run(spec.model_copy(update={"formation": formation.ref}), store)
