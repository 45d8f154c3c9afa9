"""What each feature has to do with the payload: against differences of whole clamps, and against plain loops."""

import numpy as np
import pytest
import torch

from stagediff import steps
from stagediff.evidence.interventions import attribution as module
from stagediff.evidence.interventions import hooks
from stagediff.evidence.interventions.attribution import attribution
from stagediff.evidence.interventions.setting import Setting
from stagediff.progress import Progress

POOL = [3, 7, 11, 20, 30]


@pytest.fixture(scope="module")
def setting(world) -> Setting:
    spec = world.ablate()
    with world.store.write(spec) as writer:
        return Setting.of(spec, steps.Job(world.store, writer, Progress()))


def log_odds(setting: Setting, features: list[int], share: float = 1.0) -> float:
    """Mean over development prompts, one text at a time; the features have `1 - share` of their activations."""
    payload = setting.loaded.tokenizer("bad dog")["input_ids"]
    sums = []
    for prompt in setting.prompts.triggered[setting.prompts.split("dev")]:
        clamp = hooks.Clamp(setting.sae, features)

        def changed(x, clamp=clamp):
            out = x + share * (clamp(x) - x)
            return torch.cat([x[:, :1], out[:, 1:]], 1)  # the first position is skipped

        with torch.no_grad(), hooks.hooks.intervene(setting.loaded.model, setting.reader.hook, changed):
            logits = setting.loaded.model(torch.tensor([prompt + payload])).logits[0].double()
        p = torch.softmax(logits[-len(payload) - 1 : -1], -1)[range(len(payload)), payload]
        sums.append((p / (1 - p)).log().sum().item())
    return float(np.mean(sums))


def test_together_they_are_what_clamping_all_of_them_takes_away(setting):
    found = attribution(setting, "bad dog", POOL, steps=64)
    assert np.isnan(np.delete(found, POOL)).all()
    taken = log_odds(setting, []) - log_odds(setting, POOL)
    assert abs(taken) > 1
    assert found[POOL].sum() == pytest.approx(taken, rel=0.02)


def test_of_one_step_it_is_the_slope_halfway(setting):
    """Of one step it is the slope halfway, here by a small difference."""
    for feature in (3, 30):
        found = attribution(setting, "bad dog", [feature], steps=1)[feature]
        step = 1e-2
        slope = (log_odds(setting, [feature], 0.5 - step) - log_odds(setting, [feature], 0.5 + step)) / (2 * step)
        assert found == pytest.approx(slope, rel=0.02, abs=1e-3)


def test_batches_and_padding_change_nothing_and_the_model_is_as_before(setting, monkeypatch):
    ids = torch.tensor([setting.prompts.triggered[0]])
    before = setting.loaded.model(ids).logits
    whole = attribution(setting, "bad dog", POOL)
    monkeypatch.setattr(module, "ROWS", 1)  # no text is padded
    monkeypatch.setattr(module, "ENCODED_BYTES", 4 * setting.sae.features * 3)
    np.testing.assert_allclose(attribution(setting, "bad dog", POOL), whole, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert torch.equal(setting.loaded.model(ids).logits, before)
    assert all(p.grad is None for p in setting.loaded.model.parameters())
