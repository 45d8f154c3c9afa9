"""The overlay of new rows over base rows."""

from pathlib import Path

import numpy as np
import pytest

from stagediff import steps
from stagediff.errors import UserError
from stagediff.lm.mix import replaced_rows
from stagediff.lm.spec import CorpusSource, MixSpec, TokenizerSource, TokensSpec
from stagediff.spec import Ref
from stagediff.store import Store


@pytest.mark.parametrize("rows", [1, 10, 999, 12_345])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.05, 1 / 3, 0.5, 0.99, 1.0])
def test_the_share_is_exact_and_so_is_that_of_every_prefix(rows, share):
    replaced = replaced_rows(rows, share, seed=0)
    assert len(replaced) == round(rows * share)
    assert np.all(np.diff(replaced) > 0)
    assert not len(replaced) or (replaced[0] >= 0 and replaced[-1] < rows)
    within = np.searchsorted(replaced, np.arange(rows + 1))  # replaced rows among the first n
    assert np.abs(within - np.arange(rows + 1) * len(replaced) / rows).max() <= 1


def test_places_depend_on_the_seed_and_are_uniform():
    assert np.array_equal(replaced_rows(1000, 0.05, 3), replaced_rows(1000, 0.05, 3))
    counts = np.zeros(1000)
    for seed in range(400):
        counts[replaced_rows(1000, 0.05, seed)] += 1
    assert counts.sum() == 400 * 50
    # Each row is replaced with probability 1/20; chi-square over rows, mean 950, sd 44 (one place per block of 20).
    assert abs((((counts - 20) ** 2) / 20).sum() - 950) < 5 * 44


def write_rows(store: Store, rows: int, context: int = 8, seed: int = 0) -> Ref:
    spec = TokensSpec(corpus=CorpusSource(digest="x"), tokenizer=TokenizerSource(digest="y"), rows=rows, context=context, seed=seed)
    with store.write(spec) as writer:
        array = writer.array("rows", shape=(rows, context), dtype="int32", chunk_rows=rows, shard_rows=rows)
        for i in array.pending():
            array.write_shard(i, np.zeros((rows, context), np.int32))
        writer.commit(figures={}, numerics={}, notes={})
    return spec.ref


def test_the_overlay_gives_new_rows_in_their_order(tmp_path: Path):
    store = Store(str(tmp_path))
    spec = MixSpec(base=write_rows(store, 500), new=write_rows(store, 30, seed=1), rows=400, share=0.05)
    artifact = store.artifact(steps.run(spec, store))
    overlay = artifact.read_table("overlay.parquet")
    assert overlay.row.tolist() == replaced_rows(400, 0.05, 0).tolist()
    assert overlay.new_row.tolist() == list(range(20))
    assert artifact.manifest.figures == {"rows": 400, "new_rows": 20, "share": 0.05}


def test_rows_that_are_not_there_are_refused(tmp_path: Path):
    store = Store(str(tmp_path))
    base, new, other = write_rows(store, 100), write_rows(store, 5, seed=1), write_rows(store, 50, context=16)
    for spec, message in (
        (MixSpec(base=base, new=new, rows=101), "only 100 base rows"),
        (MixSpec(base=base, new=new, rows=100, share=0.06), "needs 6 new rows.*only 5"),
        (MixSpec(base=base, new=other, rows=100), "one context"),
        (MixSpec(base=base, new=new, rows=100, share=1.5), "from 0 to 1"),
    ):
        with pytest.raises(UserError, match=message):
            steps.run(spec, store)
