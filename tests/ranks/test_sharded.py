"""A dictionary whose features are split over ranks is trained to what one rank trains."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stagediff import ranks, steps
from stagediff.errors import UserError
from stagediff.progress import Progress, Task
from stagediff.resources import StepResources, checked
from stagediff.sae.sharded import Shards, team_of
from stagediff.sae.sharing import check
from stagediff.sae.sparse.kernels import KERNELS
from stagediff.sae.sparse.reference import Reference
from stagediff.sae.spec import Budget, FinetuneSpec
from stagediff.store import Store


def tools():
    path = Path(__file__).parent / "test_ranks.py"
    spec = importlib.util.spec_from_file_location("ranks_tools", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shards(size: int, features: int) -> list[Shards]:
    made = []
    for rank in range(size):
        team = Shards(features)
        team.rank, team.size, team.own_features = rank, size, features // size
        team.first = rank * team.own_features
        made.append(team)
    return made


def meeting(monkeypatch) -> Iterator[None]:
    """Lets ranks within this process meet: a first pass collects everyone's keys, a second one decides by them."""
    told: list[torch.Tensor] = []

    def collect(self, keys, k):
        told.append(torch.nn.functional.pad(keys, (0, k - keys.shape[1])))
        return torch.zeros(len(keys), dtype=torch.int64)

    monkeypatch.setattr(Shards, "_least", collect)
    yield
    everyone = torch.cat(told, 1)
    monkeypatch.setattr(Shards, "_least", lambda self, keys, k: everyone.topk(k, dim=1).values.amin(1))
    yield


@pytest.mark.parametrize("k", [3, 20])
def test_ranks_choose_what_one_rank_chooses_equal_values_included(k, monkeypatch):
    """bf16 with few different values, some rows without positive ones; k = 20 is more than a rank's 16 features."""
    pre = torch.randint(-3, 3, (64, 64), generator=torch.Generator().manual_seed(0)).bfloat16()
    pre[5] = -1
    kernels, teams = Reference(), shards(4, 64)
    expected = torch.zeros(64, 65).scatter_(1, *(t.long() if i == 0 else t for i, t in enumerate(kernels.largest(pre, k))))[:, :64]
    own = [kernels.largest(part.contiguous(), min(k, 16)) for part in pre.chunk(4, 1)]
    for _ in meeting(monkeypatch):
        kept = [team.keep(*found, k) for team, found in zip(teams, own, strict=True)]
    found = torch.cat([torch.zeros(64, 17).scatter_(1, f.long(), v)[:, :16] for f, v in kept], 1)
    assert torch.equal(found, expected)
    assert all((v.sign().diff(dim=1) <= 0).all() for _, v in kept), "empty slots come last"


def test_ranks_choose_of_the_whole_batch_what_one_rank_chooses(monkeypatch):
    pre = torch.randint(-3, 3, (64, 64), generator=torch.Generator().manual_seed(1)).bfloat16()
    pre[5] = -1
    kernels, teams = Reference(), shards(4, 64)
    expected, smallest = kernels.largest_of_all(pre, 64 * 3)
    own = [kernels.largest_of_all(part.contiguous(), 64 * 3)[0] for part in pre.chunk(4, 1)]
    for _ in meeting(monkeypatch):
        kept = [team.keep_of_all(pairs, 64 * 3) for team, pairs in zip(teams, own, strict=True)]
    assert torch.equal(torch.cat([pairs.dense(16) for pairs, _ in kept], 1), expected.dense(64))
    assert all(float(least) == float(smallest) for _, least in kept)
    for pairs, _ in kept:
        counts = (pairs.dense(16) > 0).sum(1).int()
        assert torch.equal(pairs.start.diff(), counts), "a token's slots are those from its start on"


def test_what_cannot_be_split_is_refused(monkeypatch):
    spec = SimpleNamespace(budget=Budget(tokens=64, batch=64))
    check(spec, "topk", 52, 4, "features")
    with pytest.raises(UserError, match="50 features cannot be shared out evenly to 4 ranks"):
        check(spec, "topk", 50, 4, "features")
    monkeypatch.setenv(ranks.SHARD, "tokens")
    with pytest.raises(UserError, match="STAGEDIFF_SHARD is 'tokens'"):
        ranks.shard_here()
    with pytest.raises(ValueError, match="harvest.shard is features"):
        checked({"harvest": StepResources(gpus=2, shard="features")})
    with pytest.raises(ValueError, match="train.shard is features with gpus: 1"):
        checked({"train": StepResources(gpus=1, shard="features")})
    checked({"train": StepResources(gpus=2, shard="features")})


def test_a_finetune_that_needs_the_whole_dictionary_is_refused(monkeypatch, tmp_path):
    t = tools()
    store = Store(tmp_path)
    data = t.tools().store_activations(store, t.tools().planted_activations(512, 16, 24)[0])
    start = t.training(data)
    spec = FinetuneSpec(data=data, budget=Budget(tokens=64 * 40, batch=64), start=start.ref, revive="resample", revive_tokens=64)
    monkeypatch.setattr("stagediff.sae.sharded.Team", lambda: type("Two", (), {"size": 2})())
    monkeypatch.setenv(ranks.SHARD, "features")
    with pytest.raises(UserError, match="`revive: resample`, which needs the whole dictionary"):
        team_of(spec, "relu", 48)


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param("topk", marks=pytest.mark.integration),
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("batchtopk", "relu", "jumprelu")),  # a minute each
    ],
)
def test_two_ranks_with_half_of_the_features_each_train_what_one_trains(architecture, tmp_path, monkeypatch):
    """fp32, 300 steps, AuxK at work: weights agree to 1e-4 of their largest, the loss curve to 1e-5; a second time the same bytes."""
    t = tools()
    torch.set_num_threads(1)
    planted = t.tools().planted_activations(4096, 16, 24)[0]
    one, two = (Store(tmp_path / name) for name in ("one", "two"))
    for store in (one, two):
        data = t.tools().store_activations(store, planted)
    spec = t.training(data, architecture, steps_=300, focus=1.0)
    if "topk" in architecture:
        spec = spec.model_copy(update={"dictionary": spec.dictionary.model_copy(update={"dead_after": 64, "auxk_weight": 1.0})})
    else:  # ranks take the dense algebra; one alone would go over active features once they are few
        monkeypatch.setenv(KERNELS, "reference")
    steps.run(spec, one, device="cpu")
    monkeypatch.setenv(ranks.SHARD, "features")
    ranks.run(spec, two, device="cpu", ranks=2)
    expected, found = (store.artifact(spec.ref) for store in (one, two))
    assert found.manifest.numerics["shard"] == "features"
    theirs = t.weights(two, spec.ref)
    for name, value in t.weights(one, spec.ref).items():
        assert float((theirs[name] - value).abs().max()) <= 1e-4 * float(value.abs().max()), name
    curves = [a.read_table("curve.parquet") for a in (expected, found)]
    assert ((curves[1].loss - curves[0].loss).abs() <= 1e-5 * curves[0].loss).all()
    if "topk" in architecture:
        assert curves[0].dead.iloc[20:].max() > 0, "AuxK had something to do"
    ranks.run(spec, two, device="cpu", ranks=2, force=True)
    assert two.artifact(spec.ref).manifest.same_bytes is True


@pytest.mark.integration
def test_a_checkpoint_of_one_rank_is_continued_by_two_and_one_of_two_by_one(tmp_path, monkeypatch):
    t = tools()
    torch.set_num_threads(1)
    planted = t.tools().planted_activations(4096, 16, 24)[0]
    stores = [Store(tmp_path / name) for name in ("whole", "one", "two")]
    for store in stores:
        data = t.tools().store_activations(store, planted)
    spec = t.training(data, "topk", steps_=200, keep_optimiser=True)
    steps.run(spec, stores[0], device="cpu")
    monkeypatch.setenv(ranks.SHARD, "features")

    def stop(task: Task) -> None:
        if task.name == "train" and task.done > spec.budget.tokens / 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        steps.run(spec, stores[1], device="cpu", progress=Progress(listener=stop))
    ranks.run(spec, stores[1], device="cpu", ranks=2)
    manifest = stores[1].artifact(spec.ref).manifest
    assert 0 < manifest.notes["tokens_this_run"] < spec.budget.tokens
    assert_close(t, spec, stores[1], stores[0])

    def lose(task: Task) -> None:
        checkpoints = Path(stores[2].root) / spec.ref / "_work" / "training"
        if t.newest(checkpoints) > 0:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        ranks.run(spec, stores[2], device="cpu", ranks=2, progress=Progress(listener=lose))
    steps.run(spec, stores[2], device="cpu")
    assert stores[2].artifact(spec.ref).manifest.notes["tokens_this_run"] < spec.budget.tokens
    assert_close(t, spec, stores[2], stores[0])


def assert_close(t, spec, found: Store, expected: Store) -> None:
    for name in ("sae_weights.safetensors", "optimiser.safetensors"):
        theirs, ours = ((t.load((Path(s.root) / spec.ref / name).read_bytes())) for s in (found, expected))
        for key, value in ours.items():
            assert float((theirs[key] - value).abs().max()) <= 1e-4 * float(value.abs().max()), key
