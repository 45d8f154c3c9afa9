"""The planted artifacts are what real ones are to whoever reads them, and their making resumes and divides like theirs."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from stagediff import steps
from stagediff.lm.activations import ActivationReader
from stagediff.lm.models import load_tokenizer
from stagediff.lm.spec import CorpusSource, HookPoint, ModelSource, TokenizerSource
from stagediff.progress import Progress
from stagediff.sae.initial import measure
from stagediff.spec import Ref
from stagediff.synthetic.chain import RECIPES, plan
from stagediff.synthetic.spec import PlantedHarvestSpec, PlantedTokenizerSpec, PlantedTokensSpec
from stagediff.synthetic.world import BLOCK_ROWS

ROWS = 2 * BLOCK_ROWS + 40
QUIET = Progress(interactive=False)


@pytest.fixture
def tokens(tiny_world) -> PlantedTokensSpec:
    return PlantedTokensSpec(
        corpus=CorpusSource(digest="planted"),
        tokenizer=TokenizerSource(artifact=Ref("tokenizers/" + "0" * 20)),
        context=tiny_world.context,
        rows=ROWS,
        world=tiny_world,
    )


@pytest.fixture
def harvest(tiny_world, tokens) -> PlantedHarvestSpec:
    return PlantedHarvestSpec(
        model=ModelSource(digest="planted"),
        tokens=tokens.ref,
        rows=ROWS,
        hook=HookPoint(layer=0),
        skip_positions=(),
        batch_rows=BLOCK_ROWS,
        shard_rows=BLOCK_ROWS,
        world=tiny_world,
        checkpoint=7,
    )


def run(spec, store, **options) -> Ref:
    return steps.run(spec, store, device="cpu", progress=QUIET, **options)


@pytest.fixture
def drawn(store, tokens):
    """A store with the token rows (their tokenizer is not looked at)."""
    made = steps.get("planted-tokens")
    with store.write(tokens) as writer:
        figures = steps.resolve(made.compute)(tokens, steps.Job(store, writer, QUIET))
        writer.commit(figures=figures)
    return store


def test_the_tokenizer_reads_and_writes_the_artificial_words(store):
    ref = run(PlantedTokenizerSpec(vocab=30), store)
    tokenizer = load_tokenizer(TokenizerSource(artifact=ref), store)
    assert tokenizer("w3 w29 w0").input_ids == [3, 29, 0]
    assert [tokenizer.decode([i]) for i in (3, 29)] == ["w3", "w29"]
    assert tokenizer("unheard").input_ids == [30]


def test_token_rows_are_the_worlds(drawn, tokens, planted):
    stored = drawn.artifact(tokens.ref)
    expected = np.concatenate([planted.rows("train", b)[0] for b in range(3)])[:ROWS]
    np.testing.assert_array_equal(stored.array("rows").read_rows(0, ROWS), expected)
    assert stored.array("topics").shape == (ROWS, 16, 2)
    assert stored.read_table("rows.parquet").row.tolist() == list(range(ROWS))


def test_activations_are_read_like_any_others(drawn, tokens, harvest, planted):
    from stagediff.lm.spec import ActivationData

    reader = ActivationReader(drawn, ActivationData(base=run(harvest, drawn), rows=ROWS))
    assert (reader.d, reader.n_tokens, reader.n_shards) == (16, ROWS * 16, 3)
    ids, topics = planted.rows("train", 1)
    expected = torch.from_numpy(planted.activations(ids, topics, "train", 1, 7)).to(torch.bfloat16)
    assert torch.equal(reader.read_shard(1), expected)
    np.testing.assert_array_equal(reader.token_ids(np.array([BLOCK_ROWS + 5])), ids[5:6])
    scale, _ = measure(reader)
    assert scale > 0


def test_two_workers_and_one_write_the_same_bytes(drawn, harvest, tmp_path):
    alone = run(harvest, drawn)
    data = drawn.artifact(alone).array("data").read_rows(0, ROWS * 16)
    drawn.remove(alone)
    run(harvest, drawn, part=(0, 2))
    assert not drawn.artifact(alone).is_complete
    run(harvest, drawn, part=(1, 2))
    assert drawn.artifact(alone).is_complete
    np.testing.assert_array_equal(drawn.artifact(alone).array("data").read_rows(0, ROWS * 16), data)


def test_the_reference_space_is_another_artifact_of_the_same_rows(drawn, harvest, planted):
    reference = harvest.model_copy(update={"space": "reference", "hook": HookPoint(layer=1)})
    assert reference.ref != harvest.ref
    stored = drawn.artifact(run(reference, drawn)).array("data").read_shard(0)
    where = (*planted.rows("train", 0), "train", 0)
    expected = torch.from_numpy(planted.meanings(*where)).to(torch.bfloat16)
    assert torch.equal(torch.from_numpy(stored).view(torch.bfloat16), expected)


def test_a_harvest_refuses_what_cannot_be(harvest):
    body = harvest.model_dump()
    with pytest.raises(ValidationError, match="checkpoint 12 is asked of a world with 12"):
        PlantedHarvestSpec.model_validate({**body, "checkpoint": 12})
    with pytest.raises(ValidationError, match="skip no positions"):
        PlantedHarvestSpec.model_validate({**body, "skip_positions": (0,)})


def test_a_world_and_a_recipe_say_everything_that_decides_a_key(tiny_world):
    def keys(world, how) -> dict[str, str]:
        return {n.name: str(n.ref) for n in plan(world, how)}

    recipe = RECIPES["relu"]
    usual = keys(tiny_world, recipe)
    other = keys(tiny_world.model_copy(update={"seed": 4}), recipe)
    assert all(usual[name] != other[name] for name in usual if name != "tokenizer")
    longer = keys(tiny_world, recipe.model_copy(update={"follow": recipe.follow.model_copy(update={"lr": 1e-3})}))
    assert longer["dictionary-0"] == usual["dictionary-0"]
    assert longer["dictionary-1"] != usual["dictionary-1"]
    assert longer["probe-1"] == usual["probe-1"]
