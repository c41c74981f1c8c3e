"""Opening a Parquet file that nobody has checked: every claim of its footer, before it is used."""

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orcd_batch.data.location import Location, reported_as
from orcd_batch.data.parquet_claims import ColumnChunk, check_pages, column_chunks
from orcd_batch.errors import InputError

# Batches aim at this many bytes, so that a job's memory does not depend on the size of its rows.
_BATCH_BYTES = 32 * 2**20
_MAX_BATCH_ROWS = 4096
_MAGIC = b"PAR1"


class ParquetInput:
    """One Parquet file, opened and checked; rows are read in batches, never the whole file.

    Raises InputError naming the file when it is not Parquet or its footer contradicts its size.
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        self._chunks: list[list[ColumnChunk]] | None = None
        with reported_as(InputError, f"{location} cannot be read as Parquet"):
            self._source = location.open()
            footer_size = self._check_frame(self._source)
            self._parquet = pq.ParquetFile(
                self._source,
                buffer_size=2**20,
                pre_buffer=False,
                thrift_string_size_limit=footer_size,
                thrift_container_size_limit=footer_size,
            )
            self.metadata = self._parquet.metadata
            self.schema = self._parquet.schema_arrow
            self._check_row_counts()

    @property
    def num_rows(self) -> int:
        return int(self.metadata.num_rows)

    @property
    def row_group_sizes(self) -> list[int]:
        """Rows of each row group, in order."""
        return self._row_group_sizes

    def batches(self, row_group: int, columns: Sequence[str]) -> Iterator[Any]:
        """The named columns of one row group as pyarrow RecordBatches of about 32 MB at most.

        Raises InputError naming file and row group when the data does not decode, or when there
        are not exactly as many rows as the footer says.
        """
        where = f"Row group {row_group} of {self.location}"
        num_rows = 0
        with reported_as(InputError, f"{where} cannot be read"):
            self._check_pages(row_group)
            size = self._batch_size(row_group)
            reader = self._parquet.iter_batches(size, [row_group], list(columns))
        while True:
            with reported_as(InputError, f"{where} cannot be read"):
                batch = next(reader, None)
                if batch is not None:
                    batch.validate()
            if batch is None:
                break
            num_rows += batch.num_rows
            yield batch
        expected = self._row_group_sizes[row_group]
        if columns and num_rows != expected:
            raise InputError(
                f"{where} has {num_rows} rows where the footer says {expected}: "
                "write the file again."
            )

    def close(self) -> None:
        self._parquet.close(force=True)

    def _check_frame(self, source: Any) -> int:
        """The size of the footer's metadata in bytes."""
        file_size = source.size()
        if file_size < 12:
            raise ValueError(f"it has {file_size} bytes, less than an empty Parquet file")
        footer_size, magic = struct.unpack("<I4s", source.read_at(8, file_size - 8))
        if magic == b"PARE":
            raise ValueError("it is encrypted: decrypt it first")
        if magic != _MAGIC:
            raise ValueError("it does not end with the Parquet magic bytes")
        if not 0 < footer_size <= file_size - 12:
            raise ValueError(f"its footer claims {footer_size} bytes of a file of {file_size}")
        return int(footer_size)

    def _check_pages(self, row_group: int) -> None:
        """Local files only: on an object store it would take a request per page."""
        if not self.location.local:
            return
        if self._chunks is None:
            file_size = self._source.size()
            (footer_size,) = struct.unpack("<I", self._source.read_at(4, file_size - 8))
            footer = self._source.read_at(footer_size, file_size - 8 - footer_size)
            self._chunks = column_chunks(footer, file_size)
        if len(self._chunks) != len(self._row_group_sizes):
            raise ValueError(f"its footer lists {len(self._chunks)} row groups")
        check_pages(self._source, self._chunks[row_group])

    def _check_row_counts(self) -> None:
        metadata = self.metadata
        self._row_group_sizes = [
            metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)
        ]
        if min(self._row_group_sizes, default=0) < 0:
            raise ValueError("a row group claims a negative number of rows")
        if sum(self._row_group_sizes) != metadata.num_rows:
            raise ValueError(
                f"its row groups hold {sum(self._row_group_sizes)} rows "
                f"where the footer says {metadata.num_rows}"
            )

    def _batch_size(self, row_group: int) -> int:
        total_bytes = self.metadata.row_group(row_group).total_byte_size
        row_bytes = max(1, total_bytes // max(1, self._row_group_sizes[row_group]))
        return int(max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // row_bytes)))


def is_text(data_type: Any) -> bool:
    """Whether a pyarrow type holds strings, dictionary-encoded or not."""
    if pa.types.is_dictionary(data_type):
        data_type = data_type.value_type
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(check(data_type) for check in checks)
