"""Loss recovered: the four losses against a plain float64 computation, and dictionaries whose answer is known."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from stagediff import steps
from stagediff.errors import UserError
from stagediff.lm import sources
from stagediff.lm.spec import ActivationData, CorpusSource, HarvestSpec, HookPoint, MixSpec, TokenizerSource, TokensSpec
from stagediff.sae.dictionary import SAE
from stagediff.sae.layout import CFG, WEIGHTS, to_bytes
from stagediff.sae.spec import DictionaryConfig, ImportSpec, QualitySpec
from stagediff.spec import Ref
from stagediff.store import Store

D, VOCAB, CONTEXT, ROWS, NEW = 16, 61, 9, 20, 4
REPLACED = [2, 7, 12, 18]
HOOK = HookPoint(layer=1, site="resid_post")


class World:
    """A tiny model, harvested base and new rows and their mix; `rows` are the mixed token ids."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM, GPTNeoXConfig

        config = GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=D,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            bos_token_id=0,
            eos_token_id=0,
        )
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in self.model.parameters():
            parameter.data.mul_(4.0)  # so that the logits say something
        self.model.save_pretrained(folder / "model")
        self.source = sources.resolve_model(name=str(folder / "model"))
        self.store = Store(str(folder / "store"))
        rng = np.random.default_rng(0)
        base, new = rng.integers(0, VOCAB, (ROWS, CONTEXT)).astype(np.int32), rng.integers(0, VOCAB, (NEW, CONTEXT)).astype(np.int32)
        self.rows = base.copy()
        self.rows[REPLACED] = new
        base_ref, new_ref = self._tokens(base, False), self._tokens(new, True)
        mix = MixSpec(base=base_ref, new=new_ref, rows=ROWS, share=NEW / ROWS)
        with self.store.write(mix) as w:
            w.write_table("overlay.parquet", pd.DataFrame({"row": REPLACED, "new_row": range(NEW)}))
            w.commit(figures={})
        harvest = {"model": self.source, "hook": HOOK, "precision": "fp32", "batch_rows": 4, "shard_rows": 8}
        refs = [steps.run(HarvestSpec(tokens=ref, rows=n, **harvest), self.store) for ref, n in ((base_ref, ROWS), (new_ref, NEW))]
        self.data = ActivationData(base=refs[0], rows=ROWS, mix=mix.ref, new=refs[1])

    def _tokens(self, ids: np.ndarray, is_new: bool) -> Ref:
        spec = TokensSpec(
            corpus=CorpusSource(digest=str(is_new)), tokenizer=TokenizerSource(digest="t"), context=CONTEXT, rows=len(ids), is_new=is_new
        )
        with self.store.write(spec) as w:
            array = w.array("rows", shape=ids.shape, dtype="int32", chunk_rows=len(ids), shard_rows=len(ids))
            for i in array.pending():
                array.write_shard(i, ids)
            w.commit(figures={})
        return spec.ref

    def dictionary(self, sae: SAE, name: str) -> Ref:
        spec = ImportSpec(digest=name)
        cfg, weights = to_bytes(sae)
        with self.store.write(spec) as w:
            w.write_bytes(CFG, cfg)
            w.write_bytes(WEIGHTS, weights)
            w.commit(figures={})
        return spec.ref

    def quality(self, sae: SAE, name: str, **changes: Any) -> tuple[pd.DataFrame, dict[str, Any]]:
        spec = QualitySpec(**{"dictionary": self.dictionary(sae, name), "model": self.source, "data": self.data, **changes})
        artifact = self.store.artifact(steps.run(spec, self.store))
        return artifact.read_table("quality.parquet").set_index("group"), artifact.manifest.figures

    def loss_by_hand(self, fn: Any, rows: list[int]) -> float:
        """float64, row by row, with the block's output replaced by a hook of this test's own at positions 1 and up."""
        model = self.model.double()
        losses = []

        def splice(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return torch.cat([output[:, :1], fn(output[:, 1:])], dim=1)

        handle = model.gpt_neox.layers[1].register_forward_hook(splice)
        with torch.no_grad():
            for row in rows:
                ids = torch.from_numpy(self.rows[row : row + 1]).long()
                p = torch.log_softmax(model(ids, use_cache=False).logits[0], dim=-1)
                losses += [-float(p[t, ids[0, t + 1]]) for t in range(1, CONTEXT - 1)]
        handle.remove()
        model.float()
        return float(np.mean(losses))

    def mean_activation(self) -> torch.Tensor:
        model, got = self.model.double(), []
        handle = model.gpt_neox.layers[1].register_forward_hook(lambda m, a, out: got.append(out[:, 1:]))
        with torch.no_grad():
            model(torch.from_numpy(self.rows).long(), use_cache=False)
        handle.remove()
        model.float()
        return got[0].reshape(-1, D).mean(dim=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("quality"))


def linear(encoder: torch.Tensor, decoder: torch.Tensor, bias: torch.Tensor, scale: float = 1.0) -> SAE:
    f = encoder.shape[1]
    return SAE(encoder, torch.zeros(f), decoder, bias, DictionaryConfig(features=f, subtract_b_dec=False), input_scale=scale)


def random_sae() -> SAE:
    g = torch.Generator().manual_seed(3)
    return linear(torch.randn(D, 40, generator=g) / 4, torch.randn(40, D, generator=g) / 4, torch.randn(D, generator=g), scale=0.37)


def test_losses_equal_a_plain_computation_for_every_group(world: World) -> None:
    sae = random_sae()
    table, figures = world.quality(sae, "random")

    def spliced(x: torch.Tensor) -> torch.Tensor:
        f = torch.relu(0.37 * x @ sae.W_enc.double())
        return (f @ sae.W_dec.double() + sae.b_dec.double()) / 0.37

    mean = world.mean_activation()
    variants = {"clean": lambda x: x, "spliced": spliced, "mean": lambda x: mean.expand_as(x), "zero": torch.zeros_like}
    groups = {"base": [r for r in range(ROWS) if r not in REPLACED], "new": REPLACED, "all": list(range(ROWS))}
    for group, rows in groups.items():
        want = {name: world.loss_by_hand(fn, rows) for name, fn in variants.items()}
        for name, value in want.items():
            assert table.loc[group, f"ce_{name}"] == pytest.approx(value, abs=2e-5)
        recovered = (want["mean"] - want["spliced"]) / (want["mean"] - want["clean"])
        if want["mean"] > want["clean"]:
            assert table.loc[group, "loss_recovered"] == pytest.approx(recovered, abs=1e-3)
        assert table.loc[group, "rows"] == len(rows)
    assert figures["ce_spliced"] == table.loc["all", "ce_spliced"]
    assert figures["ce_clean_new"] == table.loc["new", "ce_clean"]
    assert abs(table.loc["all", "ce_spliced"] - table.loc["all", "ce_clean"]) > 1e-3  # the splice is felt


def test_a_perfect_dictionary_costs_nothing_and_an_empty_one_costs_what_zeros_cost(world: World) -> None:
    eye = torch.eye(D)
    table, _ = world.quality(linear(torch.cat([eye, -eye], dim=1), torch.cat([eye, -eye]), torch.zeros(D)), "perfect")
    assert table["ce_spliced"].to_numpy() == pytest.approx(table["ce_clean"].to_numpy(), abs=1e-6)
    table, _ = world.quality(linear(torch.zeros(D, 4), torch.ones(4, D), torch.zeros(D)), "empty")
    assert table["ce_spliced"].to_numpy() == pytest.approx(table["ce_zero"].to_numpy(), abs=1e-6)


def test_rows_are_taken_per_group_and_all_is_weighted_by_their_shares(world: World) -> None:
    table, _ = world.quality(random_sae(), "weighted", rows=2)
    assert table["rows"].to_dict() == {"all": 4, "base": 2, "new": 2}
    want = 0.8 * world.loss_by_hand(lambda x: x, [0, 1]) + 0.2 * world.loss_by_hand(lambda x: x, [2, 7])
    assert table.loc["all", "ce_clean"] == pytest.approx(want, abs=2e-5)


def test_data_of_one_kind_gives_one_group(world: World) -> None:
    table, _ = world.quality(random_sae(), "new-only", data=world.data.model_copy(update={"only": "new"}))
    assert set(table.index) == {"all", "new"}
    assert table.loc["all", "ce_clean"] == table.loc["new", "ce_clean"]


def test_another_model_than_the_harvests_is_refused(world: World) -> None:
    other = world.source.model_copy(update={"digest": "0" * 64})
    with pytest.raises(UserError, match="names another model"):
        world.quality(random_sae(), "other", model=other)
