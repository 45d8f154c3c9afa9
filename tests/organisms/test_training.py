"""The training loop's parts, against plain references."""

import itertools
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from stagediff.errors import UserError
from stagediff.organisms.spec import LmTraining
from stagediff.organisms.training import Trainee, cross_entropy, learning_rate, train, use_causal_attention
from stagediff.progress import Progress


def neox(seed: int = 0, **changes) -> GPTNeoXForCausalLM:
    torch.manual_seed(seed)
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    off = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "max_position_embeddings": 64}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**shape, **off, **changes}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cross_entropy_and_its_gradient(dtype):
    torch.manual_seed(0)
    logits = (3 * torch.randn(4, 7, 50)).to(dtype).requires_grad_()
    targets = torch.randint(50, (4, 7))
    loss = cross_entropy(logits, targets)
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact.reshape(-1, 50), targets.reshape(-1))
    expected.backward()
    tolerance = 4e-3 if dtype == torch.bfloat16 else 1e-6
    assert abs(loss.item() - expected.item()) < tolerance * expected.item()
    assert (logits.grad.double() - exact.grad).norm() < tolerance * exact.grad.norm()


def test_cross_entropy_stays_finite_when_the_right_token_has_no_probability():
    logits = torch.tensor([[[0.0, 400.0]]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([[0]]))
    loss.backward()
    assert math.isfinite(loss.item())
    assert loss.item() > 80
    assert torch.isfinite(logits.grad).all()


def test_causal_attention_computes_what_eager_attention_does():
    model = neox(attn_implementation="eager").double()
    ids = torch.randint(50, (3, 20))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits
        logits.square().sum().backward()
        return logits.detach(), model.gpt_neox.layers[0].attention.query_key_value.weight.grad.clone()

    eager = run()
    use_causal_attention(model)
    assert model.config._attn_implementation == "stagediff_causal"
    for mine, theirs in zip(run(), eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)  # eager takes its softmax in fp32


def test_other_architectures_keep_their_attention():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20))
    before = model.config._attn_implementation
    use_causal_attention(model)
    assert model.config._attn_implementation == before


def test_learning_rate_rises_then_falls_along_a_cosine():
    training = LmTraining(steps=100, lr=2.0, warmup=10, final_lr=0.1)
    rates = [learning_rate(training, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == pytest.approx(2.0, rel=0.03)
    assert rates[50] == pytest.approx(2.0 * 0.55)
    assert 0.2 <= rates[-1] < 0.21
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


class Keeper:
    """A writer's training checkpoints, in memory."""

    def __init__(self):
        self.training, self.saved = self, []

    def save(self, step, tensors, meta):
        self.saved.append((step, {k: v.clone() for k, v in tensors.items()}, dict(meta, curve=list(meta["curve"]))))

    def latest(self):
        return self.saved[-1] if self.saved else None


def batches(step: int) -> torch.Tensor:
    return torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_updates_follow_torchs_optimisers_on_fp32_weights(optimizer):
    """The loop against one written out with torch's own optimisers, gradients taken from a bf16 copy."""
    training = LmTraining(steps=6, batch=4, lr=3e-3, warmup=2, clip=0.5, optimizer=optimizer)
    trainee = Trainee(neox(), training)
    train(trainee, batches, Keeper(), Progress(False), "t", resume_every=100)

    reference, copy = neox(), neox()
    for parameter in copy.parameters():
        parameter.data = parameter.data.bfloat16()
    inner = [p for n, p in reference.named_parameters() if p.dim() == 2 and "layers" in n]
    rest = [p for p in reference.parameters() if optimizer == "adamw" or all(p is not q for q in inner)]
    optimizers = [torch.optim.AdamW([{"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0} for p in rest], 1.0, betas=(0.9, 0.95))]
    if optimizer == "muon":
        optimizers.append(torch.optim.Muon(inner, 1.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    for step in range(6):
        rows = batches(step)
        cross_entropy(copy(input_ids=rows).logits[:, :-1], rows[:, 1:]).backward()
        for p, q in zip(reference.parameters(), copy.parameters(), strict=True):
            p.grad, q.grad = q.grad.float(), None
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        for o in optimizers:
            for group in o.param_groups:
                group["lr"] = learning_rate(training, step)
            o.step()
        with torch.no_grad():
            for p, q in zip(reference.parameters(), copy.parameters(), strict=True):
                q.copy_(p)
    start = dict(neox().named_parameters())
    for name, expected in reference.named_parameters():
        moved = (expected - start[name]).norm()
        assert (trainee.masters[name] - expected).norm() < 1e-4 * moved, name
    for name, parameter in trainee.model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter.detach(), trainee.masters[name].detach().bfloat16())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_training_ends_with_the_same_bits(optimizer):
    training = LmTraining(steps=12, batch=4, lr=3e-3, warmup=2, optimizer=optimizer)
    whole, keeper = Trainee(neox(), training), Keeper()
    curve = train(whole, batches, keeper, Progress(False), "t", resume_every=5)
    assert [step for step, _, _ in keeper.saved] == [5, 10]
    for upto in (1, 2):
        part = Keeper()
        part.saved = keeper.saved[:upto]
        again, seen = Trainee(neox(seed=9), training), []
        assert train(again, batches, part, Progress(False), "t", resume_every=5, before_step=seen.append) == curve
        assert seen == list(range(5 * upto, 13))
        assert all(torch.equal(again.masters[n], whole.masters[n]) for n in whole.masters)


def test_frozen_weights_stay(tmp_path):
    model = neox()
    model.gpt_neox.embed_in.weight.requires_grad_(False)
    before = model.gpt_neox.embed_in.weight.detach().clone()
    trainee = Trainee(model, LmTraining(steps=3, batch=4))
    train(trainee, batches, Keeper(), Progress(False), "t", resume_every=2)
    assert torch.equal(trainee.masters["gpt_neox.embed_in.weight"], before)


def test_saved_weights_are_the_fp32_masters(tmp_path):
    trainee = Trainee(neox(), LmTraining(steps=3, batch=4))
    train(trainee, batches, Keeper(), Progress(False), "t", resume_every=9)
    trainee.save(str(tmp_path))
    loaded = GPTNeoXForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    assert all(torch.equal(p, trainee.masters[n]) for n, p in loaded.named_parameters())
    assert next(trainee.model.parameters()).dtype == torch.bfloat16


def test_a_model_that_yields_nan_is_an_error_that_says_where():
    model = neox()
    model.gpt_neox.final_layer_norm.weight.data[3] = float("nan")
    with pytest.raises(UserError, match=r"broke down at step 0: loss nan.*training\.lr"):
        train(Trainee(model, LmTraining(steps=3, batch=4)), batches, Keeper(), Progress(False), "organism", resume_every=9)


def test_a_config_with_dropout_does_not_make_training_random():
    weights = []
    for seed in (1, 2):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0.5, bos_token_id=0, eos_token_id=0)
        )
        torch.manual_seed(seed)
        trainee = Trainee(model, LmTraining(steps=3, batch=4))
        train(trainee, batches, Keeper(), Progress(False), "t", resume_every=9)
        weights.append(torch.cat([m.detach().flatten() for m in trainee.masters.values()]))
    assert torch.equal(*weights)
