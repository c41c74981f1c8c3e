"""What a Parquet file claims about its pages, checked against its size before pyarrow believes it.

pyarrow allocates what a page header asks for, and its Python access to a column chunk's metadata
aborts the process on some corrupt files; so we read these few numbers ourselves. The structures:
parquet-format, src/main/thrift/parquet.thrift.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from orcd_batch.data.thrift_compact import TruncatedError, read_struct

_CHUNK_SHAPE = {3: [None], 4: None, 5: None, 7: None, 9: None, 11: None}
_FOOTER_SHAPE = {4: [{1: [{3: _CHUNK_SHAPE}]}]}
_PAGE_SHAPE = {2: None, 3: None}

# The largest factor by which a codec can expand a page: uncompressed, snappy, gzip, lz4, lz4_raw.
# Others (zstd, brotli) reach tens of thousands on constant data; more is refused.
_MAX_EXPANSION = {0: 1, 1: 64, 2: 1_100, 5: 256, 7: 256}
_MAX_EXPANSION_OTHERWISE = 50_000
_SMALL_PAGE_BYTES = 2**20
_MAX_HEADER_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class ColumnChunk:
    """One leaf column of one row group. path: its dotted name, as the chunk itself says."""

    path: str
    codec: int
    start: int
    size: int


def column_chunks(footer: bytes, file_size: int) -> list[list[ColumnChunk]]:
    """The column chunks of every row group; raises ValueError unless all lie inside the file.

    footer: the file's Thrift metadata. file_size: in bytes.
    """
    document, _ = read_struct(footer, _FOOTER_SHAPE)
    data_size = file_size - 8 - len(footer)
    return [
        [_column_chunk(chunk.get(3), data_size) for chunk in group.get(1, [])]
        for group in document.get(4, [])
    ]


def check_pages(source: Any, chunks: Collection[ColumnChunk]) -> None:
    """Walks the page headers of column chunks. source: a pyarrow NativeFile.

    Raises ValueError for a page that leaves its chunk or that claims more bytes, uncompressed,
    than its codec could give.
    """
    for chunk in chunks:
        position, end = chunk.start, chunk.start + chunk.size
        while position < end:
            header, header_size = _page_header(source, position, end)
            uncompressed, compressed = header.get(2, -1), header.get(3, -1)
            position += header_size + max(0, compressed)
            if uncompressed < 0 or compressed < 0 or position > end:
                raise ValueError(
                    f"a page of the column {chunk.path} claims {compressed} bytes and leaves "
                    f"its column chunk, which ends at byte {end}"
                )
            factor = _MAX_EXPANSION.get(chunk.codec, _MAX_EXPANSION_OTHERWISE)
            if uncompressed > _SMALL_PAGE_BYTES + factor * compressed:
                raise ValueError(
                    f"a page of the column {chunk.path} claims to expand from {compressed} to "
                    f"{uncompressed} bytes"
                )


def _column_chunk(metadata: dict[int, Any] | None, data_size: int) -> ColumnChunk:
    if metadata is None:
        raise ValueError("a column chunk has no metadata, or is encrypted")
    path = b".".join(metadata.get(3, [])).decode("utf-8", "replace")
    start, size = metadata.get(9, -1), metadata.get(7, -1)
    if 0 < metadata.get(11, 0) < start:
        start = metadata[11]
    if start < 4 or size < 0 or start + size > data_size:
        raise ValueError(
            f"the column {path} claims bytes {start} to {start + size} where the data ends at "
            f"byte {data_size}"
        )
    return ColumnChunk(path, metadata.get(4, 0), start, size)


def _page_header(source: Any, position: int, end: int) -> tuple[dict[int, Any], int]:
    size = 128
    while True:
        data = source.read_at(min(size, end - position), position)
        try:
            return read_struct(data, _PAGE_SHAPE)
        except TruncatedError:
            if size >= min(end - position, _MAX_HEADER_BYTES):
                raise
            size *= 4
