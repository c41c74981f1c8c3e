"""Writing output: parts, resuming, refusing, and the finished file."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from large_job import IDENTITY, run_trivial_job, trivial_result
from pyarrow import fs
from support.part_records import records

from orcd_batch.data import DatasetOptions, InputDataset, PartStore, SampleResult, read_manifest
from orcd_batch.data import part_store as part_store_module
from orcd_batch.data.location import Location
from orcd_batch.data.results import COMPUTED_NAMES, COMPUTED_SCHEMA
from orcd_batch.errors import InputError, OutputError


def dataset_of(path: Path, columns: dict[str, Any] | pa.Table, **options: Any) -> InputDataset:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=7)
    return InputDataset.open(str(path), DatasetOptions(**options))


def prompts(number: int) -> dict[str, Any]:
    return {"prompt": [f"p{i}" for i in range(number)]}


def read(path: Path) -> pa.Table:
    return pq.ParquetFile(path).read()


def refusal(output: Path, identity: dict[str, Any], overwrite: bool = False) -> str:
    with pytest.raises(OutputError) as caught:
        PartStore.open(str(output), identity, overwrite)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def add_rows(store: PartStore, dataset: InputDataset, wanted: Callable[[int], bool]) -> None:
    for row in dataset.rows(skip=store.is_done):
        if wanted(row.index):
            store.add([trivial_result(row, 0, 3)])


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out (1) [a] b=c.parquet"


def test_a_job_ends_with_input_columns_then_computed_ones(tmp_path: Path, output: Path) -> None:
    dataset = dataset_of(tmp_path / "in.parquet", prompts(30))
    with PartStore.open(str(output), IDENTITY) as store:
        assert store.state == "new"
        run_hash = run_trivial_job(dataset, store)
    table = read(output)
    assert table.column_names == ["prompt", *COMPUTED_NAMES]
    assert table.column("prompt").to_pylist() == prompts(30)["prompt"]
    assert table.column("id").to_pylist() == list(range(30))
    assert table.schema.field("id").type == pa.int64()
    for field in COMPUTED_SCHEMA:
        assert str(table.schema.field(field.name).type) == str(field.type).replace(
            "item", "element"
        )
    manifest = read_manifest(str(output))
    assert manifest["run_hash"] == run_hash
    assert manifest["identity"] == IDENTITY
    assert sorted(os.listdir(tmp_path)) == ["in.parquet", output.name]


def rich_table() -> pa.Table:
    """Columns whose types are easily lost on the way through."""
    return pa.table(
        {
            "prompt": ["a", None, "c"] * 5,
            "id": pa.array([f"k{i}" for i in range(15)], pa.large_string()),
            "label": pa.array(["x", "y", "x"] * 5).cast(pa.dictionary(pa.int8(), pa.string())),
            "view": pa.array(["x", None, "z"] * 5, pa.string_view()),
            "when": pa.array([1000, None, 3000] * 5, pa.timestamp("ns", "Europe/Berlin")),
            "price": pa.array([Decimal("1.50"), None, Decimal("2.25")] * 5, pa.decimal128(9, 2)),
            "nested": pa.array([[{"a": 1, "b": ["x"]}], [], None] * 5),
            "pairs": pa.array([[("k", 1)], [], None] * 5, pa.map_(pa.string(), pa.int16())),
            "half": pa.array([1.5, None, 2.5] * 5, pa.float16()),
            "fixed": pa.array([b"ab", None, b"cd"] * 5, pa.binary(2)),
            "unsigned": pa.array([2**64 - 1, None, 0] * 5, pa.uint64()),
            "nothing": pa.nulls(15),
        }
    ).replace_schema_metadata({"owner": "me", "orcd_batch": "an earlier manifest"})


def test_every_input_type_and_its_metadata_survive_any_number_of_samples(
    tmp_path: Path, output: Path
) -> None:
    table = rich_table()
    field = table.schema.field("label").with_metadata({"unit": "none"})
    table = table.cast(table.schema.set(table.column_names.index("label"), field))
    dataset = dataset_of(tmp_path / "in.parquet", table)
    with PartStore.open(str(output), IDENTITY) as store:
        for row in reversed(list(dataset.rows())):
            number = 1 + row.index % 3
            store.add([trivial_result(row, sample, 2) for sample in reversed(range(number))])
            if row.index % 4 == 0:
                store.commit()
        store.assemble(dataset, {})
    written, original = read(output), read(tmp_path / "in.parquet")
    owners = [i for i in range(15) for _ in range(1 + i % 3)]
    for name in original.column_names:
        assert written.schema.field(name).equals(original.schema.field(name), check_metadata=True)
        values = original.column(name).to_pylist()
        assert written.column(name).to_pylist() == [values[i] for i in owners]
    samples = [sample for i in range(15) for sample in range(1 + i % 3)]
    assert written.column("sample_index").to_pylist() == samples
    assert written.column_names.count("id") == 1
    assert written.schema.metadata[b"owner"] == b"me"
    assert json.loads(written.schema.metadata[b"orcd_batch"])["identity"] == IDENTITY


def test_input_that_is_not_utf8_reaches_the_output_unchanged(tmp_path: Path, output: Path) -> None:
    raw = pa.array([b"good", b"bad \xff"], pa.binary())
    dataset = dataset_of(tmp_path / "in.parquet", {"prompt": raw.view(pa.string())})
    with PartStore.open(str(output), IDENTITY) as store:
        run_trivial_job(dataset, store)
    table = read(output)
    assert table.column("prompt").combine_chunks().view(pa.binary()).equals(raw)
    assert table.column("error_kind").to_pylist() == [None, "input"]


def test_dropped_columns_prefix_and_a_foreign_id_column(tmp_path: Path, output: Path) -> None:
    columns = {"prompt": ["a", "b"], "key": pa.array([7, 8], pa.uint16()), "error": ["e", "f"]}
    dataset = dataset_of(
        tmp_path / "in.parquet",
        columns,
        id_column="key",
        drop_columns=["prompt", "key"],
        output_prefix="new_",
    )
    with PartStore.open(str(output), IDENTITY) as store:
        run_trivial_job(dataset, store)
    table = read(output)
    assert table.column_names == ["error", *(f"new_{name}" for name in COMPUTED_NAMES)]
    assert table.column("new_id").to_pylist() == [7, 8]
    assert table.schema.field("new_id").type == pa.uint16()
    assert read_manifest(str(output))["output_prefix"] == "new_"


def test_all_columns_may_be_dropped(tmp_path: Path, output: Path) -> None:
    dataset = dataset_of(tmp_path / "in.parquet", prompts(10), drop_columns=["prompt"])
    with PartStore.open(str(output), IDENTITY) as store:
        run_trivial_job(dataset, store)
    assert read(output).column_names == list(COMPUTED_NAMES)
    assert read(output).column("id").to_pylist() == list(range(10))


def test_an_empty_input_gives_an_empty_output_of_the_same_schema(
    tmp_path: Path, output: Path
) -> None:
    empty = dataset_of(tmp_path / "in.parquet", pa.table(prompts(3)).slice(0, 0))
    with PartStore.open(str(output), IDENTITY) as store:
        run_trivial_job(empty, store)
    full = dataset_of(tmp_path / "full.parquet", prompts(3))
    with PartStore.open(str(tmp_path / "b.parquet"), IDENTITY) as store:
        run_trivial_job(full, store)
    assert read(output).num_rows == 0
    assert read(output).schema.equals(read(tmp_path / "b.parquet").schema)
    with PartStore.open(str(output), IDENTITY) as store:
        assert store.state == "complete"


def test_an_error_row_is_null_in_everything_computed(tmp_path: Path, output: Path) -> None:
    dataset = dataset_of(tmp_path / "in.parquet", {"prompt": pa.array([None, "b"])})
    with PartStore.open(str(output), IDENTITY) as store:
        run_trivial_job(dataset, store)
    row = read(output).to_pylist()[0]
    assert row.pop("finish_reason") == "error"
    assert row.pop("error_kind") == "input"
    assert row.pop("error") == "The column prompt is null."
    assert row.pop("id") == 0
    assert row.pop("sample_index") == 0
    assert set(row.values()) == {None}


def test_committed_rows_are_found_again_and_uncommitted_ones_are_not(
    tmp_path: Path, output: Path
) -> None:
    dataset = dataset_of(tmp_path / "in.parquet", prompts(20))
    with PartStore.open(str(output), IDENTITY) as store:
        add_rows(store, dataset, lambda i: i % 2 == 0)
        store.commit()
        add_rows(store, dataset, lambda i: i < 3)
    with PartStore.open(str(output), IDENTITY) as store:
        assert store.state == "partial"
        assert store.num_done_rows == 10
        assert [i for i in range(20) if store.is_done(i)] == list(range(0, 20, 2))
        resumed = run_trivial_job(dataset, store)
    with PartStore.open(str(tmp_path / "b.parquet"), IDENTITY) as store:
        undisturbed = run_trivial_job(dataset, store, num_tokens=4)
    assert read(output).column("id").to_pylist() == list(range(20))
    assert read(output).num_rows == read(tmp_path / "b.parquet").num_rows
    assert resumed != undisturbed  # three tokens a row before the break, four after it


def test_the_same_job_is_complete_at_once_and_a_different_one_is_refused(
    tmp_path: Path, output: Path
) -> None:
    dataset = dataset_of(tmp_path / "in.parquet", prompts(5))
    identity = {"model_hash": "a" * 64, "sampling": {"seed": 1, "stop": ["x"]}}
    with PartStore.open(str(output), identity) as store:
        add_rows(store, dataset, lambda i: i < 3)
        store.commit()
    other = {"model_hash": "b" * 64, "sampling": {"seed": 2, "stop": ["x"]}}
    message = refusal(output, other)
    assert "model_hash is bbbbbbbbbbbb here and aaaaaaaaaaaa there" in message
    assert "sampling.seed is 2 here and 1 there" in message
    assert "stop" not in message
    assert "overwrite=true" in message
    with PartStore.open(str(output), identity) as store:
        run_trivial_job(dataset, store)
    before = output.read_bytes()
    with PartStore.open(str(output), identity) as store:
        assert store.state == "complete"
        assert store.manifest is not None
        assert store.manifest["identity"] == identity
    assert "sampling.seed is 2 here and 1 there" in refusal(output, other)
    assert output.read_bytes() == before


def test_overwrite_starts_afresh_and_keeps_the_old_output_until_the_new_one_is_complete(
    tmp_path: Path, output: Path
) -> None:
    dataset = dataset_of(tmp_path / "in.parquet", prompts(5))
    with PartStore.open(str(output), {"job": 1}) as store:
        run_trivial_job(dataset, store)
    old = output.read_bytes()
    with PartStore.open(str(output), {"job": 2}, overwrite=True) as store:
        assert store.state == "new"
        add_rows(store, dataset, lambda i: i < 3)
        store.commit()
    assert output.read_bytes() == old
    with PartStore.open(str(output), {"job": 2}, overwrite=True) as store:
        assert store.state == "partial"  # the same command goes on after a crash
        assert store.num_done_rows == 3
        run_trivial_job(dataset, store)
    assert read_manifest(str(output))["identity"] == {"job": 2}
    with PartStore.open(str(output), {"job": 2}, overwrite=True) as store:
        assert store.state == "new"


def test_overwrite_drops_the_parts_of_a_different_job(tmp_path: Path, output: Path) -> None:
    dataset = dataset_of(tmp_path / "in.parquet", prompts(5))
    with PartStore.open(str(output), {"job": 1}) as store:
        add_rows(store, dataset, lambda i: True)
        store.commit()
    keep = tmp_path / (output.name + ".parts") / "notes.txt"
    keep.write_text("mine")
    with PartStore.open(str(output), {"job": 2}, overwrite=True) as store:
        assert store.state == "new"
        assert store.num_done_rows == 0
    assert os.listdir(keep.parent) == ["notes.txt"] or set(os.listdir(keep.parent)) == {
        "notes.txt",
        "lock",
    }


def test_a_file_that_is_not_ours_is_refused_by_name(tmp_path: Path, output: Path) -> None:
    pq.write_table(pa.table(prompts(2)), output)
    assert "was not written by orcd_batch" in refusal(output, IDENTITY)
    output.write_text("not Parquet at all")
    message = refusal(output, IDENTITY)
    assert "overwrite=true" in message
    assert output.name in message
    assert "is a directory" in refusal(tmp_path, IDENTITY)
    dataset = dataset_of(tmp_path / "in.parquet", prompts(2))
    with PartStore.open(str(output), IDENTITY, overwrite=True) as store:
        run_trivial_job(dataset, store)
    assert read(output).num_rows == 2


def test_infrastructure_errors_are_run_again_before_and_after_the_end(
    tmp_path: Path, output: Path
) -> None:
    dataset = dataset_of(
        tmp_path / "in.parquet", prompts(40) | {"id": [f"r{i}" for i in range(40)]}
    )

    def failing(row: Any, sample: int) -> SampleResult:
        if row.index % 5 == 0 and sample == 1:
            return SampleResult.failed(row.index, sample, row.id, "lost", "infrastructure")
        return trivial_result(row, sample, 2)

    with PartStore.open(str(output), IDENTITY) as store:
        for row in dataset.rows():
            store.add([failing(row, sample) for sample in range(3)])
        assert not store.is_done(5)
        retried = list(dataset.rows())[5]
        store.add([failing(retried, sample) for sample in range(3)])
        store.assemble(dataset, {})
    assert read(output).column("error_kind").to_pylist().count("infrastructure") == 8
    with PartStore.open(str(output), IDENTITY) as store:
        assert store.state == "partial"
        assert store.num_done_rows == 32
        for row in dataset.rows(skip=store.is_done):
            store.add([trivial_result(row, sample, 2) for sample in range(3)])
        assert len(list(records(store))) == 120
        assert all(record.error_kind is None for record in records(store))
        store.assemble(dataset, {})
    table = read(output)
    assert table.column("error_kind").null_count == 120
    assert table.column("id").to_pylist() == [f"r{i}" for i in range(40) for _ in range(3)]
    assert table.column("sample_index").to_pylist() == [0, 1, 2] * 40
    with PartStore.open(str(output), IDENTITY) as store:
        assert store.state == "complete"


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(
    tmp_path: Path, output: Path
) -> None:
    program = textwrap.dedent(
        """
        import sys, time
        from orcd_batch.data import PartStore
        store = PartStore.open(sys.argv[1], {"job": "large"})
        print("holding", flush=True)
        time.sleep(60)
        """
    )
    command = [sys.executable, "-c", program, str(output)]
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"holding\n"
        assert f"Another process (id {holder.pid})" in refusal(output, IDENTITY)
        holder.send_signal(signal.SIGKILL)
    with PartStore.open(str(output), IDENTITY) as store:
        assert store.state == "new"


def test_leftovers_of_a_crash_at_any_moment_are_cleaned(tmp_path: Path, output: Path) -> None:
    dataset = dataset_of(tmp_path / "in.parquet", prompts(6))
    parts = Path(f"{output}.parts")
    with PartStore.open(str(output), IDENTITY) as store:
        add_rows(store, dataset, lambda i: i < 3)
        store.commit()
    (parts / "part-000001.arrow.tmp").write_bytes(b"torn")
    (parts / "output.parquet.tmp").write_bytes(b"torn")
    (parts / "job.json.tmp").write_bytes(b"torn")
    with PartStore.open(str(output), IDENTITY) as store:
        assert store.num_done_rows == 3
        assert not [name for name in os.listdir(parts) if name.endswith(".tmp")]
        saved = {path.name: path.read_bytes() for path in parts.iterdir()}
        run_trivial_job(dataset, store)
    for overwrite, state in ((False, "complete"), (True, "new")):
        parts.mkdir()
        for name, content in saved.items():  # the crash between renaming and removing the parts
            (parts / name).write_bytes(content)
        with PartStore.open(str(output), IDENTITY, overwrite) as store:
            assert store.state == state
        assert not parts.exists()


def test_a_damaged_part_is_named(tmp_path: Path, output: Path) -> None:
    dataset = dataset_of(tmp_path / "in.parquet", prompts(6))
    with PartStore.open(str(output), IDENTITY) as store:
        add_rows(store, dataset, lambda i: True)
        store.commit()
    part = Path(f"{output}.parts") / "part-000000.arrow"
    part.write_bytes(part.read_bytes()[:100])
    message = refusal(output, IDENTITY)
    assert "part-000000.arrow is damaged; delete it" in message
    part.unlink()
    with PartStore.open(str(output), IDENTITY) as store:
        assert store.num_done_rows == 0


def test_a_row_without_a_result_stops_the_assembly(tmp_path: Path, output: Path) -> None:
    dataset = dataset_of(tmp_path / "in.parquet", prompts(6))
    with PartStore.open(str(output), IDENTITY) as store:
        add_rows(store, dataset, lambda i: i != 4)
        with pytest.raises(OutputError, match="Row 4 has no result"):
            store.assemble(dataset, {})
    assert not output.exists()
    with PartStore.open(str(output), IDENTITY) as store:
        assert store.num_done_rows == 5


def test_what_cannot_be_written_is_a_sentence_and_the_rows_stay(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be prepared" in refusal(tmp_path / "file" / "out.parquet", IDENTITY)
    dataset = dataset_of(tmp_path / "in.parquet", prompts(6))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with PartStore.open(str(output), IDENTITY) as store:
        add_rows(store, dataset, lambda i: True)
        with monkeypatch.context() as patch:
            patch.setattr(part_store_module, "put", full)
            with pytest.raises(OutputError, match="No space left"):
                store.commit()
        store.commit()
        with monkeypatch.context() as patch:
            patch.setattr(part_store_module, "write_output", full)
            with pytest.raises(OutputError, match="No space left"):
                store.assemble(dataset, {})
        store.assemble(dataset, {})
    assert read(output).num_rows == 6


def test_commits_are_due_by_rows_by_tokens_and_by_time(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = dataset_of(tmp_path / "in.parquet", prompts(3))
    rows = list(dataset.rows())
    clock = [0.0]
    monkeypatch.setattr(part_store_module.time, "monotonic", lambda: clock[0])
    with PartStore.open(str(output), IDENTITY) as store:
        assert not store.commit_due
        store.add([trivial_result(rows[0], 0, 1)])
        clock[0] = 9.9
        assert not store.commit_due
        clock[0] = 10.0
        assert store.commit_due
        store.commit()
        many = replace(trivial_result(rows[1], 0, 1), completion_tokens=1_000_000)
        store.add([many])
        assert store.commit_due
        store.commit()
        monkeypatch.setattr(part_store_module, "COMMIT_ROWS", 1)
        store.add([trivial_result(rows[2], 0, 1)])
        assert store.commit_due
        store.commit()
    assert len(list(Path(f"{output}.parts").glob("part-*.arrow"))) == 3


def test_an_object_store_holds_parts_and_output(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "in.parquet", prompts(9))
    (tmp_path / "bucket").mkdir()
    bucket = fs.SubTreeFileSystem(str(tmp_path / "bucket"), fs.LocalFileSystem())
    output = Location(bucket, "out.parquet", local=False)
    for _ in range(2):
        store = PartStore.open_at(output, IDENTITY)
        (tmp_path / "bucket" / "out.parquet.parts").mkdir(exist_ok=True)
        add_rows(store, dataset, lambda i: i < 5)
        store.commit()
        assert store.num_done_rows == 5
    store = PartStore.open_at(output, IDENTITY)
    assert store.state == "partial"
    run_trivial_job(dataset, store)
    assert read(tmp_path / "bucket" / "out.parquet").num_rows == 9
    assert PartStore.open_at(output, IDENTITY).state == "complete"


def test_read_manifest_refuses_what_it_did_not_write(tmp_path: Path) -> None:
    pq.write_table(pa.table(prompts(1)), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="carries no manifest"):
        read_manifest(str(tmp_path / "a.parquet"))
    with pytest.raises(InputError, match="does not exist"):
        read_manifest(str(tmp_path / "b.parquet"))


@settings(max_examples=15, deadline=None)
@given(
    samples=st.lists(st.integers(1, 3), max_size=25),
    order=st.randoms(use_true_random=False),
    breaks=st.sets(st.integers(0, 25), max_size=4),
)
def test_any_order_and_any_breaks_give_the_same_file(
    tmp_path_factory: pytest.TempPathFactory, samples: list[int], order: Any, breaks: set[int]
) -> None:
    directory = tmp_path_factory.mktemp("any")
    columns = {"prompt": pa.array([f"p{i}" for i in range(len(samples))], pa.string())}
    dataset = dataset_of(directory / "in.parquet", columns)
    rows = list(dataset.rows())
    order.shuffle(rows)
    output = directory / "out.parquet"
    store = PartStore.open(str(output), IDENTITY)
    for done, row in enumerate(rows):
        if done in breaks:
            store.commit()
            store.close()
            store = PartStore.open(str(output), IDENTITY)
            assert store.num_done_rows == done
        store.add([trivial_result(row, sample, 2) for sample in range(samples[row.index])])
    store.assemble(dataset, {})
    expected = [
        trivial_result(row, sample, 2)
        for row in dataset.rows()
        for sample in range(samples[row.index])
    ]
    table = read(output)
    for name in COMPUTED_NAMES:
        found = table.column(name).to_pylist()
        assert found == [getattr(result, name) for result in expected]
