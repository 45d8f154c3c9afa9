"""Tables: values, units and bytes."""

import hashlib
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from toystep import ToySpec

from stagediff.errors import DamagedError
from stagediff.store import Store
from stagediff.store.tables import decode_table, encode_table

MAKE = """
import numpy as np, pandas as pd
rng = np.random.default_rng(0)
frame = pd.DataFrame({
    "feature": np.arange(5000), "x": rng.standard_normal(5000).astype("float32"), "y": rng.standard_normal(5000),
    "alive": rng.random(5000) < 0.5, "text": rng.choice(["a", "b\\n", "\u00fc"], 5000), "count": rng.integers(0, 9, 5000).astype("uint8"),
    "partner": pd.array(rng.integers(0, 5000, 5000), dtype="Int64"), "tokens": [list(range(i % 4)) for i in range(5000)],
})
frame.loc[3, "x"] = np.nan
frame.loc[4, "partner"] = pd.NA
columns = {"x": ("cosine", "rotation by the model"), "count": ("1", "firings")}
"""
made: dict = {}
exec(MAKE, made)
frame: pd.DataFrame = made["frame"]
columns: dict = made["columns"]


def write(store: Store, table: pd.DataFrame = frame) -> None:
    with store.write(ToySpec()) as writer:
        writer.write_table("features.parquet", table, columns=columns)
        writer.commit(figures={})


def test_a_table_comes_back_as_it_was_with_units_and_meanings(root):
    store = Store(root)
    write(store)
    back = store.artifact(ToySpec().ref).read_table("features.parquet")
    assert back.attrs["columns"] == columns
    assert list(back.columns) == list(frame.columns)
    for name in ("feature", "x", "y", "alive", "count"):
        np.testing.assert_array_equal(back[name].to_numpy(), frame[name].to_numpy())
        assert back[name].dtype == frame[name].dtype
    assert back["text"].tolist() == frame["text"].tolist()
    assert [list(t) for t in back["tokens"]] == frame["tokens"].tolist()
    assert back["partner"].isna().tolist() == frame["partner"].isna().tolist()
    some = store.artifact(ToySpec().ref).read_table("features.parquet", columns=["y", "x"])
    assert list(some.columns) == ["y", "x"]
    with pytest.raises(KeyError, match="'z'"):
        store.artifact(ToySpec().ref).read_table("features.parquet", columns=["z"])


def test_the_same_values_give_the_same_bytes_in_another_process():
    code = (
        MAKE
        + "\nimport hashlib\nfrom stagediff.store.tables import encode_table\nprint(hashlib.sha256(encode_table(frame, columns)).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == hashlib.sha256(encode_table(frame, columns)).hexdigest()


def test_units_stand_in_the_field_metadata_of_plain_parquet(tmp_path):
    (tmp_path / "t.parquet").write_bytes(encode_table(frame, columns))
    field = pq.read_schema(tmp_path / "t.parquet").field("x")
    assert field.metadata[b"unit"] == b"cosine"
    assert field.metadata[b"meaning"] == b"rotation by the model"
    assert pq.read_schema(tmp_path / "t.parquet").metadata is None  # nothing of pandas' in it
    chunk = pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(0).column(1)
    assert chunk.compression == "ZSTD"
    assert "BYTE_STREAM_SPLIT" in chunk.encodings


def test_a_frame_whose_index_would_be_lost_and_unknown_columns_are_refused():
    with pytest.raises(ValueError, match="reset_index"):
        encode_table(frame.set_index("feature"), {})
    with pytest.raises(ValueError, match="zz"):
        encode_table(frame, {"zz": ("1", "nothing")})


def test_an_empty_table_round_trips():
    assert list(decode_table(encode_table(frame.head(0), {})).columns) == list(frame.columns)


def test_every_flipped_byte_is_found_on_reading(root):
    store = Store(root)
    write(store)
    key = f"{ToySpec().ref}/features.parquet"
    body = store.objects.get(key)
    rng = np.random.default_rng(2)
    for position in rng.integers(0, len(body), 30):
        flipped = bytearray(body)
        flipped[position] ^= 1 << int(rng.integers(0, 8))
        store.objects.put(key, bytes(flipped))
        with pytest.raises(DamagedError, match="checksum"):
            store.artifact(ToySpec().ref).read_table("features.parquet", columns=["feature"])


def test_page_checksums_are_verified():
    """What protects a table outside a store. Page headers and the footer are not covered, the manifest's crc32c covers all."""
    body = encode_table(frame[["x", "y"]], {})
    flipped = bytearray(body)
    flipped[len(body) // 2] ^= 1
    with pytest.raises(OSError, match="CRC"):
        decode_table(bytes(flipped))
