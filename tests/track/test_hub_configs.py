"""The configs for published models, as they ship: their settings are the paper's, and they plan and run over a local cache laid out like the hub's."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from track.fake_hub import FakeHub, corpus

from stagediff.config import load_config, make_plan
from stagediff.errors import UserError
from stagediff.estimate import estimate_plan
from stagediff.plan import Plan, execute
from stagediff.store import Store
from stagediff.track.config import TrackConfig

PYTHIA = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1000, 143_001, 1000)]
GPT2 = [*range(0, 100, 10), *range(100, 2000, 50), *range(2000, 20_000, 100), *range(20_000, 400_001, 1000)]
MODELS = {
    "track-pythia-160m": ("EleutherAI/pythia-160m-deduped", "gpt_neox", "step{}", 4, 768),
    "track-pythia-410m": ("EleutherAI/pythia-410m-deduped", "gpt_neox", "step{}", 4, 1024),
    "track-pythia-1.4b": ("EleutherAI/pythia-1.4b-deduped", "gpt_neox", "step{}", 3, 2048),
    "track-gpt2-small": ("stanford-crfm/alias-gpt2-small-x21", "gpt2", "checkpoint-{}", 5, 768),
    "track-gpt2-medium": ("stanford-crfm/arwen-gpt2-medium-x21", "gpt2", "checkpoint-{}", 6, 1024),
}
"""Config -> repository, family, revision, the paper's layer, and the model's width."""
FAMILIES = ("track-pythia-160m", "track-gpt2-small")
TINY = {
    "tokens": 12_800,
    "context": 64,
    "harvest.batch_rows": 16,
    "dictionary.features": 128,
    "train.tokens": 16_384,
    "train.batch": 1024,
    "follow.tokens": 4096,
    "follow.batch": 1024,
    "probe": {"tokens": 6400, "quality_rows": 8},
    "kinds.random_sets": 200,
    "umap": None,
}


def path(name: str) -> Path:
    return Path(str(files("configs") / f"{name}.yaml"))


def shipped(name: str, **overrides: Any) -> TrackConfig:
    config = load_config(path(name), overrides=overrides)
    assert isinstance(config, TrackConfig)
    return config


@pytest.fixture
def hub(tmp_path, monkeypatch) -> FakeHub:
    """An empty hub cache, and nobody to ask beyond it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("STAGEDIFF_CACHE", str(tmp_path / "digests"))
    return FakeHub(tmp_path / "hub")


def with_all_revisions(hub: FakeHub, config: TrackConfig, name: str, **options: Any) -> None:
    repository, family, revision, *_ = MODELS[name]
    hub.add(repository, family, [revision.format(step) for step in config.checkpoints.steps], **options)


def planned(config: TrackConfig, tmp_path: Path) -> tuple[Plan, Store]:
    store = Store(str(tmp_path / "store"))
    return make_plan(config, store), store


def tiny(name: str, tmp_path: Path, **more: Any) -> TrackConfig:
    """The shipped config with small sizes and its own model, revisions, hook point and schedule; three of its checkpoints."""
    steps = shipped(name).checkpoints.steps
    kept = [steps[0], steps[10], steps[-1]]
    text = corpus(tmp_path / "text.jsonl")
    changes = {"checkpoints.steps": kept, "scratch.at": [kept[1]], "data": {"path": str(text), "text": "text"}, **TINY, **more}
    return shipped(name, **changes)


def test_there_is_a_config_for_each_of_the_papers_models():
    found = {p.stem for p in path("track").parent.glob("track-*.yaml") if shipped(p.stem).model.name}
    assert found == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_settings_are_the_papers(name):
    config = shipped(name)
    repository, _, revision, layer, width = MODELS[name]
    assert config.model.at(17) == {"name": repository, "revision": revision.format(17)}
    assert (config.hook.layer, config.hook.site, config.context) == (layer, "resid_pre", 128)
    assert (config.dictionary.architecture, config.dictionary.features) == ("relu", 64 * width)
    assert config.dictionary.l1 == pytest.approx(8e-5 * width**1.5, rel=0.02)
    train, follow = config.train, config.follow
    assert (train.tokens, train.batch, train.lr) == (300_000_000, 4096, 4e-4)
    assert (follow.tokens, follow.batch, follow.lr) == (15_000_000, 4096, 4e-5)
    assert train.warmup * train.tokens / train.batch == pytest.approx(5000, rel=0.01)
    assert follow.warmup * follow.tokens / follow.batch == pytest.approx(3, abs=1)
    assert config.keep == "tables"


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_are_published_ones_at_the_papers_indices(name):
    steps = list(shipped(name).checkpoints.steps)
    if name.startswith("track-pythia"):
        assert len(PYTHIA) == 154
        assert [PYTHIA.index(s) for s in steps] == [*range(12), *range(13, 34, 2), *range(53, 154, 20)]
        assert len(steps) == 29
    else:
        assert len(GPT2) == 609
        assert [GPT2.index(s) for s in steps] == [*range(12), *range(16, 32, 5), *range(41, 182, 10), *range(211, 602, 30), 608]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", MODELS)
def test_every_checkpoint_is_planned_and_has_a_price(name, direction, hub, tmp_path):
    config = shipped(name, data={"path": str(corpus(tmp_path / "text.jsonl"))}, **{"checkpoints.direction": direction})
    with_all_revisions(hub, config, name)
    plan, store = planned(config, tmp_path)
    steps = config.checkpoints.steps
    assert len({plan[f"probe-step{s}"].spec.model.revision for s in steps}) == len(steps)
    assert f"train-step{steps[0] if direction == 'forward' else steps[-1]}" in plan
    rows = {row.name: row for row in estimate_plan(plan, store)}
    assert {name for name, row in rows.items() if row.bytes is None} == set()
    assert {name for name, row in rows.items() if row.seconds is None} == {n for n in rows if n.startswith("tokens")}


def test_a_revision_missing_in_the_middle_is_refused_by_name(hub, tmp_path):
    name = "track-pythia-160m"
    config = shipped(name, data={"path": str(corpus(tmp_path / "text.jsonl"))})
    with_all_revisions(hub, config, name)
    hub.forget("EleutherAI/pythia-160m-deduped", "step512")
    with pytest.raises(
        UserError, match=r"Checkpoint 512 of \[0, 1, .*143000\] cannot be had.*pythia-160m-deduped@step512.*cache does not hold"
    ) as error:
        planned(config, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_tiny_run_of_each_family_goes_through(name, hub, tmp_path):
    config = tiny(name, tmp_path)
    with_all_revisions(hub, config, name, weights=True)
    plan, store = planned(config, tmp_path)
    execute(plan, store, device="cpu", keep=config.keep)
    first, middle, last = config.checkpoints.steps
    quality = store.artifact(plan["efficiency"].ref).read_table("quality.parquet")
    assert set(quality.step[quality.how == "chained"]) == {first, middle, last}
    shapes = {store.artifact(plan[f"probe-step{s}"].ref).array().shape for s in (first, middle, last)}
    assert shapes == {(100 * 63, 32)}
    kinds = store.artifact(plan["kinds"].ref).read_table("kinds.parquet")
    assert len(kinds) == 3 * 128
    # three different random models, not one of them three times
    weights = {store.artifact(plan[f"probe-step{s}"].ref).array().read_rows(0, 4).tobytes() for s in (first, middle, last)}
    assert len(weights) == 3
    assert store.artifact(plan["report"].ref).is_complete
