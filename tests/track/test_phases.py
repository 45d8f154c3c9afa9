"""The phases step on written kinds and drifts: planted boundaries, no boundaries, and the series against plain counting."""

import numpy as np
import pytest

from stagediff import steps
from stagediff.errors import UserError
from stagediff.progress import Progress
from stagediff.store import Store
from stagediff.track.bootstrap import resamples
from stagediff.track.changepoints import AXES
from stagediff.track.phases import SERIES, resampled_series
from stagediff.track.spec import KINDS, PhaseRule, PhasesSpec

STEPS = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 4000]
T = len(STEPS)
DEAD = KINDS.index("dead")
KIND_NAMES = np.array([*KINDS, None], object)


def drawn(shares: np.ndarray, features: int, rng: np.random.Generator) -> np.ndarray:
    """[F, T] codes; shares [T, 4] of token, concept, noise, dead. A feature keeps its place in the order of kinds, as real ones do."""
    place = rng.random(features)[:, None] * 0.7 + rng.random((features, len(shares))) * 0.3
    place = place.argsort(0).argsort(0) / features
    return (place[..., None] >= shares.cumsum(1)[None]).sum(2).clip(max=3)


def three_phases(features: int, seed: int, starts: tuple[int, int] = (5, 10)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    phase = np.searchsorted(starts, np.arange(T), side="right")
    shares = np.array([[0.5, 0.0, 0.3, 0.2], [0.4, 0.25, 0.25, 0.1], [0.3, 0.45, 0.2, 0.05]])[phase]
    drift = np.array([0.5, 0.2, 0.05])[phase] * rng.lognormal(0, 0.5, (features, T))
    return drawn(shares, features, rng), drift


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(str(tmp_path_factory.mktemp("phases") / "store"))


@pytest.fixture(scope="module")
def points(store, bare_chain):
    return tuple(bare_chain.point(store, step, np.eye(3), np.full(3, 50)) for step in STEPS)


@pytest.fixture
def compute(store, points, bare_chain):
    """(codes [F, T], drift [F, T], seed, checkpoints, rule) -> the artifact. Every test takes seeds of its own."""

    def run(codes: np.ndarray, drift: np.ndarray, seed: int, at: slice = slice(None), **rule: int):
        mine = points[at]
        cosine = 1 - drift[:, at]
        cosine[:, 0] = np.nan
        kinds = bare_chain.kinds_table(store, mine, KIND_NAMES[codes[:, at]], seed)
        moved = bare_chain.drift_table(store, mine, cosine, codes[:, at] != DEAD, seed)
        spec = PhasesSpec(points=mine, kinds=kinds, drift=moved, rule=PhaseRule(**{"bootstrap": 60, **rule}), seed=seed)
        return store.artifact(steps.run(spec, store, device="cpu", progress=Progress(interactive=False)))

    return run


@pytest.mark.parametrize("seed", range(5))
def test_planted_phases_are_found_within_one_checkpoint(compute, seed):
    artifact = compute(*three_phases(400, seed), seed)
    table = artifact.read_table("phases.parquet")
    assert table.reason.isna().all()
    assert list(zip(table.axis, table.boundary, strict=True)) == [(axis, b) for axis in AXES for b in (1, 2)]
    for row in table[table.axis != "step"].itertuples():
        true = (5, 10)[row.boundary - 1]
        assert abs(STEPS.index(row.at_step) - true) <= 1
        assert abs(STEPS.index(row.low) - true) <= 1
        assert abs(STEPS.index(row.high) - true) <= 1
        assert row.gain > max(row.gain_shuffled, row.gain_trend)
    figures = artifact.manifest.figures
    assert figures["index_1"] == table.at_step[0]
    assert figures["log_step_2_high"] == table.high[5]
    assert figures["index_gain"] == table.gain[0]
    places = table.at_step.map(STEPS.index).to_numpy().reshape(3, 2)
    assert figures["checkpoints_between_axes"] == np.ptp(places, axis=0).max()


def test_phases_that_only_the_choice_of_checkpoints_makes_show_on_the_index_axis_alone(compute):
    """A steady change along the steps: dense early checkpoints make a flat stretch and a jump of it, which the step axis knows to be a line."""
    t = np.array(STEPS) / STEPS[-1]
    rng = np.random.default_rng(11)
    codes = drawn(np.stack([0.6 - 0.4 * t, 0.1 + 0.3 * t, 0.2 + 0 * t, 0.1 + 0.1 * t], axis=1), 2000, rng)
    drift = np.repeat((0.4 - 0.3 * t)[None], 2000, 0) * rng.lognormal(0, 0.1, (2000, T))
    artifact = compute(codes, drift, 11, phases=2)
    gain = artifact.read_table("phases.parquet").set_index("axis")[["gain", "gain_trend"]]
    assert gain.gain["index"] > gain.gain_trend["index"] + 0.05
    assert gain.gain["step"] == pytest.approx(gain.gain_trend["step"], abs=0.05)
    assert artifact.manifest.figures["step_1"] >= artifact.manifest.figures["index_1"]


@pytest.mark.parametrize("seed", range(20, 24))
def test_without_a_change_intervals_are_wide_and_the_gain_is_that_of_scatter(compute, seed):
    rng = np.random.default_rng(seed)
    codes = rng.choice(4, (300, T), p=[0.4, 0.3, 0.2, 0.1])
    drift = 0.1 * rng.lognormal(0, 0.5, (300, T))
    table = compute(codes, drift, seed).read_table("phases.parquet")
    index = table[table.axis == "index"]
    width = index.high.map(STEPS.index) - index.low.map(STEPS.index)
    assert width.max() >= 4
    assert (index.gain < index.gain_trend).all()
    planted = compute(*three_phases(300, seed), seed + 100).read_table("phases.parquet")
    assert index.gain.max() < 0.5 * planted.gain[planted.axis == "index"].min()


def test_a_steady_change_gains_what_a_straight_line_gains(compute):
    rng = np.random.default_rng(0)
    t = np.linspace(0, 1, T)
    shares = np.stack([0.5 - 0.2 * t, 0.1 + 0.3 * t, 0.3 - 0.1 * t, 0.1 + 0 * t], axis=1)
    codes = drawn(shares, 2000, rng)
    drift = np.repeat((0.4 - 0.3 * t)[None], 2000, 0) * rng.lognormal(0, 0.1, (2000, T))
    table = compute(codes, drift, 30).read_table("phases.parquet")
    index = table[table.axis == "index"]
    assert index.gain.iloc[0] == pytest.approx(index.gain_trend.iloc[0], abs=0.1)


def plain_series(codes: np.ndarray, drift: np.ndarray) -> np.ndarray:
    """[T, 5] by copying features one by one."""
    out = np.full((codes.shape[1], 5), np.nan)
    for t in range(codes.shape[1]):
        alive = [c for c in codes[:, t] if c in (0, 1, 2)]
        for kind in range(3):
            out[t, kind] = alive.count(kind) / len(alive) if alive else np.nan
        out[t, 3] = list(codes[:, t]).count(3) / len(codes)
        moves = [v for v in drift[:, t] if np.isfinite(v)]
        out[t, 4] = np.median(moves) if moves else np.nan
    return out


def test_resampled_series_equal_those_of_copied_features():
    rng = np.random.default_rng(1)
    codes = rng.choice([-1, 0, 1, 2, 3], (40, 6)).astype(np.int8)
    codes[:, 4] = 3
    drift = rng.gamma(2, 0.1, (40, 6))
    drift[rng.random((40, 6)) < 0.3] = np.nan
    drift[:, 0] = np.nan
    counts = np.concatenate(list(resamples(40, 25, seed=0)))
    found = np.concatenate(list(resampled_series(codes, drift, iter([counts[:10], counts[10:]]))))
    for count, mine in zip(counts, found, strict=True):
        copied = np.repeat(np.arange(40), count)
        assert mine == pytest.approx(plain_series(codes[copied], drift[copied]), nan_ok=True)


def test_the_series_table_counts_alive_and_dead_apart(compute):
    codes, drift = three_phases(200, 40)
    codes[:15, 6] = -1  # too few examples there
    table = compute(codes, drift, 40).read_table("series.parquet")
    assert list(table.series[:5]) == list(SERIES)
    drift[:, 0] = np.nan
    drift[:, 1:][(codes[:, 1:] == DEAD) | (codes[:, :-1] == DEAD)] = np.nan
    assert table.value.to_numpy().reshape(T, 5) == pytest.approx(plain_series(codes, drift), nan_ok=True)
    known = table[table.value.notna()]
    assert (known.low <= known.high).all()
    assert ((known.low <= known.value) & (known.value <= known.high)).mean() > 0.9
    missing = table[table.value.isna()]
    assert missing[["step", "series", "reason"]].values.tolist() == [[0, "drift", "the first checkpoint has none before it"]]
    assert table.reason.drop(missing.index).isna().all()


def test_the_first_checkpoints_missing_drift_makes_no_boundary(compute):
    """Nothing but drift changes, at checkpoint 7: with the first one at 0 instead of left out, a phase would begin at 2."""
    rng = np.random.default_rng(2)
    codes = np.zeros((100, T), int)
    drift = np.where(np.arange(T) < 7, 0.3, 0.1) * rng.lognormal(0, 0.01, (100, T))
    table = compute(codes, drift, 50, phases=2).read_table("phases.parquet")
    assert table.at_step[table.axis == "index"].tolist() == [STEPS[7]]


@pytest.mark.parametrize("count", [2, 5])
def test_too_few_checkpoints_are_said_so(compute, count):
    artifact = compute(*three_phases(50, 60), 60 + count, at=slice(count))
    table = artifact.read_table("phases.parquet")
    assert len(table) == 6
    assert set(table.reason) == {f"{count} checkpoints are too few for 3 phases: at least 6 are needed"}
    assert table[["at_step", "low", "high", "gain"]].isna().all(axis=None)
    assert artifact.manifest.figures["reason"] == table.reason[0]
    assert len(artifact.read_table("series.parquet")) == 5 * count


def test_as_few_checkpoints_as_can_be_cut_are(compute):
    table = compute(*three_phases(50, 70), 70, at=slice(6)).read_table("phases.parquet")
    assert table.at_step.map(STEPS.index).tolist() == [2, 4] * 3


def test_series_that_never_change_are_said_so(compute):
    codes = np.tile(np.arange(40)[:, None] % 4, (1, T))
    table = compute(codes, np.full((40, T), 0.2), 80).read_table("phases.parquet")
    assert set(table.reason) == {"no series changes over the checkpoints"}


def test_every_column_has_a_meaning(compute):
    artifact = compute(*three_phases(50, 90), 90)
    for name in ("phases.parquet", "series.parquet"):
        table = artifact.read_table(name)
        assert list(table.attrs["columns"]) == list(table.columns)


def test_tables_of_other_checkpoints_or_features_are_refused(store, points, bare_chain):
    codes, drift = three_phases(50, 95)
    kinds = bare_chain.kinds_table(store, points, KIND_NAMES[codes], 95)
    moved = bare_chain.drift_table(store, points, 1 - drift, codes != DEAD, 95)
    smaller = bare_chain.drift_table(store, points, 1 - drift[:49], codes[:49] != DEAD, 96)
    progress = Progress(interactive=False)
    with pytest.raises(UserError, match="kinds .* are of the checkpoints"):
        steps.run(PhasesSpec(points=points[:-1], kinds=kinds, drift=moved), store, device="cpu", progress=progress)
    with pytest.raises(UserError, match="50 features, .* has 49"):
        steps.run(PhasesSpec(points=points, kinds=kinds, drift=smaller), store, device="cpu", progress=progress)
