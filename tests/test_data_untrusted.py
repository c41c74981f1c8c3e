"""Parquet files that claim what is not so: refused with a sentence, and nothing allocated."""

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import fuzz_parquet
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from large_job import MAX_GROWTH_BYTES, ResidentMemory, run_trivial_job, write_input

from orcd_batch.data import DatasetOptions, InputDataset, PartStore
from orcd_batch.data.parquet_claims import check_pages, column_chunks
from orcd_batch.data.thrift_compact import TruncatedError, read_struct
from orcd_batch.errors import InputError


def varint(number: int) -> bytes:
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def zigzag(number: int) -> int:
    return number << 1 if number >= 0 else (-number << 1) - 1


def written(path: Path, columns: dict[str, Any], **options: Any) -> bytes:
    pq.write_table(pa.table(columns), path, **options)
    return path.read_bytes()


def footer_of(data: bytes) -> bytes:
    (size,) = struct.unpack("<I", data[-8:-4])
    return data[-8 - size : -8]


def read_all(path: Path) -> None:
    dataset = InputDataset.open(str(path), DatasetOptions())
    list(dataset.rows())


def test_a_thousand_mutated_files_are_refused_or_read() -> None:
    findings = fuzz_parquet.fuzz(0, 1_000)
    assert findings.bad == []
    assert findings.outcomes["read"] > 50
    assert findings.outcomes["refused"] > 500


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ((2**31 - 1, None), "claims to expand"),
        ((None, 2**31 - 1), "leaves its column chunk"),
        ((-5, None), "leaves its column chunk"),
        ((None, -5), "leaves its column chunk"),
    ],
)
def test_a_page_that_claims_what_it_cannot_hold_is_refused(
    tmp_path: Path, claims: tuple[int | None, int | None], message: str
) -> None:
    path = tmp_path / "a.parquet"
    data = written(path, {"prompt": ["word " * 50] * 20}, compression="gzip", use_dictionary=False)
    (chunk,) = column_chunks(footer_of(data), len(data))[0]
    check_pages(pa.BufferReader(data), [chunk])
    header, _ = read_struct(data[4:], {2: None, 3: None})
    wrong = [header[2] if claims[0] is None else claims[0]]
    wrong.append(header[3] if claims[1] is None else claims[1])
    old = b"".join(b"\x15" + varint(zigzag(header[field])) for field in (2, 3))
    new = b"".join(b"\x15" + varint(zigzag(number)) for number in wrong)
    assert data.count(old) == 1
    grown = replace(chunk, size=chunk.size + len(new) - len(old))
    with pytest.raises(ValueError, match=message):
        check_pages(pa.BufferReader(data.replace(old, new)), [grown])
    path.write_bytes(data.replace(old, new))
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(InputError, match="cannot be read"):
        read_all(path)
    assert pa.default_memory_pool().max_memory() - before < 2**20


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "lz4", "zstd"])
@pytest.mark.parametrize("page_version", ["1.0", "2.0"])
def test_highly_compressible_valid_files_are_read(
    tmp_path: Path, compression: str, page_version: str
) -> None:
    path = tmp_path / "a.parquet"
    prompts = ["a" * 100_000] * 300
    options = {"compression": compression, "data_page_version": page_version}
    written(path, {"prompt": prompts}, use_dictionary=False, data_page_size=2**25, **options)
    read_all(path)


def test_the_footer_is_read_as_pyarrow_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {"prompt": [f"p{i}" for i in range(50)], "nested": [{"a": [i]} for i in range(50)]}
    data = written(path, columns, row_group_size=20, write_page_index=True)
    ours = column_chunks(footer_of(data), len(data))
    metadata = pq.read_metadata(path)
    assert len(ours) == metadata.num_row_groups == 3
    for group, chunks in enumerate(ours):
        for i, chunk in enumerate(chunks):
            theirs = metadata.row_group(group).column(i)
            assert chunk.path == theirs.path_in_schema
            assert chunk.size == theirs.total_compressed_size
            assert chunk.start == min(
                theirs.data_page_offset, theirs.dictionary_page_offset or theirs.data_page_offset
            )
    with pytest.raises(ValueError, match="where the data ends"):
        column_chunks(footer_of(data), len(data) - 1_000)


@given(st.binary(max_size=60))
def test_any_bytes_as_thrift_are_a_value_error_or_a_struct(data: bytes) -> None:
    try:
        found, size = read_struct(data, {1: None, 2: [None], 3: {1: None}, 4: [{1: None}]})
    except ValueError:
        return
    assert set(found) <= {1, 2, 3, 4}
    assert 0 < size <= len(data)


def test_thrift_that_nests_for_ever_or_ends_early_is_refused() -> None:
    with pytest.raises(ValueError, match="nests deeper"):
        read_struct(b"\x1c" * 10_000, {})
    with pytest.raises(ValueError, match="nests deeper"):
        read_struct(b"\x19" * 10_000, {})
    with pytest.raises(TruncatedError):
        read_struct(b"\x15", {1: None})
    with pytest.raises(TruncatedError):
        read_struct(b"\x19\xfc\xff\xff\xff\xff\x07", {})


def test_forty_thousand_rows_go_through_in_little_memory(tmp_path: Path) -> None:
    write_input(tmp_path / "in.parquet", 40_000)
    with ResidentMemory() as memory:
        dataset = InputDataset.open(str(tmp_path / "in.parquet"), DatasetOptions())
        with PartStore.open(str(tmp_path / "out.parquet"), {"job": "large"}) as store:
            run_trivial_job(dataset, store, num_tokens=2)
    assert pq.read_metadata(tmp_path / "out.parquet").num_rows == 40_000
    assert memory.growth < MAX_GROWTH_BYTES
