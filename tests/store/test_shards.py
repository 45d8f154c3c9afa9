"""Arrays in zarr v3 shards: the same bytes' meaning for us and for zarr-python, checked reads, no silent fill values."""

import json
import struct

import google_crc32c
import numpy as np
import pytest
import torch
import zarr
from toystep import ToySpec
from zarr.codecs import Crc32cCodec

from stagediff.errors import DamagedError
from stagediff.store import Store
from stagediff.store.local import LocalObjects
from stagediff.store.shards import ArrayReader, Layout, as_bf16, encode_shard, from_bf16

CASES = [
    ("uint16", (290, 16), 8, 24),
    ("uint16", (24, 5), 8, 24),  # exactly one shard
    ("uint16", (5, 5), 8, 24),  # less than a chunk
    ("int32", (100, 7), 3, 9),
    ("float32", (41, 3), 4, 8),
    ("int64", (33,), 4, 16),
    ("uint8", (17, 2, 3), 2, 6),
]


def values(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(0)
    if dtype.startswith("float"):
        return rng.standard_normal(shape).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max, size=shape, endpoint=True).astype(dtype)


def write(store: Store, data: np.ndarray, chunk_rows: int, shard_rows: int, **attributes) -> None:
    spec = ToySpec()
    with store.write(spec) as writer:
        array = writer.array(
            "data", shape=data.shape, dtype=str(data.dtype), chunk_rows=chunk_rows, shard_rows=shard_rows, attributes=attributes
        )
        for shard in array.pending():
            array.write_shard(shard, data[shard * shard_rows : (shard + 1) * shard_rows])
        writer.commit(figures={})


@pytest.mark.parametrize(("dtype", "shape", "chunk_rows", "shard_rows"), CASES)
def test_zarr_reads_what_we_write(tmp_path, dtype, shape, chunk_rows, shard_rows):
    data = values(dtype, shape)
    write(Store(tmp_path), data, chunk_rows, shard_rows, encoding="bfloat16")
    array = zarr.open(tmp_path / ToySpec().ref / "data", mode="r")
    assert array.shape == shape
    assert array.dtype == dtype
    assert array.attrs["encoding"] == "bfloat16"
    np.testing.assert_array_equal(array[:], data)


@pytest.mark.parametrize(("dtype", "shape", "chunk_rows", "shard_rows"), CASES)
def test_we_read_what_zarr_writes_and_the_shards_agree_byte_for_byte(tmp_path, dtype, shape, chunk_rows, shard_rows):
    data = values(dtype, shape)
    layout = Layout(shape, dtype, chunk_rows, shard_rows, {})
    fill = json.loads(layout.to_json())["fill_value"]
    with zarr.config.set({"array.write_empty_chunks": True}):
        array = zarr.create_array(
            tmp_path / "theirs",
            shape=shape,
            dtype=dtype,
            chunks=(chunk_rows, *shape[1:]),
            shards=(shard_rows, *shape[1:]),
            compressors=[Crc32cCodec()],
            fill_value=fill,
        )
        array[:] = data
    theirs = json.loads((tmp_path / "theirs" / "zarr.json").read_text())
    assert json.loads(layout.to_json()) == theirs
    reader = ArrayReader(LocalObjects(str(tmp_path)), "theirs", Layout.from_json((tmp_path / "theirs" / "zarr.json").read_bytes()))
    np.testing.assert_array_equal(reader.read_rows(0, shape[0]), data)
    for shard in range(layout.n_shards):
        ours = b"".join(encode_shard(layout, shard, data[shard * shard_rows : (shard + 1) * shard_rows]).parts)
        stored = (tmp_path / "theirs" / layout.shard_name(shard)).read_bytes()
        if layout.rows_of(shard) == shard_rows:
            assert ours == stored
        else:  # zarr stores chunks past the end too; ours are absent
            chunks = -(-layout.rows_of(shard) // chunk_rows)
            assert ours[: chunks * (layout.chunk_bytes + 4)] == stored[: chunks * (layout.chunk_bytes + 4)]


def test_a_shards_bytes_are_as_the_specification_says():
    layout = Layout((5, 2), "uint16", 2, 4, {})
    block = np.arange(8, dtype=np.uint16).reshape(4, 2)
    chunks = [struct.pack("<4H", 0, 1, 2, 3), struct.pack("<4H", 4, 5, 6, 7)]
    crc = lambda b: struct.pack("<I", google_crc32c.value(b))  # noqa: E731
    index = struct.pack("<4Q", 0, 12, 12, 12)
    assert b"".join(encode_shard(layout, 0, block).parts) == chunks[0] + crc(chunks[0]) + chunks[1] + crc(chunks[1]) + index + crc(index)
    last = struct.pack("<4H", 8, 9, 0xFFFF, 0xFFFF)
    absent = struct.pack("<4Q", 0, 12, 2**64 - 1, 2**64 - 1)
    assert b"".join(encode_shard(layout, 1, np.array([[8, 9]], np.uint16)).parts) == last + crc(last) + absent + crc(absent)


def test_any_range_of_rows_can_be_read(root):
    data = values("uint16", (290, 16))
    store = Store(root)
    write(store, data, 8, 24)
    array = store.artifact(ToySpec().ref).array()
    assert (array.shape, array.dtype, array.shard_rows, array.chunk_rows, array.n_shards, len(array)) == (
        (290, 16),
        np.uint16,
        24,
        8,
        13,
        290,
    )
    rng = np.random.default_rng(1)
    for start, stop in [(0, 290), (0, 0), (290, 290), (23, 25), (289, 290), *np.sort(rng.integers(0, 291, (20, 2)), axis=1).tolist()]:
        np.testing.assert_array_equal(array.read_rows(start, stop), data[start:stop])
    for shard in range(13):
        np.testing.assert_array_equal(array.read_shard(shard), data[shard * 24 : (shard + 1) * 24])
    for start, stop in [(-1, 3), (5, 4), (280, 291)]:
        with pytest.raises(IndexError):
            array.read_rows(start, stop)
    with pytest.raises(IndexError):
        array.read_shard(13)


def test_reads_give_arrays_that_may_be_changed_and_shared_with_torch(tmp_path):
    data = values("uint16", (48, 16))
    write(Store(tmp_path), data, 8, 24)
    array = Store(tmp_path).artifact(ToySpec().ref).array()
    block = array.read_shard(0)
    assert block.flags.writeable
    assert block.flags.c_contiguous
    as_bf16(block)[:] = 1.0
    np.testing.assert_array_equal(array.read_shard(0), data[:24])


def test_bfloat16_round_trip_keeps_every_bit():
    bits = np.arange(2**16, dtype=np.uint16)  # NaNs and infinities too
    tensor = as_bf16(bits.copy())
    assert tensor.dtype == torch.bfloat16
    assert tensor[0x3F80] == 1.0
    np.testing.assert_array_equal(from_bf16(tensor), bits)
    with pytest.raises(TypeError, match="bfloat16"):
        from_bf16(torch.zeros(2))


def test_a_missing_shard_raises_and_is_never_read_as_fill_values(root):
    store = Store(root)
    data = values("uint16", (290, 16))
    write(store, data, 8, 24)
    store.objects.delete(f"{ToySpec().ref}/data/c/3/0")
    array = store.artifact(ToySpec().ref).array()
    with pytest.raises(DamagedError, match=r"Shard 3 of 13.*missing.*--force"):
        array.read_shard(3)
    with pytest.raises(DamagedError, match="missing"):
        array.read_rows(70, 80)
    np.testing.assert_array_equal(array.read_rows(0, 72), data[:72])


def test_a_chunk_that_the_index_calls_absent_raises(tmp_path):
    store = Store(tmp_path)
    write(store, values("uint16", (24, 16)), 8, 24)
    path = tmp_path / ToySpec().ref / "data/c/0/0"
    body = bytearray(path.read_bytes())
    index = body[-52:-4]
    index[16:32] = b"\xff" * 16
    body[-52:] = bytes(index) + struct.pack("<I", google_crc32c.value(bytes(index)))
    path.write_bytes(body)
    array = store.artifact(ToySpec().ref).array()
    with pytest.raises(DamagedError, match="never written"):
        array.read_rows(8, 9)


def test_shards_with_other_rows_have_other_content_though_their_crc32c_is_the_same(tmp_path):
    """A crc over data that ends in its own crc is a constant: what `content` is there for."""
    layout = Layout((24, 4), "uint16", 8, 24, {})
    one, two = (encode_shard(layout, 0, np.full((24, 4), v, np.uint16)) for v in (1, 2))
    assert one.crc == two.crc == google_crc32c.value(b"".join(one.parts))
    assert one.content != two.content


def test_swapped_shards_are_found(root):
    store = Store(root)
    write(store, values("uint16", (72, 16)), 8, 24)
    ref, objects = ToySpec().ref, store.objects
    first, second = (objects.get(f"{ref}/data/c/{i}/0") for i in (0, 1))
    objects.put(f"{ref}/data/c/0/0", second)
    objects.put(f"{ref}/data/c/1/0", first)
    artifact = store.artifact(ref)
    assert {p.path for p in artifact.verify()} == {"data/c/0/0", "data/c/1/0"}
    with pytest.raises(DamagedError, match="other rows"):
        artifact.array().read_shard(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"dtype": "float16"}, "float16"), ({"chunk_rows": 7}, "multiple"), ({"shape": ()}, "shape"), ({"shape": (3, 0)}, "shape")],
)
def test_layouts_that_cannot_be_stored_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Layout(**{"shape": (10, 2), "dtype": "uint16", "chunk_rows": 8, "shard_rows": 24, "attributes": {}, **change})


def test_blocks_of_another_shape_or_type_are_refused(tmp_path):
    with Store(tmp_path).write(ToySpec()) as writer:
        array = writer.array("data", shape=(30, 4), dtype="uint16", chunk_rows=8, shard_rows=24)
        for block in (np.zeros((23, 4), np.uint16), np.zeros((24, 4), np.int16), np.zeros((24, 5), np.uint16)):
            with pytest.raises(ValueError, match="shard 0 takes a uint16 block"):
                array.write_shard(0, block)
        with pytest.raises(ValueError, match="6, 4"):
            array.write_shard(1, np.zeros((24, 4), np.uint16))


def test_an_array_without_rows_is_complete_at_once(tmp_path):
    store = Store(tmp_path)
    write(store, np.zeros((0, 4), np.uint16), 8, 24)
    assert store.artifact(ToySpec().ref).array().read_rows(0, 0).shape == (0, 4)
