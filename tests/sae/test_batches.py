"""The data order: every token once an epoch, the same for paired data sets, and findable from any step."""

import itertools
from collections import Counter

import pandas as pd
import pytest
import torch

from stagediff.errors import UserError
from stagediff.lm.activations import ActivationReader
from stagediff.lm.spec import ActivationData, MixSpec
from stagediff.sae.batches import Order, batches, shard_sizes

SIZES = (10, 10, 10, 10, 7)


def numbered(reader, tokens: int = 47, shard: int = 10, plus: float = 0.0):
    """Activations whose first column is the token's number (small whole numbers are exact in bf16)."""
    x = torch.stack([torch.arange(tokens, dtype=torch.float32), torch.full((tokens,), plus)], dim=1)
    return reader(x, shard)


def order(seed: int = 0, window: int = 20) -> Order:
    return Order(seed, SIZES, window)


def read(data, order: Order, batch: int, first: int, stop: int) -> list[list[int]]:
    return [x[:, 0].int().tolist() for x in batches(data, order, batch, first, stop)]


@pytest.mark.parametrize("batch", [1, 5, 8, 47, 60])
@pytest.mark.parametrize("window", [10, 20, 25, 1000])
def test_every_epoch_reads_every_token_once(reader, batch, window):
    got = list(itertools.chain(*read(numbered(reader), order(window=window), batch, 0, -(-3 * 47 // batch))))
    for epoch in range(3):
        assert Counter(got[epoch * 47 : (epoch + 1) * 47]) == Counter(range(47))


def test_all_batches_are_full_and_as_many_as_asked(reader):
    got = read(numbered(reader), order(), 8, 0, 30)
    assert [len(b) for b in got] == [8] * 30
    assert list(batches(numbered(reader), order(), 8, 5, 5)) == []


@pytest.mark.parametrize("first", [1, 2, 3, 5, 6, 11, 17, 29])
def test_reading_can_start_at_any_step(reader, first):
    whole = read(numbered(reader), order(), 8, 0, 30)
    assert read(numbered(reader), order(), 8, first, 30) == whole[first:]


def test_a_resumed_reading_does_not_begin_at_the_first_row(reader):
    assert read(numbered(reader), order(), 8, 3, 4) != read(numbered(reader), order(), 8, 0, 1)


def test_data_sets_of_one_layout_give_the_same_rows_in_the_same_order(reader):
    """Base and mix, base model and finetuned model: only the values differ."""
    base, mix = numbered(reader), numbered(reader, plus=7.0)
    assert read(base, order(), 8, 0, 25) == read(mix, order(), 8, 0, 25)


def test_base_and_mix_differ_in_the_replaced_rows_only(store, stored, planted):
    """Through the store: D reads the mix, M base data; every other token is the same token at the same place in the same batch."""
    per_row, rows = 8, 64
    x, _ = planted(per_row * rows, 8, 12)
    base = stored(store, x, shard_rows=16)
    new = stored(store, 100 + planted(per_row * 4, 8, 12, seed=9)[0], shard_rows=16, name="new")
    base_tokens, new_tokens = (store.artifact(data.base).spec().tokens for data in (base, new))
    replaced = [3, 17, 18, 60]
    mix = MixSpec(base=base_tokens, new=new_tokens, rows=rows, share=4 / rows)
    with store.write(mix) as w:
        w.write_table("overlay.parquet", pd.DataFrame({"row": replaced, "new_row": range(4)}))
        w.commit(figures={})
    mixed = ActivationData(base=base.base, rows=rows, mix=mix.ref, new=new.base)
    streams = []
    for data in (base, mixed):
        reader = ActivationReader(store, data)
        o = Order(7, shard_sizes(reader), window_tokens=200)
        streams.append(torch.cat(list(batches(reader, o, 32, 0, per_row * rows // 32))))
    differs = (streams[0] != streams[1]).any(1)
    assert int(differs.sum()) == per_row * len(replaced)
    assert (streams[1][differs].float().mean(1) > 50).all(), "these are the new rows"


def test_the_order_depends_on_the_seed_and_changes_from_epoch_to_epoch(reader):
    first = list(itertools.chain(*read(numbered(reader), order(0), 47, 0, 2)))
    other = list(itertools.chain(*read(numbered(reader), order(1), 47, 0, 1)))
    assert first[:47] != other
    assert first[:47] != first[47:]
    assert first[:47] != sorted(first[:47])


def test_shards_within_a_window_are_mixed_and_windows_are_not(reader):
    got = read(numbered(reader), order(window=20), 47, 0, 1)[0]
    windows = order(window=20).windows(0)
    at = 0
    for window in windows:
        part = got[at : at + window.tokens]
        assert {t // 10 for t in part} == set(window.shards)
        at += window.tokens
    assert max(w.tokens for w in windows) <= 20
    assert any(len(w.shards) > 1 for w in windows)


def test_no_more_than_one_window_is_read_ahead(reader):
    data = numbered(reader)
    o = order(window=10)
    stream = batches(data, o, 5, 0, 1000)
    for _ in range(12):
        next(stream)
    stream.close()
    touched = 12 * 5 // 7 + 1  # windows begun, at most
    assert len(data.reads) <= touched + 1


def test_nothing_beyond_the_last_step_is_read(reader):
    data = numbered(reader)
    o = order(window=10)
    list(batches(data, o, 5, 0, 1))
    assert len(data.reads) == 1


def test_a_shard_larger_than_the_window_is_a_window_of_its_own(reader):
    assert [w.tokens for w in Order(0, (30, 30), 10).windows(0)] == [30, 30]


def test_empty_shards_do_no_harm(reader):
    o = Order(3, (0, 4, 0, 6, 0), 5)
    assert sum(w.tokens for w in o.windows(0)) == 10
    seen = list(itertools.islice(o.from_position(13), 3))
    assert all(offset < window.tokens for window, offset in seen)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_an_error_that_names_the_place(reader, value):
    data = numbered(reader)
    data.x[23, 1] = value
    with pytest.raises(UserError, match=r"NaN or infinite.*shard 2, token 3"):
        list(batches(data, order(), 8, 0, 6))


def test_an_error_of_the_reading_thread_reaches_the_caller(reader):
    data = numbered(reader)

    def fails(i):
        raise OSError("disk gone")

    data.read_shard = fails
    with pytest.raises(OSError, match="disk gone"):
        next(batches(data, order(), 8))


def test_a_shard_that_does_not_match_its_layout_is_refused(reader):
    with pytest.raises(RuntimeError, match="shard"):
        list(batches(numbered(reader), Order(0, (9, 10, 10, 10, 8)), 8, 0, 5))


def test_sizes_are_asked_of_the_reader_without_reading(reader):
    data = numbered(reader)
    assert shard_sizes(data) == SIZES
    assert data.reads == []
