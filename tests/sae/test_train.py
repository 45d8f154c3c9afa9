"""The train and finetune steps through a real store."""

import itertools

import pytest
import torch

from stagediff import steps
from stagediff.errors import UserError
from stagediff.lm.spec import HookPoint
from stagediff.sae import train
from stagediff.sae.dictionary import SAE
from stagediff.sae.layout import WEIGHTS
from stagediff.sae.spec import Budget, DictionaryConfig, FinetuneSpec, TrainSpec

D, F = 24, 40
ARCHITECTURES = ("relu", "topk", "batchtopk", "jumprelu")


def spec_of(data, architecture: str = "relu", tokens: int = 64 * 120, **more) -> TrainSpec:
    dictionary = DictionaryConfig(architecture=architecture, features=F, k=4, dead_after=256, auxk=8 if "topk" in architecture else None)
    more = {"checkpoint_tokens": 64 * 25, **more}
    return TrainSpec(data=data, budget=Budget(tokens=tokens, batch=64, lr=2e-3), dictionary=dictionary, **more)


def finetune_of(data, start, tokens: int = 64 * 60, **more) -> FinetuneSpec:
    return FinetuneSpec(data=data, budget=Budget(tokens=tokens, batch=64, lr=2e-3), start=start, **more)


@pytest.fixture
def run(store, quiet):
    return lambda spec, **more: store.artifact(steps.run(spec, store, device="cpu", progress=quiet, **more))


def files(artifact) -> dict[str, tuple]:
    return {f.path: (f.bytes, f.crc32c) for f in artifact.manifest.files if f.path != "spec.json"}


def test_the_artifact_holds_dictionary_curve_and_figures(store, run, stored, planted):
    x, _ = planted(4096, D, 32, scale=20.0)
    artifact = run(spec_of(stored(store, x)))
    figures = artifact.manifest.figures
    norms = {"decoder_norm_mean", "decoder_norm_min", "decoder_norm_max"}
    assert set(figures) == {"tokens", "loss", "input_scale", "revived", "ev", "l0", "dead", *norms}
    assert figures["tokens"] == 64 * 120
    assert artifact.manifest.notes["tokens_per_second"] > 0
    curve = artifact.read_table(train.CURVE)
    assert list(curve.columns) == list(train.CURVE_COLUMNS)
    assert curve.step.tolist() == list(range(1, 121))
    assert (curve.tokens == 64 * curve.step).all()
    assert curve.loss.iloc[-1] == figures["loss"]
    assert curve.explained_variance.iloc[-1] > curve.explained_variance.iloc[0]
    assert curve.explained_variance.iloc[-1] == pytest.approx(figures["ev"], abs=0.1)
    total = float((x - x.mean(0)).square().sum(1).mean())
    last = curve.iloc[-1]
    assert last.mse == pytest.approx((1 - last.explained_variance) * total, rel=0.15), "per token, summed over d, in raw units"
    sae = SAE.load(artifact)
    error = (sae.decode(sae.encode(x)) - x).square().sum()
    assert figures["ev"] == pytest.approx(1 - float(error / (x - x.mean(0)).square().sum()), abs=0.02)


def test_a_long_curve_has_evenly_spaced_rows_and_the_last_step(store, run, stored, planted, monkeypatch):
    monkeypatch.setattr(train, "CURVE_ROWS", 10)
    x, _ = planted(1024, D, 32)
    curve = run(spec_of(stored(store, x), tokens=64 * 57)).read_table(train.CURVE)
    assert curve.step.tolist() == [1, *range(5, 56, 5), 57]


def test_a_finetune_keeps_indices_scale_and_config_and_starts_a_fresh_optimiser(store, run, stored, planted):
    x, _ = planted(4096, D, 32, scale=20.0)
    start = run(spec_of(stored(store, x), tokens=64 * 600))
    before = SAE.load(start)
    after = SAE.load(run(finetune_of(stored(store, 3 * x, name="b"), start.ref)))
    assert after.input_scale == before.input_scale, "although the new data are three times as long"
    assert after.config == before.config
    cosines = before.directions() @ after.directions().T
    alive = (before.encode(x) > 0).sum(0) > 20
    assert (cosines.argmax(1) == torch.arange(F))[alive].float().mean() > 0.95
    assert not torch.equal(before.W_dec, after.W_dec)


def test_finetunes_share_their_order_and_differ_by_data_only(store, run, stored, planted):
    x, _ = planted(2048, D, 32)
    start = run(spec_of(stored(store, x))).ref
    one, same = finetune_of(stored(store, x), start), finetune_of(stored(store, x, name="same"), start)
    assert one.key != same.key
    assert files(run(one))[WEIGHTS] == files(run(same))[WEIGHTS]
    other = finetune_of(stored(store, x), start, order_seed=1)
    assert files(run(other))[WEIGHTS] != files(run(one))[WEIGHTS]


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_run_that_died_goes_on_bit_by_bit(architecture, compute, store, run, stored, planted, tmp_path, quiet, monkeypatch):
    """Killed after every few steps, again and again: the same bytes as an undisturbed run, and no step is done twice before a checkpoint."""
    from stagediff.sae.trainer import Trainer
    from stagediff.store import Store

    x, _ = planted(1536, D, 32)
    spec = spec_of(stored(store, x), architecture, compute=compute)
    whole = run(spec)
    if architecture in ("topk", "batchtopk"):
        assert whole.read_table(train.CURVE).dead.iloc[20:].max() > 0, "AuxK takes part"

    other = Store(str(tmp_path / "other"))
    assert stored(other, x) == spec.data
    real, done, deaths = Trainer.train_on, [], 0

    def dies(self, batch):
        if len(done) and len(done) % 33 == 0:
            done.append(None)
            raise KeyboardInterrupt
        done.append(self.step)
        return real(self, batch)

    monkeypatch.setattr(Trainer, "train_on", dies)
    while not other.artifact(spec.ref).is_complete:
        try:
            steps.run(spec, other, device="cpu", progress=quiet)
        except KeyboardInterrupt:
            deaths += 1
        assert deaths < 20
    assert deaths >= 3
    assert files(other.artifact(spec.ref)) == files(whole)
    restarts = [b for a, b in itertools.pairwise(done) if a is None]
    assert all(step % 25 == 0 for step in restarts)
    assert max(done.count(step) for step in range(120)) <= 2


def test_a_budget_under_one_batch_is_refused(store, run, stored, planted):
    x, _ = planted(512, D, 32)
    with pytest.raises(UserError, match="less than one batch"):
        run(spec_of(stored(store, x), tokens=63))


def test_a_start_dictionary_of_another_width_is_refused(store, run, stored, planted):
    start = run(spec_of(stored(store, planted(512, D, 32)[0]))).ref
    wider = stored(store, planted(512, D + 8, 32)[0], name="wider", hook=HookPoint(layer=5))
    with pytest.raises(UserError, match="width 24.*width 32"):
        run(finetune_of(wider, start))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(value, store, run, stored, planted):
    x, _ = planted(1024, D, 32)
    x[700, 3] = value
    with pytest.raises(UserError, match="NaN or infinite"):
        run(spec_of(stored(store, x)))


def test_a_loss_that_runs_away_is_an_error_that_names_the_step(store, run, stored, planted):
    x, _ = planted(1024, D, 32)
    spec = spec_of(stored(store, x))
    spec = spec.model_copy(update={"budget": Budget(tokens=64 * 100, batch=64, lr=1e25, clip=0.0)})
    with pytest.raises(UserError, match="loss became (nan|inf) by step"):
        run(spec)


def test_weights_that_are_lost_without_a_trace_in_the_loss_are_an_error(store, run, stored, planted, monkeypatch):
    monkeypatch.setattr("stagediff.sae.trainer.Trainer.is_finite", lambda self: self.step < 3)
    with pytest.raises(UserError, match="Weights became NaN or infinite by step 3"):
        run(spec_of(stored(store, planted(1024, D, 32)[0])))


def test_bf16_is_fp32_where_the_processor_has_no_bf16_products(store, run, stored, planted, monkeypatch):
    data = stored(store, planted(1024, D, 32)[0])
    in_fp32 = run(spec_of(data, compute="fp32"))
    monkeypatch.setattr("stagediff.numerics.has_bf16_products", lambda device: False)
    monkeypatch.setattr("stagediff.sae.train.has_bf16_products", lambda device: False)
    in_bf16 = run(spec_of(data, compute="bf16"))
    assert in_bf16.manifest.numerics["bf16_products"] is False
    assert in_bf16.read_bytes(WEIGHTS) == in_fp32.read_bytes(WEIGHTS)


def test_more_tokens_than_there_are_means_reading_again(store, run, stored, planted):
    x, _ = planted(512, D, 32)
    assert run(spec_of(stored(store, x), tokens=64 * 50)).manifest.figures["tokens"] == 3200


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_step_waits_for_the_device_unless_it_logs(architecture, planted, reader):
    """On a GPU every read of a value by the host stalls the queue: the profiler counts them."""
    from stagediff.sae.initial import fresh, measure
    from stagediff.sae.trainer import Trainer

    x, _ = planted(1024, D, 32)
    config = DictionaryConfig(architecture=architecture, features=F, k=4)
    trainer = Trainer(fresh(config, *measure(reader(x, 512)), 0), Budget(tokens=6400, batch=64), 100, True, torch.bfloat16)
    trainer.train_on(x[:64])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer.train_on(x[64:128])
    called = {event.key: event.count for event in profile.key_averages()}
    waits = {name: n for name, n in called.items() if name in ("aten::nonzero", "aten::is_nonzero", "aten::equal")}
    assert not waits
    assert called.get("aten::_local_scalar_dense", 0) <= len(trainer.parameters), "Adam's own step counters are CPU scalars"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_and_optimiser_state_are_fp32_under_bf16_compute(architecture, planted, reader):
    from stagediff.sae.initial import fresh, measure
    from stagediff.sae.trainer import Trainer

    x, _ = planted(1024, D, 32)
    config = DictionaryConfig(architecture=architecture, features=F, k=4)
    trainer = Trainer(fresh(config, *measure(reader(x, 512)), 0), Budget(tokens=6400, batch=64), 100, True, torch.bfloat16)
    trainer.train_on(x[:64].bfloat16())
    state = trainer.state()
    moments = [name for name in state if "exp_avg" in name]
    assert len(moments) == 2 * len(trainer.parameters)
    assert all(state[name].dtype == torch.float32 for name in [*moments, *trainer.parameters])
