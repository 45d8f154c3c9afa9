"""The step kinds: planted features, hand-made cases of the rule, likeness and its null against float64 loops."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from stagediff import steps
from stagediff.errors import UserError
from stagediff.lm.activations import ActivationReader
from stagediff.lm.spec import ActivationData, HookPoint
from stagediff.progress import Progress
from stagediff.store import Store
from stagediff.track.kinds import REASONS, decide, heaviest
from stagediff.track.likeness import PairLikeness, ReferenceSpace
from stagediff.track.random_sets import RandomSets, set_sizes
from stagediff.track.spec import KINDS, KindRule, KindsSpec
from stagediff.track.vocabulary import ProbeTokens, token_names

ROWS, CONTEXT, WORDS = 160, 9, 120
PER_ROW = CONTEXT - 1
CONCEPTS, MEMBERS = 8, 6
"""Ids 0 … 47: eight concepts of six ids each, whose reference vectors share a direction."""
QUIET = Progress(interactive=False)


def planted_space(rng, d=24):
    """Token ids [ROWS, CONTEXT] and reference vectors [ROWS * PER_ROW, d]: a common mean, a direction per id, one per concept, and noise."""
    ids = rng.integers(0, WORDS, (ROWS, CONTEXT))
    of_id, of_concept = rng.normal(size=(WORDS, d)), rng.normal(size=(CONCEPTS, d))
    x = 4 * rng.normal(size=d) + 0.7 * of_id[ids] + 0.4 * rng.normal(size=(ROWS, CONTEXT, d))
    in_concept = ids < CONCEPTS * MEMBERS
    x[in_concept] += 0.9 * of_concept[ids[in_concept] // MEMBERS]
    return ids, torch.from_numpy(x[:, 1:].reshape(-1, d)).float()


def pick(rng, ids, wanted, n):
    """n places (row, position), each in a row of its own and not at position 0, that hold one of the wanted ids."""
    row, position = np.nonzero(np.isin(ids[:, 1:], wanted))
    order = rng.permutation(len(row))
    rows, first = np.unique(row[order], return_index=True)
    chosen = rng.permutation(len(rows))[:n]
    return rows[chosen], position[order][first][chosen] + 1


def planted_features(rng, ids, each=20, n=25):
    """(examples, kind of every feature). Polysemic features and features at random positions are noise."""
    parts, kinds = [], []
    concept_ids = np.arange(CONCEPTS * MEMBERS).reshape(CONCEPTS, MEMBERS)
    for i in range(4 * each):
        what = ("token", "concept", "polysemic", "random")[i % 4]
        two = rng.choice(np.arange(CONCEPTS * MEMBERS, WORDS), 2, replace=False)
        wanted = {"token": two[:1], "concept": concept_ids[rng.integers(CONCEPTS)], "polysemic": two, "random": np.arange(WORDS)}[what]
        row, position = pick(rng, ids, wanted, n)
        parts.append(pd.DataFrame({"feature": i, "activation": 1 + rng.random(len(row)), "row": row, "position": position}))
        kinds.append("noise" if what in ("polysemic", "random") else what)
    return pd.concat(parts, ignore_index=True).astype({"activation": "float32"}), np.array(kinds)


@pytest.fixture(scope="module")
def words(probe_chain, tmp_path_factory):
    return probe_chain.word_tokenizer(tmp_path_factory.mktemp("tokenizer"), [f"w{i}" for i in range(WORDS)])


@pytest.fixture(scope="module")
def made(probe_chain, tmp_path_factory, words):
    """(chain, spec, kinds planted at both steps). The second step has the first one's features in another order."""
    rng, store = np.random.default_rng(0), Store(str(tmp_path_factory.mktemp("made")))
    ids, x = planted_space(rng)
    chain = probe_chain.ProbeChain(store, ids, x, words)
    points, kinds = [], []
    for step in (0, 10):
        examples, kind = planted_features(rng, ids)
        shuffled = rng.permutation(len(kind))
        examples["feature"] = shuffled[examples.feature]
        firings = np.full(len(kind), 40)
        points.append(chain.point(step, examples, firings))
        kinds.append(kind[np.argsort(shuffled)])
    return chain, KindsSpec(points=tuple(points), tokenizer=words, reference=chain.reference), kinds


def run(store, spec):
    artifact = store.artifact(steps.run(spec, store, device="cpu"))
    return artifact.read_table("kinds.parquet"), artifact


def space_of(chain):
    return ReferenceSpace(ActivationReader(chain.store, ActivationData(base=chain.reference, rows=chain.rows)), QUIET)


def centred_units(chain):
    """[positions, d] float64."""
    x = chain.vectors.double().numpy()
    x = x - x.mean(0)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def brute_likeness(units, at, token):
    cosines = [units[at[e]] @ units[at[f]] for e, f in combinations(range(len(at)), 2) if token[e] != token[f]]
    return np.mean(cosines) if cosines else np.nan


# --- planted features ---------------------------------------------------------------------------------------------------------------------


def test_planted_kinds_are_found_over_several_seeds(probe_chain, tmp_path, words):
    right, of = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for seed in range(4):
        rng = np.random.default_rng(100 + seed)
        store = Store(str(tmp_path / str(seed)))
        ids, x = planted_space(rng)
        chain = probe_chain.ProbeChain(store, ids, x, words)
        examples, kind = planted_features(rng, ids, each=30)
        points = [chain.point(step, examples, np.full(len(kind), 40)) for step in (0, 1)]
        table, _ = run(store, KindsSpec(points=tuple(points), tokenizer=words, reference=chain.reference, seed=seed))
        found = table[table.step == 0].kind.to_numpy()
        for name in ("token", "concept", "noise"):
            right[name] += int((found[kind == name] == name).sum())
            of[name] += int((kind == name).sum())
    assert min(of["token"], of["concept"], of["noise"]) >= 100
    for name in ("token", "concept", "noise"):
        assert right[name] / of[name] > 0.95, (right, of)


def test_two_unrelated_tokens_are_no_concept_where_few_directions_hold_most_of_the_variance(probe_chain, store, words):
    """There, two tokens' vectors are often alike by chance: compared with sets of 25 positions, such features would pass."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, WORDS, (ROWS, CONTEXT))
    spectrum = np.array([3.0, 3, 2, 2, 1, 1, 1, 1])
    x = (rng.normal(size=(WORDS, 8))[ids] + 0.3 * rng.normal(size=(ROWS, CONTEXT, 8))) * spectrum
    chain = probe_chain.ProbeChain(store, ids, torch.from_numpy(x[:, 1:].reshape(-1, 8)).float(), words)
    features, examples = 200, []
    for i in range(features):
        row, position = pick(rng, ids, rng.choice(WORDS, 2, replace=False), 16)
        examples.append(pd.DataFrame({"feature": i, "activation": 1 + rng.random(len(row)), "row": row, "position": position}))
    table = pd.concat(examples, ignore_index=True)
    points = tuple(chain.point(step, table, np.full(features, 40)) for step in (0, 1))
    found, _ = run(store, KindsSpec(points=points, tokenizer=words, reference=chain.reference))
    found = found[(found.step == 0) & (found.token_share < 0.8)]
    assert len(found) > 150
    assert (found.set_size == 2).all()
    assert (found.kind == "concept").mean() <= 0.03

    null = RandomSets(space_of(chain), ids[:, 1:].astype(np.int32), 1000, 16, 0)
    mean, p = null.compare(found.likeness.to_numpy(), np.full(len(found), 16))
    assert ((found.likeness - mean >= 0.1) & (p <= 0.01)).mean() > 0.2


# --- the tables ---------------------------------------------------------------------------------------------------------------------------


def test_measures_equal_float64_loops(made):
    chain, spec, _ = made
    table, _ = run(chain.store, spec)
    units = centred_units(chain)
    for point in spec.points:
        examples = chain.store.artifact(point.statistics).read_table("examples.parquet")
        own = table[table.step == point.step].set_index("feature")
        for feature, of in examples.groupby("feature"):
            token = chain.ids[of.row, of.position]
            mass = {t: of.activation.to_numpy(float)[token == t].sum() for t in set(token)}
            best = max(mass, key=mass.get)
            row = own.loc[feature]
            assert (row.token_id, row.token, row.distinct_tokens, row.examples) == (best, f"w{best}", len(mass), len(of))
            assert row.token_share == pytest.approx(mass[best] / sum(mass.values()), rel=1e-9)
            expected = brute_likeness(units, (of.row * PER_ROW + of.position - 1).to_numpy(), token)
            assert row.likeness == pytest.approx(expected, abs=1e-5, nan_ok=True)


def test_the_table_follows_its_contract(made):
    chain, spec, kinds = made
    table, artifact = run(chain.store, spec)
    columns = "feature step kind token token_id token_share distinct_tokens likeness set_size likeness_random likeness_p examples reason"
    assert list(table.columns) == columns.split()
    assert set(table.attrs["columns"]) == set(table.columns)
    assert len(table) == 2 * len(kinds[0])
    assert table.feature.tolist() == [*range(len(kinds[0]))] * 2
    assert set(table.reason.dropna()) <= {"one token only"}
    assert (table.reason == "one token only").equals(table.likeness.isna())
    shares = artifact.read_table("shares.parquet").set_index(["step", "kind"])
    for step in (0, 10):
        for kind in KINDS:
            count = int(((table.step == step) & (table.kind == kind)).sum())
            assert shares.loc[(step, kind), "count"] == count
            assert shares.loc[(step, kind), "share"] == pytest.approx(count / len(kinds[0]))
    figures = artifact.manifest.figures
    assert figures["concept_final"] == shares.loc[(10, "concept"), "count"]
    assert figures["token_first"] == shares.loc[(0, "token"), "count"]


def test_the_same_spec_gives_the_same_bytes_and_another_seed_other_random_sets(made, tmp_path):
    chain, spec, _ = made
    first, artifact = run(chain.store, spec)
    before = artifact.read_bytes("kinds.parquet")
    steps.run(spec, chain.store, device="cpu", force=True)
    assert chain.store.artifact(spec.ref).read_bytes("kinds.parquet") == before
    other, _ = run(chain.store, spec.model_copy(update={"seed": 1}))
    assert other.likeness.equals(first.likeness)
    assert not other.likeness_random.equals(first.likeness_random)


def test_dead_features_and_those_with_too_few_examples_say_so(probe_chain, store, words):
    ids, x = planted_space(np.random.default_rng(0))
    chain = probe_chain.ProbeChain(store, ids, x, words)
    n = [25, 25, 4, 5, 0]
    examples = [pd.DataFrame({"feature": i, "activation": 1.0, "row": np.arange(k), "position": 1}) for i, k in enumerate(n)]
    firings = np.array([9, 10, 10, 10, 0])
    points = tuple(chain.point(step, pd.concat(examples), firings) for step in (0, 1))
    table, artifact = run(store, KindsSpec(points=points, tokenizer=words, reference=chain.reference))
    first = table[table.step == 0]
    assert first.reason.fillna("").tolist() == ["dead", "", "too few examples", "", "dead"]
    assert first.kind.fillna("").tolist()[0::2] == ["dead", "", "dead"]
    assert first.kind[[1, 3]].isin(["token", "concept", "noise"]).all()
    assert first.examples.tolist() == n
    measured = first.drop(columns=["feature", "step", "kind", "examples", "reason"]).notna()
    assert measured.all(axis=1).tolist() == measured.any(axis=1).tolist() == [False, True, False, True, False]
    shares = artifact.read_table("shares.parquet").set_index(["step", "kind"]).loc[0]
    assert shares.share["dead"] == 0.4
    assert shares["count"].sum() == 4
    assert shares.share[["token", "concept", "noise"]].sum() == pytest.approx(1)
    assert artifact.manifest.figures["without_kind"] == 2


def test_only_the_rules_number_of_examples_is_looked_at(made):
    chain, spec, _ = made
    table, _ = run(chain.store, spec.model_copy(update={"rule": KindRule(examples=6)}))
    assert table.examples.max() == 6
    examples = chain.store.artifact(spec.points[0].statistics).read_table("examples.parquet")
    strongest = examples[(examples.feature == 3) & (examples["rank"] < 6)]
    assert table[(table.step == 0)].distinct_tokens[3] == len(set(chain.ids[strongest.row, strongest.position]))


# --- the rule -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alive", "examples", "share", "likeness", "random", "p", "kind", "reason"),
    [
        (True, 25, 0.80, 0.0, 0.0, 1.0, "token", None),
        (True, 25, 0.80, 0.9, 0.0, 0.001, "token", None),
        (True, 25, 1.00, np.nan, np.nan, np.nan, "token", "one token only"),
        (True, 25, 0.79, 0.30, 0.05, 0.01, "concept", None),
        (True, 25, 0.79, 0.14, 0.05, 0.001, "noise", None),  # not by the margin
        (True, 25, 0.79, 0.30, 0.05, 0.011, "noise", None),  # not by p
        (True, 25, 0.20, -0.1, 0.05, 0.9, "noise", None),
        (True, 5, 0.20, 0.30, 0.05, 0.01, "concept", None),
        (True, 4, 1.00, 0.30, 0.05, 0.01, None, "too few examples"),
        (False, 25, 1.00, 0.30, 0.05, 0.01, "dead", "dead"),
        (False, 0, np.nan, np.nan, np.nan, np.nan, "dead", "dead"),
    ],
)
def test_the_rule_for_kinds(alive, examples, share, likeness, random, p, kind, reason):
    values = (np.array([v]) for v in (alive, examples, share, likeness, random, p))
    found = decide(*values, KindRule())
    assert ([*KINDS, None][found[0][0]], [*REASONS, None][found[1][0]]) == (kind, reason)


def test_the_heaviest_code_equals_a_loop_and_ties_go_to_the_strongest_example():
    rng = np.random.default_rng(0)
    feature = np.sort(rng.integers(0, 40, 600)) * 2  # every second one has no examples
    code, mass = rng.integers(0, 6, 600), rng.integers(1, 4, 600)
    best, share, cells = heaviest(feature, code, mass, 80)
    for i in range(80):
        c, m = code[feature == i], mass[feature == i]
        if not len(c):
            assert best[i] == -1
            assert np.isnan(share[i])
            continue
        masses = {k: m[c == k].sum() for k in dict.fromkeys(c.tolist())}  # in the order of their strongest example
        assert best[i] == max(masses, key=masses.get)
        assert share[i] == pytest.approx(max(masses.values()) / m.sum())
        own = cells[cells.feature == i].set_index("code")
        assert own["count"].to_dict() == {k: int((c == k).sum()) for k in masses}


def test_a_p_that_cannot_be_reached_and_more_examples_than_are_looked_at_are_refused():
    with pytest.raises(ValueError, match="at least 999 random_sets"):
        KindRule(p=0.001, random_sets=998)
    assert KindRule(p=0.001, random_sets=999)
    with pytest.raises(ValueError, match="no feature would get a kind"):
        KindRule(examples=4)


# --- likeness and its null ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def chain(made):
    return made[0]


def random_entries(rng, sets, positions=ROWS * PER_ROW):
    """Sets of 0 to 30 positions with 1 to 8 tokens, and positions that occur in several of them."""
    sizes = rng.integers(0, 30, sets)
    set_ = np.repeat(np.arange(sets), sizes)
    at = np.concatenate([rng.choice(positions, n, replace=False) for n in sizes])
    token = np.concatenate([rng.integers(0, 1 + rng.integers(8), n) for n in sizes])
    return set_, at, token


@pytest.mark.parametrize("budget", [1, 3000, 1 << 20])
def test_likeness_of_sets_equals_loops_whatever_the_memory(chain, budget):
    rng = np.random.default_rng(3)
    space, units = space_of(chain), centred_units(chain)
    held = []

    class Watched(PairLikeness):
        def _sums(self, at, slot, n_slots):
            held.append(n_slots * space.d * 4)
            return super()._sums(at, slot, n_slots)

    pairs, expected = Watched(space, budget), []
    for sets in (30, 1, 45):
        set_, at, token = random_entries(rng, sets)
        order = rng.permutation(len(set_))
        pairs.add(set_[order], at[order], token[order], sets)
        expected += [brute_likeness(units, at[set_ == s], token[set_ == s]) for s in range(sets)]
    found = pairs.finish()
    assert np.isnan(expected).any()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    one_set = 31 * space.d * 4
    assert max(held) <= max(budget, one_set)
    assert (len(held) > 1) == (budget < 1 << 20)


def test_a_vector_at_the_mean_has_cosine_zero_with_all_others(probe_chain, store, words):
    ids = np.random.default_rng(0).integers(0, WORDS, (ROWS, CONTEXT))
    x = torch.randn(ROWS * PER_ROW, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).float()
    x = torch.cat([x[: len(x) // 2], -x[: len(x) // 2]])
    x[[0, len(x) // 2]] = 0
    space = space_of(probe_chain.ProbeChain(store, ids, x, words))
    u = torch.nn.functional.normalize(x.double(), dim=1).numpy()
    pairs = PairLikeness(space)
    at = np.array([0, 5, 9])
    pairs.add(np.zeros(3, int), at, np.array([0, 1, 2]), 1)
    pairs.add(np.zeros(3, int), at, np.array([0, 0, 1]), 1)
    assert pairs.finish() == pytest.approx([u[5] @ u[9] / 3, u[5] @ u[9] / 2], abs=1e-6)


def test_random_sets_equal_loops_and_hold_one_position_per_row(chain):
    codes = chain.ids[:, 1:].astype(np.int32)
    null = RandomSets(space_of(chain), codes, 150, 12, seed=5)
    assert all(len(set(at // PER_ROW)) == 12 for at in null.at)
    units, token = centred_units(chain), codes.ravel()
    for size in (2, 3, 7, 12):
        expected = sorted(brute_likeness(units, at[:size], token[at[:size]]) for at in null.at)
        np.testing.assert_allclose(null.likeness[size], expected, atol=1e-6)


def test_p_counts_the_random_sets_that_are_at_least_as_alike(chain):
    null = RandomSets(space_of(chain), chain.ids[:, 1:].astype(np.int32), 99, 6, seed=0)
    values = np.r_[null.likeness[4][[0, 50, 98]], -2.0, 2.0, np.nan]
    mean, p = null.compare(values, np.array([4, 4, 4, 4, 4, 0]))
    assert p[:5] == pytest.approx([1 - stats.percentileofscore(null.likeness[4], v, "strict") / 100 * 0.99 for v in values[:5]], abs=1e-9)
    assert p[[3, 4]].tolist() == [1.0, 0.01]
    assert mean[:5] == pytest.approx(np.mean(null.likeness[4]))
    assert np.isnan([mean[5], p[5]]).all()


def test_p_is_uniform_for_features_that_fire_at_random(chain):
    codes = chain.ids[:, 1:].astype(np.int32)
    space = space_of(chain)
    null, features = RandomSets(space, codes, 2000, 10, seed=0), RandomSets(space, codes, 300, 10, seed=1)
    for size in (2, 10):
        _, p = null.compare(features.likeness[size], np.full(300, size))
        assert stats.kstest(p, "uniform").pvalue > 0.001


def test_centring_takes_the_common_mean_out(chain):
    raw = chain.vectors.double().numpy()
    raw /= np.linalg.norm(raw, axis=1, keepdims=True)
    null = RandomSets(space_of(chain), chain.ids[:, 1:].astype(np.int32), 400, 25, seed=0)
    assert abs(null.likeness[25].mean()) < 0.02
    assert np.mean(raw[null.at[:, 0]] * raw[null.at[:, 1]]) * raw.shape[1] > 0.5


def test_set_sizes_equal_loops_over_pairs():
    rng = np.random.default_rng(0)
    groups = [
        [25],
        [1] * 25,
        [13, 12],
        [5] * 5,
        [20, 1, 1, 1, 1, 1],
        [],
        *[rng.integers(1, 9, rng.integers(1, 9)).tolist() for _ in range(30)],
    ]
    set_ = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    found = set_sizes(set_, np.array([n for g in groups for n in g]), len(groups))
    for size, group in zip(found, groups, strict=True):
        weights = [a * b for a, b in combinations(group, 2)]
        if not weights:
            assert size == 0
            continue
        effective = sum(weights) ** 2 / sum(w * w for w in weights)
        assert size * (size - 1) / 2 <= effective + 1e-6 < (size + 1) * size / 2
    assert found[:6].tolist() == [0, 25, 2, 5, 4, 0]


def test_probe_rows_of_one_token_are_refused(chain):
    with pytest.raises(UserError, match="no two positions with different tokens"):
        RandomSets(space_of(chain), np.zeros((ROWS, PER_ROW), np.int32), 5, 3, seed=0)


# --- token strings ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["the cat and the hat", "The the the\n\n    The the THE THE    the"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_spellings_of_a_word_are_one_token_and_white_space_stays_apart(byte_level):
    ids = {text: byte_level(text)["input_ids"] for text in ("the", " the", "The", " The", "\n\n", "\n", "    ", " ")}
    whole = [t for t, i in ids.items() if len(i) == 1]
    assert {"the", " the", " The", "\n", " "} <= set(whole)
    unique = np.array([ids[t][0] for t in whole])
    folded = dict(zip(whole, token_names(byte_level, unique, fold=True), strict=True))
    assert {folded[t] for t in whole if t.strip()} == {"the"}
    assert all(folded[t] == t for t in whole if not t.strip())
    assert token_names(byte_level, unique, fold=False) == whole


def test_pieces_of_characters_are_different_tokens(byte_level):
    pieces = np.array(byte_level("é")["input_ids"])
    assert len(pieces) == 2
    for fold in (True, False):
        names = token_names(byte_level, pieces, fold=fold)
        assert len(set(names)) == 2
        assert "\ufffd" not in "".join(names)


def test_probe_tokens_know_every_position(byte_level):
    ids = np.array([byte_level(" the the cat")["input_ids"][:3], byte_level("the\n the")["input_ids"][:3]], np.int32)
    tokens = ProbeTokens(ids, byte_level, fold=True)
    assert (np.array(tokens.names)[tokens.codes] == [["the"] * 2 + [tokens.names[tokens.codes[0, 2]]], ["the", "\n", "the"]]).all()
    assert tokens.ids is ids


def test_ids_that_the_tokenizer_does_not_know_are_refused(byte_level):
    with pytest.raises(UserError, match="does not know \\(12345"):
        token_names(byte_level, np.array([1, 12345]), fold=True)


def test_folding_decides_whether_a_word_in_two_spellings_is_a_token_feature(probe_chain, store, tmp_path):
    words = probe_chain.word_tokenizer(tmp_path / "t", ["the", "The", *[f"w{i}" for i in range(WORDS - 2)]])
    rng = np.random.default_rng(0)
    ids, x = planted_space(rng)
    chain = probe_chain.ProbeChain(store, ids, x, words)
    row, position = pick(rng, ids, [0, 1], 25)
    examples = pd.DataFrame({"feature": 0, "activation": 1.0, "row": row, "position": position})
    points = tuple(chain.point(step, examples, np.array([30])) for step in (0, 1))
    spec = KindsSpec(points=points, tokenizer=words, reference=chain.reference)
    folded, _ = run(store, spec)
    apart, _ = run(store, spec.model_copy(update={"rule": KindRule(fold_tokens=False)}))
    heavier = int((ids[row, position] == 1).sum() > len(row) / 2)
    assert (folded.kind[0], folded.token[0], folded.distinct_tokens[0], folded.token_id[0]) == ("token", "the", 1, heavier)
    assert apart.kind[0] != "token"
    assert (apart.token[0], apart.distinct_tokens[0]) == (["the", "The"][heavier], 2)


# --- inputs that do not fit ---------------------------------------------------------------------------------------------------------------


def test_statistics_with_too_few_examples_are_refused(made):
    chain, spec, _ = made
    with pytest.raises(UserError, match="looks at 26 examples .* kept 25"):
        run(chain.store, spec.model_copy(update={"rule": KindRule(examples=26)}))


def test_statistics_of_another_dictionary_are_refused(made):
    chain, spec, _ = made
    first, second = spec.points
    with pytest.raises(UserError, match="of step 0 are of"):
        run(chain.store, spec.model_copy(update={"points": (first.model_copy(update={"statistics": second.statistics}), second)}))


def test_a_reference_that_is_the_hooks_own_space_is_refused(made):
    chain, spec, _ = made
    for hook in (HookPoint(layer=3), HookPoint(layer=2, site="resid_post")):
        own = chain.harvest(chain.vectors, hook)
        with pytest.raises(UserError, match="alike there by construction"):
            run(chain.store, spec.model_copy(update={"reference": own}))


def test_a_reference_of_other_positions_or_too_few_rows_is_refused(made):
    chain, spec, _ = made
    hook = HookPoint(layer=9, site="resid_post")
    every = chain.harvest(torch.randn(ROWS * CONTEXT, 4), hook, skip=())
    with pytest.raises(UserError, match="not of the same positions"):
        run(chain.store, spec.model_copy(update={"reference": every}))
    few = chain.harvest(chain.vectors, hook, rows=32)
    with pytest.raises(UserError, match="which holds 32"):
        run(chain.store, spec.model_copy(update={"reference": few}))


def test_fewer_probe_rows_than_a_kind_needs_examples_are_refused(probe_chain, store, words):
    chain = probe_chain.ProbeChain(store, np.zeros((4, CONTEXT)), torch.randn(4 * PER_ROW, 3), words)
    examples = pd.DataFrame({"feature": [0], "activation": [1.0], "row": [0], "position": [1]})
    points = tuple(chain.point(step, examples, np.array([40])) for step in (0, 1))
    with pytest.raises(UserError, match="There are 4 probe rows"):
        run(store, KindsSpec(points=points, tokenizer=words, reference=chain.reference))


def test_a_reference_that_is_not_finite_is_refused(made):
    chain, spec, _ = made
    broken = chain.vectors.clone()
    broken[700] = torch.inf
    other = chain.harvest(broken, HookPoint(layer=8, site="resid_post"))
    with pytest.raises(UserError, match="NaN or infinity"):
        run(chain.store, spec.model_copy(update={"reference": other}))


def test_dictionaries_of_different_width_are_refused(probe_chain, store, words):
    ids, x = planted_space(np.random.default_rng(0))
    chain = probe_chain.ProbeChain(store, ids, x, words)
    examples = pd.DataFrame({"feature": [0], "activation": [1.0], "row": [0], "position": [1]})
    points = tuple(chain.point(step, examples, np.full(3 + step, 40)) for step in (0, 1))
    with pytest.raises(UserError, match="that of step 1 does not have 3"):
        run(store, KindsSpec(points=points, tokenizer=words, reference=chain.reference))


def test_what_is_no_statistics_or_no_activations_is_named(made):
    chain, spec, _ = made
    first, second = spec.points
    with pytest.raises(UserError, match="given as the statistics of step 0"):
        run(chain.store, spec.model_copy(update={"points": (first.model_copy(update={"statistics": first.dictionary}), second)}))
    with pytest.raises(UserError, match="activations of the probe rows were expected"):
        run(chain.store, spec.model_copy(update={"reference": first.dictionary}))
