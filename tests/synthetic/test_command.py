"""`stagediff planted`: the whole way on a very small world, and what it refuses."""

import json

import pytest
from typer import Typer
from typer.testing import CliRunner

from stagediff import steps
from stagediff.errors import UserError
from stagediff.plan import execute
from stagediff.progress import Progress
from stagediff.sae.spec import Budget, DictionaryConfig
from stagediff.synthetic import command as module
from stagediff.synthetic.chain import Recipe, plan
from stagediff.synthetic.command import ladder, medians

QUIET = Progress(interactive=False)
SMALL = Recipe(
    dictionary=DictionaryConfig(architecture="batchtopk", features=64, k=2),
    train=Budget(tokens=65_536, batch=512, lr=4e-3),
    follow=Budget(tokens=16_384, batch=512, lr=4e-3),
    revive_tokens=8_192,
    rows=1_024,
    probe_rows=512,
    alive_firings=10,
)


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_world):
    """A finished score of the tiny world: (store, ladder's table)."""
    from stagediff.store import Store

    store = Store(str(tmp_path_factory.mktemp("planted") / "store"))
    return store, ladder([("tiny", tiny_world)], SMALL, store, device="cpu", progress=QUIET)


def test_the_whole_way_on_a_small_world(scored, tiny_world):
    store, table = scored
    row = table.iloc[0]
    assert row.features == 32
    assert row.matched > 0.5
    assert 0 <= row.patterns <= 1
    artifact = store.artifact(row.score)
    features = artifact.read_table("features.parquet")
    assert len(features) == 32
    assert (features.cosine[features.latent >= 0] >= 0.7).all()
    assert features.latent.ge(0).mean() == pytest.approx(row.matched)
    kinds = artifact.read_table("kinds.parquet")
    assert len(kinds) == 32 * tiny_world.checkpoints
    known = kinds[kinds.truth.isin(["token", "concept", "noise"])]
    assert (known.truth == known.found).mean() == pytest.approx(row.kind_cells)
    events = artifact.read_table("events.parquet")
    assert (events.what == "planted").sum() == features.planted_event.notna().sum()


def test_what_is_there_is_not_computed_again(scored, tiny_world):
    store, table = scored
    ran = []
    execute(plan(tiny_world, SMALL), store, device="cpu", keep="tables", progress=QUIET, on_done=ran.append)
    assert not ran
    assert ladder([("tiny", tiny_world)], SMALL, store, device="cpu", progress=QUIET).equals(table)


def test_medians_are_taken_rung_by_rung(scored):
    table = scored[1]
    three = table.loc[[0, 0, 0]].assign(kinds=[0.1, 0.9, 0.5], rung=["easy", "easy", "easy"])
    middle = medians(three)
    assert middle.rung.tolist() == ["easy"]
    assert middle.kinds.tolist() == [0.5]


@pytest.fixture
def cli(monkeypatch, scored):
    """The command with a ladder that is already climbed."""
    monkeypatch.setattr(module, "ladder", lambda worlds, *_, **__: scored[1].assign(rung=next(name for name, _ in worlds)))
    app = Typer()
    app.command()(module.command)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_the_command_is_registered_and_prints_json_and_tables(cli):
    assert steps.commands()["planted"] == "stagediff.synthetic.command:command"
    printed = json.loads(cli("--track", "--seed", "3", "--json").output)
    assert printed["scores"][0]["seed"] == 3
    assert set(printed["medians"][0]) >= {"kinds", "formation", "patterns"}
    assert "planted trajectories" in cli("--track", "--seed", "3").output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--track", "--rung", "steep"], "easy, middle, hard, or all"),
        (["--track", "--architecture", "gated"], "batchtopk or relu"),
    ],
)
def test_the_command_says_what_exists(cli, arguments, said):
    error = cli(*arguments).exception
    assert isinstance(error, UserError)
    assert said in str(error)
