"""What is done for many rows at once is what is done row by row."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from large_job import IDENTITY, trivial_result
from support.part_records import records

from orcd_batch.data import DatasetOptions, InputDataset, InputRow, PartStore, SampleResult
from orcd_batch.data.part_file import PART_SCHEMA, id_as_text, merged, part_batch, retries
from orcd_batch.data.part_index import PartIndex
from orcd_batch.data.results import COMPUTED_SCHEMA
from orcd_batch.provenance import run_totals
from orcd_batch.reproducibility import RunHash
from orcd_batch.reproducibility.run_records import add_batch, add_output

ids = st.integers(-(2**63), 2**64 - 1) | st.text(max_size=8)
kinds = st.sampled_from([None, None, "input", "infrastructure"])


def result_of(index: int, row_id: int | str, kind: Any, sample: int = 0) -> SampleResult:
    if kind is not None:
        return SampleResult.failed(index, sample, row_id, "it failed", kind)
    return trivial_result(InputRow(index, row_id, "some words"), sample, 1 + index % 3)


@given(st.lists(st.tuples(ids, kinds, st.integers(0, 2**31 - 1)), max_size=12))
def test_a_batch_adds_to_the_run_hash_what_its_rows_add(rows: list[tuple[Any, Any, int]]) -> None:
    results = [result_of(i, *row) for i, row in enumerate(rows)]
    one_by_one, at_once = RunHash(), RunHash()
    for r in results:
        one_by_one.add(r.id, r.sample_index, r.token_hash, r.numerics_hash, r.error_kind)
    add_batch(at_once, part_batch(results))
    assert at_once.hexdigest() == one_by_one.hexdigest()
    assert len(at_once) == len(rows)


@given(st.lists(st.integers(-(2**63), 2**63 - 1)) | st.lists(st.text(max_size=8)), st.data())
def test_an_output_adds_to_the_run_hash_what_its_rows_add(row_ids: Any, data: Any) -> None:
    results = [result_of(i, row_id, data.draw(kinds)) for i, row_id in enumerate(row_ids)]
    one_by_one, at_once = RunHash(), RunHash()
    for r in results:
        one_by_one.add(r.id, r.sample_index, r.token_hash, r.numerics_hash, r.error_kind)
    batch = part_batch(results)
    place = batch.schema.get_field_index("id")
    id_type = pa.string() if row_ids and isinstance(row_ids[0], str) else pa.int64()
    add_output(at_once, batch.set_column(place, "id", pa.array(row_ids, id_type)))
    assert at_once.hexdigest() == one_by_one.hexdigest()


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.tuples(kinds, kinds), min_size=1, max_size=30), part=st.integers(1, 9))
def test_the_totals_are_those_of_the_records(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, Any]], part: int
) -> None:
    output = str(tmp_path_factory.mktemp("totals") / "out.parquet")
    with PartStore.open(output, IDENTITY) as store:
        for attempt in (0, 1):  # rows that failed by infrastructure are in two parts
            for index, row in enumerate(rows):
                if not store.is_done(index):
                    store.add([result_of(index, f"r{index}", row[attempt])])
                if index % part == 0:
                    store.commit()
        totals, found, run_hash = run_totals(store), list(records(store)), RunHash()
        for r in found:
            run_hash.add(r.id, r.sample_index, r.token_hash, r.numerics_hash, r.error_kind)
    assert totals.num_rows == len(found) == len(rows)
    assert totals.num_errors == sum(record.error_kind is not None for record in found)
    assert totals.num_tokens == sum(record.completion_tokens or 0 for record in found)
    assert totals.run_hash == run_hash.hexdigest()


@given(st.lists(st.dictionaries(st.integers(0, 3000), st.booleans(), max_size=9), max_size=6))
def test_rows_marked_together_are_marked_as_one_by_one(batches: list[dict[int, bool]]) -> None:
    one_by_one, together = PartIndex(), PartIndex()
    for batch in batches:
        were_done = sum(one_by_one.is_done(row) for row in batch)
        for row, retry in batch.items():
            one_by_one.mark(row, retry)
        rows = np.array(sorted(batch), dtype=np.int64)
        retried = rows[[batch[row] for row in rows.tolist()]]
        assert together.mark_all(rows, retried) == were_done
        assert together.num_done == one_by_one.num_done
        assert together.num_retry == one_by_one.num_retry
    marked = {row for batch in batches for row in batch}
    assert all(together.is_done(row) == one_by_one.is_done(row) for row in marked)


def test_a_row_that_is_done_is_not_taken_again(tmp_path: Path) -> None:
    batch = part_batch([result_of(3, "r3", None)])
    with PartStore.open(str(tmp_path / "out.parquet"), IDENTITY) as store:
        store.add_batch(batch)
        with pytest.raises(AssertionError, match="done already"):
            store.add_batch(batch)


@given(st.lists(st.tuples(ids, kinds), max_size=8), st.randoms(use_true_random=False))
def test_a_part_holds_each_result_as_it_is(rows: list[tuple[Any, Any]], chance: Any) -> None:
    results = [result_of(i, *row, sample) for i, row in enumerate(rows) for sample in (0, 1)]
    shuffled = list(results)
    chance.shuffle(shuffled)
    batch = part_batch(shuffled)
    names = COMPUTED_SCHEMA.names
    assert batch.schema.equals(PART_SCHEMA)
    assert batch.to_pylist() == [
        {"row_index": r.row_index, "id": id_as_text(r.id)}
        | {name: getattr(r, name) for name in names}
        for r in results
    ]
    expected = [r.error_kind == "infrastructure" for r in results]
    assert retries(batch.column("error_kind")).tolist() == expected


def test_batches_in_and_out_of_order_merge_by_row() -> None:
    batches = [part_batch([result_of(i, i, None) for i in rows]) for rows in ([0, 1], [4], [2, 3])]
    both = ([batches[0], batches[1], batches[2]], [batches[0], batches[2], batches[1]])
    found = [merged(order) for order in both]
    assert found[0].column("row_index").to_pylist() == [0, 1, 2, 3, 4]
    assert found[0].equals(found[1])
    assert merged([batches[0].slice(1)]).to_pylist() == batches[0].to_pylist()[1:]


@settings(max_examples=25, deadline=None)
@given(
    cells=st.lists(st.tuples(st.none() | st.binary(max_size=4), ids.filter(lambda i: i != "")),
                   max_size=20, unique_by=lambda cell: str(cell[1])),
)  # fmt: skip
def test_a_plain_prompt_gives_the_row_that_any_prompt_gives(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[bytes | None, Any]]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "in.parquet"
    text = pa.array([prompt for prompt, _ in cells], pa.binary())
    prompts = pa.Array.from_buffers(pa.string(), len(text), text.buffers())  # not all of it UTF-8
    names = pa.array([str(row_id) for _, row_id in cells], pa.string())
    nulls = pa.nulls(len(cells), pa.float32())
    pq.write_table(pa.table({"prompt": prompts, "id": names, "temperature": nulls}), path)
    plain = InputDataset.open(str(path), DatasetOptions())
    overridden = InputDataset.open(str(path), DatasetOptions(sampling_columns=["temperature"]))
    assert list(plain.rows()) == list(overridden.rows())
    assert list(plain.rows(skip=lambda index: index % 2 == 0)) == list(plain.rows())[1::2]
