"""Tables as parquet: zstd, page checksums, units and meanings in the field metadata, the same bytes for the same values.

Floats are split by byte plane (BYTE_STREAM_SPLIT), integers stored as differences, text as dictionaries. No index, no pandas metadata, no
times go in. Page checksums catch a flipped byte in a page; the file's crc32c in the manifest catches one anywhere.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

__all__ = ["decode_table", "describe_columns", "encode_table"]

_ROW_GROUP = 1 << 20


def encode_table(frame: "pd.DataFrame | pa.Table", columns: Mapping[str, tuple[str, str]]) -> bytes:
    """A table's parquet bytes. `columns`: name -> (unit, meaning).

    Raises
    ------
    ValueError
        When `columns` describes a column the table does not have, or the frame has an index that would be lost.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if isinstance(frame, pa.Table):
        table = frame
    else:
        import pandas as pd

        if not isinstance(frame.index, pd.RangeIndex) or frame.index.name is not None:
            raise ValueError(
                f"the table's index ({frame.index.name or 'unnamed'}) would be lost: call reset_index() first, with drop=True if it means nothing"
            )
        table = pa.Table.from_pandas(frame, preserve_index=False)
    unknown = set(columns) - set(table.column_names)
    if unknown:
        raise ValueError(f"columns {sorted(unknown)} are described but not in the table, which has {table.column_names}")
    fields = []
    for field in table.schema:
        unit, meaning = columns.get(field.name, ("", ""))
        fields.append(field.with_metadata({"unit": unit, "meaning": meaning} if field.name in columns else None))
    table = table.cast(pa.schema(fields)).combine_chunks()
    encodings = {f.name: _encoding(f.type) for f in fields}
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=3,
        use_dictionary=[name for name, encoding in encodings.items() if encoding is None],
        column_encoding={name: encoding for name, encoding in encodings.items() if encoding} or None,
        write_page_checksum=True,
        row_group_size=_ROW_GROUP,
    )
    return sink.getvalue()


def _encoding(kind: "pa.DataType") -> str | None:
    """The encoding of a flat numeric column; None: parquet's own choice (dictionary)."""
    import pyarrow.types as types

    if types.is_float32(kind) or types.is_float64(kind):
        return "BYTE_STREAM_SPLIT"
    if types.is_integer(kind) and kind.bit_width >= 32:
        return "DELTA_BINARY_PACKED"
    return None


def decode_table(source: bytes | Path, columns: Sequence[str] | None = None) -> "pd.DataFrame":
    """The table as a frame; every page is checked. Column descriptions stand in `frame.attrs["columns"]`: name -> (unit, meaning)."""
    import pyarrow.parquet as pq

    in_memory = isinstance(source, bytes)
    file = pq.ParquetFile(
        io.BytesIO(source) if isinstance(source, bytes) else source, page_checksum_verification=True, memory_map=not in_memory
    )
    if columns is not None:
        missing = [c for c in columns if c not in file.schema_arrow.names]
        if missing:
            raise KeyError(f"no column {', '.join(map(repr, missing))}; the table has {', '.join(file.schema_arrow.names)}")
    table = file.read(columns=list(columns) if columns is not None else None)
    frame = table.to_pandas(ignore_metadata=True)
    frame.attrs["columns"] = describe_columns(table.schema)
    return frame if columns is None else frame[list(columns)]


def describe_columns(schema: Any) -> dict[str, tuple[str, str]]:
    """name -> (unit, meaning) of an arrow schema."""
    described = [f for f in schema if f.metadata and b"meaning" in f.metadata]
    return {f.name: (f.metadata[b"unit"].decode(), f.metadata[b"meaning"].decode()) for f in described}
