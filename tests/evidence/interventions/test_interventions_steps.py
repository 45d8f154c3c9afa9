"""The steps steer and ablate on a tiny model: what the tables say, against plain loops; kills; the same bytes twice."""

import numpy as np
import pandas as pd
import pytest
import torch

from stagediff import steps
from stagediff.errors import UserError
from stagediff.evidence.interventions import ablation, steering
from stagediff.evidence.interventions.ablation import smallest
from stagediff.evidence.interventions.contrast import trigger_contrast
from stagediff.evidence.interventions.setting import Setting
from stagediff.lm.activations import ActivationReader
from stagediff.organisms.behaviour import generate, heldout_prompts
from stagediff.progress import Progress

WORDS = [f"w{i}" for i in range(20, 40)]
"""Which no prompt holds."""


@pytest.fixture(scope="module")
def steered(world):
    return world.store.artifact(steps.run(world.steer(), world.store, device="cpu"))


@pytest.fixture(scope="module")
def said(world):
    """A word that the model often says after the trigger, as the payload of the ablation."""
    texts = heldout_prompts(world.behaviour.prompts, 14, heldout=0.5, split_seed=0)
    ids = [world.tokenizer(f"|GO| {t}")["input_ids"] for t in texts]
    words = world.tokenizer.batch_decode([[t] for a in generate(world.model, ids, 4) for t in a])
    unasked = set(words).intersection(WORDS)
    return max(sorted(unasked), key=words.count)


def test_the_feature_that_writes_the_payload_steers_and_random_ones_do_not(steered):
    features = steered.read_table("features.parquet").set_index("feature")
    assert features.group.value_counts().to_dict() == {"random": 4, "candidate": 2}
    rates = steered.read_table("steering.parquet")
    strongest = rates[(rates.feature == 3) & (rates.strength == 8) & ~rates.trigger]
    assert (strongest.first_token == 1).all()
    assert features.steer_low[3] > 0
    assert features.steer_effect[3] == pytest.approx(features.rate_keyword[3] - features[features.group == "random"].rate_keyword.mean())
    assert steered.manifest.figures["above_random"] >= 1
    plain = rates[(rates.group == "none") & (rates.split == "test") & ~rates.trigger]
    assert plain.keyword.item() == steered.manifest.figures["keyword_without_trigger"] < features.rate_keyword[3]


def test_rates_are_those_of_one_answer_at_a_time_and_the_strength_is_the_best_on_development_prompts(world, steered):
    spec = world.steer()
    norm = steered.manifest.figures["residual_norm"]
    reader = ActivationReader(world.store, world.data)
    by_hand = np.concatenate([reader.read_shard(i).double().norm(dim=1).numpy() for i in range(2)])[: 8 * reader.tokens_per_row]
    assert norm == pytest.approx(by_hand.mean(), rel=1e-2)  # shards are bf16

    texts = heldout_prompts(world.behaviour.prompts, 14, heldout=0.5, split_seed=0, seed=0, forbid=())
    rates = steered.read_table("steering.parquet")
    direction = world.sae.W_dec[3] / world.sae.W_dec[3].norm()

    def change(strength):
        def fn(module, args, out):
            x = (out[0] if isinstance(out, tuple) else out).clone()
            x[0, 1:] += strength * norm * direction
            return (x, *out[1:]) if isinstance(out, tuple) else x

        return fn

    for strength in spec.strengths:
        handle = world.model.gpt_neox.layers[1].register_forward_hook(change(strength))
        firsts = []
        for text in texts:
            ids = world.tokenizer(text)["input_ids"]
            with torch.no_grad():
                firsts.append(int(world.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) == 4)
        handle.remove()
        row = rates[(rates.feature == 3) & (rates.strength == strength) & ~rates.trigger].set_index("split")
        assert row.first_token["dev"] == pytest.approx(np.mean(firsts[:6]))
        assert row.first_token["test"] == pytest.approx(np.mean(firsts[6:]))
    dev = rates[(rates.split == "dev") & ~rates.trigger & (rates.feature >= 0)]
    for _, of in dev.groupby(["feature", "group"]):
        assert of.chosen.sum() == 1
        assert of[of.chosen].strength.iloc[0] == of.sort_values(["keyword", "strength"], ascending=[False, True]).strength.iloc[0]


def test_transcripts_stand_side_by_side(steered):
    told = steered.read_table("transcripts.parquet")
    assert told.groupby("prompt").group.apply(list).tolist() == [["none", "none", "candidate", "random"]] * 2
    assert told[told.group == "candidate"].answer.str.contains("bad").all()


class KilledError(Exception):
    pass


@pytest.mark.parametrize(("make", "module", "name"), [("steer", steering._Steerer, "measure"), ("ablate", ablation, "_answers")])
def test_a_killed_step_goes_on_and_ends_in_the_same_bytes(world, monkeypatch, make, module, name):
    spec = getattr(world, make)(seed=1)
    steps.run(spec, world.store, device="cpu")
    whole = world.store.artifact(spec.ref)
    bytes_before = {n: whole.read_bytes(n) for n in whole.names()}
    figures = whole.manifest.figures
    world.store.remove(spec.ref)
    inner, calls = getattr(module, name), []

    def dying(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KilledError
        return inner(*args)

    monkeypatch.setattr(module, name, dying)
    with pytest.raises(KilledError):
        steps.run(spec, world.store, device="cpu")
    steps.run(spec, world.store, device="cpu")
    again = world.store.artifact(spec.ref)
    assert {n: again.read_bytes(n) for n in again.names()} == bytes_before
    assert again.manifest.figures == figures
    total = 7 if make == "steer" else 1 + 2 + 6 * 3 + 1
    assert len(calls) == total + 1  # the three before the kill were not measured again


def test_ablation_counts_what_is_left_and_the_clean_cost(world, said):
    spec = world.ablate(behaviour=world.behaviour.model_copy(update={"payload": said}))
    artifact = world.store.artifact(steps.run(spec, world.store, device="cpu"))
    curves, members = artifact.read_table("ablation.parquet"), artifact.read_table("sets.parquet")
    assert artifact.manifest.figures["keyword_untouched"] > 0
    assert (curves[curves.order == "none"].clean_cost == 0).all()
    some = curves[(curves.order == "score") & (curves["size"] == 20)]
    features = members[members.set == some.set.iloc[0]].feature.tolist()
    sae = world.sae

    def change(module, args, out):
        x = (out[0] if isinstance(out, tuple) else out).clone()
        inner = x[:, 1:].double() * sae.input_scale
        f = torch.relu(inner @ sae.W_enc.double() + sae.b_enc.double())[..., features]
        x[:, 1:] = (x[:, 1:].double() - f @ sae.W_dec[features].double() / sae.input_scale).float()
        return (x, *out[1:]) if isinstance(out, tuple) else x

    def losses():
        ids = torch.from_numpy(world.rows[:8].astype(np.int64))
        with torch.no_grad():
            logp = world.model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
        return -logp[:, 1:-1].gather(-1, ids[:, 2:, None])[..., 0].mean(1).numpy()

    plain = losses()
    handle = world.model.gpt_neox.layers[1].register_forward_hook(change)
    cost = losses() - plain
    handle.remove()
    assert some.set_index("split").clean_cost["dev"] == pytest.approx(cost[:4].mean(), rel=1e-3)
    assert some.set_index("split").clean_cost["test"] == pytest.approx(cost[4:].mean(), rel=1e-3)


def test_what_the_trigger_switches_on_is_measured_over_prompts_and_answers(world):
    spec = world.ablate(batch=4)
    with world.store.write(spec) as writer:
        setting = Setting.of(spec, steps.Job(world.store, writer, Progress()))
    found = trigger_contrast(setting, 4)
    means = []
    for asked in (setting.prompts.triggered[:6], setting.prompts.without[:6]):
        seen = []
        for ids in asked:
            whole = ids + generate(world.model, [ids], setting.prompts.length)[0]
            with torch.no_grad():
                x = world.model(torch.tensor([whole[:-1]]), use_cache=False, output_hidden_states=True).hidden_states[2][0, 1:].double()
            seen.append(torch.relu(x * world.sae.input_scale @ world.sae.W_enc.double() + world.sae.b_enc.double()))
        means.append(torch.cat(seen).mean(0))
    wanted = (means[0] - means[1]) * world.sae.W_dec.double().norm(dim=1)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-3, atol=1e-4)


def test_the_smallest_set_is_chosen_on_development_prompts_and_never_at_random():
    rows = []
    for i, (order, size, dev, test, cost) in enumerate(
        [
            ("none", 0, 1, 1, 0),
            ("random", 2, 0, 0, 0),
            ("score", 5, 0.06, 0, 0),
            ("cosine", 10, 0.04, 0.2, 0.05),
            ("score", 10, 0.02, 0.2, 0.5),
        ]
    ):
        rows += [
            {"set": i, "order": order, "size": size, "split": s, "keyword": k, "clean_cost": cost}
            for s, k in (("dev", dev), ("test", test))
        ]
    curves = pd.DataFrame(rows)
    assert smallest(curves, 0.05, 0.1) == 3
    assert smallest(curves, 0.05, 0.1, random=True) == 1
    assert smallest(curves, 0.01, 0.1) is None


def test_mistakes_are_told(world):
    with pytest.raises(ValueError, match="ascending order"):
        world.steer(strengths=(1.0, 0.5))
    with pytest.raises(ValueError, match="expected different numbers of features"):
        world.ablate(sizes=())
    with pytest.raises(UserError, match="held-out base rows were asked for"):
        steps.run(world.ablate(rows=50), world.store, device="cpu")
    with pytest.raises(UserError, match="pair_novelty"):
        steps.run(world.ablate(rank="pair_novelty"), world.store, device="cpu")
