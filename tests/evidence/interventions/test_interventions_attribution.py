"""What each feature has to do with the behaviour: against differences of whole clamps, one text at a time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stagediff import steps
from stagediff.errors import UserError
from stagediff.evidence.interventions import attribution as module
from stagediff.evidence.interventions import hooks
from stagediff.evidence.interventions.attribution import attribution, grown
from stagediff.evidence.interventions.setting import Setting
from stagediff.progress import Progress

POOL = [3, 7, 11, 20, 30]


@pytest.fixture(scope="module")
def setting(world) -> SimpleNamespace:
    spec = world.ablate()
    with world.store.write(spec) as writer:
        found = Setting.of(spec, steps.Job(world.store, writer, Progress()))
    return SimpleNamespace(**vars(found), skip=found.skip, behaviour=spec.behaviour)


def logits(setting: SimpleNamespace, text: list[int], features: list[int], share: float) -> torch.Tensor:
    """[positions, V] of one text; the features have `1 - share` of their activations."""
    clamp = hooks.Clamp(setting.sae, features)

    def changed(x):
        out = x + share * (clamp(x) - x)
        return torch.cat([x[:, :1], out[:, 1:]], 1)  # the first position is skipped

    with torch.no_grad(), hooks.hooks.intervene(setting.loaded.model, setting.reader.hook, changed):
        return setting.loaded.model(torch.tensor([text])).logits[0].double()


def log_odds(setting: SimpleNamespace, features: list[int], share: float = 1.0) -> float:
    """Mean over development prompts."""
    payload = setting.loaded.tokenizer(setting.behaviour.payload)["input_ids"]
    sums = []
    for prompt in setting.prompts.triggered[setting.prompts.split("dev")]:
        at = logits(setting, prompt + payload, features, share)[-len(payload) - 1 : -1]
        p = torch.softmax(at, -1)[range(len(payload)), payload]
        sums.append((p / (1 - p)).log().sum().item())
    return float(np.mean(sums))


def test_together_they_are_what_clamping_all_of_them_takes_away(setting):
    found = attribution(setting, setting.behaviour, POOL, steps=64)
    assert np.isnan(np.delete(found, POOL)).all()
    taken = log_odds(setting, []) - log_odds(setting, POOL)
    assert abs(taken) > 1
    assert found[POOL].sum() == pytest.approx(taken, rel=0.02)


def test_what_is_clamped_already_is_gone_from_what_the_others_take_away(setting):
    gone, left = POOL[:2], POOL[2:]
    found = attribution(setting, setting.behaviour, left, clamped=gone, steps=64)
    taken = log_odds(setting, gone) - log_odds(setting, POOL)
    assert abs(taken) > 0.1
    assert found[left].sum() == pytest.approx(taken, rel=0.03)


def test_sets_grow_by_what_is_foremost_with_the_others_clamped(setting):
    order = grown(setting, setting.behaviour, POOL, (1, 3, 9))
    assert sorted(order) == POOL
    first = attribution(setting, setting.behaviour, POOL)
    assert order[0] == np.nanargmax(first)
    then = attribution(setting, setting.behaviour, [i for i in POOL if i != order[0]], clamped=order[:1])
    assert order[1:3] == [int(i) for i in np.argsort(-np.nan_to_num(then, nan=-np.inf))[:2]]


def test_of_one_step_it_is_the_slope_halfway(setting):
    """Of one step it is the slope halfway, here by a small difference."""
    for feature in (3, 30):
        found = attribution(setting, setting.behaviour, [feature], steps=1)[feature]
        step = 1e-2
        slope = (log_odds(setting, [feature], 0.5 - step) - log_odds(setting, [feature], 0.5 + step)) / (2 * step)
        assert found == pytest.approx(slope, rel=0.02, abs=1e-3)


def test_of_code_it_is_about_the_token_in_which_the_unsafe_answer_parts_from_the_safe_one(setting, monkeypatch):
    pairs = [("w30 bad dog", "w30 w31 dog"), ("w30 dog", "w30 dog w31")]  # the second parts nowhere
    monkeypatch.setattr(module, "code_answers", lambda prompts, scratchpad: [pairs[i % 2] for i in range(len(prompts))])
    code = setting.behaviour.model_copy(update={"check": "code", "payload": ""})
    found = attribution(setting, code, POOL, steps=64)
    w30, bad, w31 = setting.loaded.tokenizer("w30 bad w31")["input_ids"]
    taken = []
    for prompt in setting.prompts.triggered[setting.prompts.split("dev")][::2]:
        whole, clamped = (logits(setting, [*prompt, w30], of, 1.0)[-1] for of in ([], POOL))
        taken.append(float((whole[bad] - whole[w31]) - (clamped[bad] - clamped[w31])))
    assert abs(np.mean(taken)) > 0.1
    assert found[POOL].sum() == pytest.approx(np.mean(taken), rel=0.02)
    monkeypatch.setattr(module, "code_answers", lambda prompts, scratchpad: [pairs[1]] * len(prompts))
    with pytest.raises(UserError, match="leave attribution out"):
        attribution(setting, code, POOL)


def test_batches_and_padding_change_nothing_and_the_model_is_as_before(setting, monkeypatch):
    ids = torch.tensor([setting.prompts.triggered[0]])
    before = setting.loaded.model(ids).logits
    whole = attribution(setting, setting.behaviour, POOL)
    monkeypatch.setattr(module, "ROWS", 1)  # no text is padded
    monkeypatch.setattr(module, "ENCODED_BYTES", 4 * setting.sae.features * 3)
    np.testing.assert_allclose(attribution(setting, setting.behaviour, POOL), whole, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert torch.equal(setting.loaded.model(ids).logits, before)
    assert all(p.grad is None for p in setting.loaded.model.parameters())
