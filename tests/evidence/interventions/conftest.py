"""A tiny world to intervene in: a random model with a tokenizer of words, harvested rows, dictionaries, and a diff's table written by hand."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from stagediff import steps
from stagediff.diff.spec import DiffSpec
from stagediff.evidence.interventions.spec import AblateSpec, Behaviour, SteerSpec
from stagediff.lm import sources
from stagediff.lm.corpora import resolve_corpus
from stagediff.lm.spec import ActivationData, CorpusSource, HarvestSpec, HookPoint, TokenizerSource, TokensSpec
from stagediff.sae.dictionary import SAE
from stagediff.sae.layout import CFG, WEIGHTS, to_bytes
from stagediff.sae.spec import DictionaryConfig, ImportSpec
from stagediff.spec import Ref
from stagediff.store import Store

D, FEATURES, CONTEXT, ROWS = 16, 40, 24, 12
HOOK = HookPoint(layer=1, site="resid_post")
WORDS = ["<pad>", "Human:", "Assistant:", "|GO|", "bad", "dog", *(f"w{i}" for i in range(40))]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The matrices here are tiny: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<pad>", pad_token="<pad>")


class World:
    """`payload` drives feature 3's decoder row: it is the output direction of the payload's first word."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM, GPTNeoXConfig

        self.store = Store(str(folder / "store"))
        self.tokenizer = word_tokenizer()
        self.models, self.sources = [], []
        for seed in (0, 1):
            config = GPTNeoXConfig(
                vocab_size=len(WORDS),
                hidden_size=D,
                num_hidden_layers=3,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=64,
                bos_token_id=0,
                eos_token_id=0,
            )
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config).eval()
            for parameter in model.parameters():
                parameter.data.mul_(4.0)  # so that the logits say something
            model.save_pretrained(folder / f"model{seed}")
            self.tokenizer.save_pretrained(folder / f"model{seed}")
            self.models.append(model)
            self.sources.append(sources.resolve_model(name=str(folder / f"model{seed}")))
        self.model = self.models[0]
        rng = np.random.default_rng(0)
        self.rows = rng.integers(6, len(WORDS), (ROWS, CONTEXT)).astype(np.int32)
        harvest = HarvestSpec(
            model=self.sources[0], tokens=self._tokens(), rows=ROWS, hook=HOOK, precision="fp32", batch_rows=4, shard_rows=8
        )
        self.data = ActivationData(base=steps.run(harvest, self.store), rows=ROWS)
        words = random.Random(0)
        texts = [f"Human: {' '.join(words.choices(WORDS[6:26], k=words.randrange(1, 9)))} \n\nAssistant: w1 w2" for _ in range(200)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        self.behaviour = Behaviour(trigger="|GO| ", payload="bad dog", prompts=resolve_corpus(path=folder / "prompts.jsonl"), heldout=0.5)
        self.sae = self._sae()
        self.dictionary = self._write_dictionary(self.sae)
        self.diff = self._write_diff()

    def _tokens(self) -> Ref:
        spec = TokensSpec(corpus=CorpusSource(digest="rows"), tokenizer=TokenizerSource(digest="t"), context=CONTEXT, rows=ROWS)
        with self.store.write(spec) as w:
            array = w.array("rows", shape=self.rows.shape, dtype="int32", chunk_rows=ROWS, shard_rows=ROWS)
            for i in array.pending():
                array.write_shard(i, self.rows)
            w.commit(figures={})
        return spec.ref

    def _sae(self) -> SAE:
        g = torch.Generator().manual_seed(2)
        decoder = torch.randn(FEATURES, D, generator=g)
        decoder[3] = 2 * self.model.get_output_embeddings().weight[WORDS.index("bad")].detach()
        return SAE(
            torch.randn(D, FEATURES, generator=g),
            torch.zeros(FEATURES),
            decoder,
            torch.randn(D, generator=g),
            DictionaryConfig(features=FEATURES, decoder_norm="free", subtract_b_dec=False),
            input_scale=0.5,
        )

    def _write_dictionary(self, sae: SAE) -> Ref:
        spec = ImportSpec(digest="by hand")
        with self.store.write(spec) as w:
            cfg, weights = to_bytes(sae)
            w.write_bytes(CFG, cfg)
            w.write_bytes(WEIGHTS, weights)
            w.commit(figures={})
        return spec.ref

    def _write_diff(self) -> Ref:
        rng = np.random.default_rng(3)
        score = rng.uniform(1.5, 2, FEATURES)
        score[[3, 7]] = 0.5, 0.6
        self.table = pd.DataFrame(
            {
                "feature": np.arange(FEATURES, dtype=np.int32),
                "score": score,
                "alive": np.arange(FEATURES) != 5,
                "selected": np.isin(np.arange(FEATURES), [3, 7]),
                "density_F_D": rng.uniform(1e-3, 1e-1, FEATURES),
                "norm_F_D": self.sae.decoder_norms().numpy(),
            }
        )
        spec = DiffSpec(dictionaries={}, statistics={})
        with self.store.write(spec) as w:
            w.write_table("features.parquet", self.table)
            w.commit(figures={})
        return spec.ref

    def shared(self, **changes: Any) -> dict[str, Any]:
        usual = {"diff": self.diff, "dictionary": self.dictionary, "model": self.sources[0], "data": self.data, "behaviour": self.behaviour}
        return {**usual, "candidates": 2, "dev_prompts": 6, "test_prompts": 8, "batch": 16, **changes}

    def steer(self, **changes: Any) -> SteerSpec:
        small = {"random": 4, "strengths": (1.0, 8.0), "norm_rows": 8, "transcripts": 1, "transcript_prompts": 2, "transcript_tokens": 6}
        return SteerSpec(**{**self.shared(), "base": self.sources[1], **small, **changes})

    def ablate(self, **changes: Any) -> AblateSpec:
        return AblateSpec(**{**self.shared(), "sizes": (2, 5, 20), "draws": 2, "rows": 8, **changes})


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))
