"""Reading input: which files, which columns, and what one bad row does."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orcd_batch.data import DatasetOptions, InputDataset
from orcd_batch.data.input_files import find_files
from orcd_batch.errors import InputError, OutputError


def write(path: Path, columns: dict[str, Any], **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def opened(path: str | list[str], **options: Any) -> InputDataset:
    return InputDataset.open(path, DatasetOptions(**options))


def refusal(path: str | list[str], **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        opened(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    return message


def test_rows_come_in_order_with_their_index_as_id(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"prompt": [f"p{i}" for i in range(25)]}, row_group_size=4)
    rows = list(opened(path).rows())
    assert [(row.index, row.id, row.prompt, row.error) for row in rows] == [
        (i, i, f"p{i}", None) for i in range(25)
    ]


def test_skipped_rows_are_left_out_and_limit_cuts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"prompt": list("abcdefghij")}, row_group_size=3)
    dataset = opened(path, limit=8)
    assert dataset.num_rows == 8
    assert [row.index for row in dataset.rows(skip=lambda i: i < 4 or i == 6)] == [4, 5, 7]
    assert list(opened(path, limit=0).rows()) == []


def test_a_row_group_without_wanted_rows_is_not_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.parquet",
        {"prompt": list("abcdef")},
        row_group_size=3,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )
    data = bytearray(Path(path).read_bytes())
    data[4:20] = b"\xff" * 16
    Path(path).write_bytes(data)
    dataset = opened(path)
    assert [row.prompt for row in dataset.rows(skip=lambda i: i < 3)] == ["d", "e", "f"]
    with pytest.raises(InputError, match=r"Row group 0 of .*a\.parquet cannot be read"):
        list(dataset.rows())


@pytest.mark.parametrize(
    "data_type",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
    ],
    ids=str,
)
def test_every_string_type_serves_as_prompt_and_as_id(tmp_path: Path, data_type: Any) -> None:
    column = pa.array(["é", "ü", "z"]).cast(data_type)
    path = write(tmp_path / "a.parquet", {"prompt": column, "id": column})
    assert [(row.prompt, row.id) for row in opened(path).rows()] == [(x, x) for x in "éüz"]


def test_messages_and_token_ids_are_read_with_their_bad_rows_named(tmp_path: Path) -> None:
    message = {"role": "user", "content": "hi"}
    messages = [[message], None, [], [message, None], [{"role": "user", "content": None}]]
    path = write(tmp_path / "m.parquet", {"messages": messages})
    rows = list(opened(path).rows())
    assert [row.messages for row in rows] == [
        [message],
        None,
        None,
        None,
        [{"role": "user", "content": None}],
    ]
    assert rows[1].error == "The column messages is null."
    assert rows[2].error == "The column messages holds no messages."
    assert rows[3].error == "The column messages is null at message 1."
    path = write(tmp_path / "t.parquet", {"token_ids": [[1, 2], [], [3, None], None]})
    rows = list(opened(path).rows())
    assert [row.token_ids for row in rows] == [(1, 2), None, None, None]
    assert rows[2].error == "The column token_ids is null at position 1."


def test_text_that_is_not_utf8_spoils_only_its_own_row(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"bad \xff", None, "schön".encode()], pa.binary())
    path = write(tmp_path / "a.parquet", {"prompt": raw.view(pa.string())})
    rows = list(opened(path).rows())
    assert [row.prompt for row in rows] == ["good", None, None, "schön"]
    assert rows[1].error is not None
    assert "not UTF-8" in rows[1].error


def test_all_input_kinds_need_exactly_one_column_in_use(tmp_path: Path) -> None:
    both = write(tmp_path / "a.parquet", {"prompt": ["a"], "token_ids": [[1]], "text": ["b"]})
    assert "dataset.token_ids_column=null" in refusal(both)
    assert opened(both, token_ids_column=None).kind == "prompt"
    assert opened(both, prompt_column=None).kind == "token_ids"
    assert next(opened(both, prompt_column="text").rows()).prompt == "b"
    none = write(tmp_path / "b.parquet", {"text": ["a"], "score": [1.0]})
    message = refusal(none)
    assert "text, score" in message
    assert "dataset.prompt_column" in message


def test_a_missing_column_is_named_with_the_columns_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"prompt": ["a"], "key": ["k"]})
    for option, value in (
        ("id_column", "keys"),
        ("prompt_column", "promt"),
        ("drop_columns", ["keys"]),
        ("sampling_columns", ["seed"]),
    ):
        message = refusal(path, **{option: value})
        assert f"dataset.{option}" in message
        assert "it has prompt, key" in message
    assert "did you mean key?" in refusal(path, id_column="keys")
    assert "did you mean temperature?" in refusal(path, sampling_columns=["temprature"])


def test_columns_of_the_wrong_type_are_refused_before_any_row(tmp_path: Path) -> None:
    columns = {"prompt": [1], "messages": ["x"], "token_ids": [[1.5]], "id": [1.5], "seed": ["1"]}
    path = write(tmp_path / "a.parquet", columns)
    off = {"prompt_column": None, "messages_column": None, "token_ids_column": None}
    for kind in ("prompt", "messages", "token_ids"):
        assert f"dataset.{kind}_column needs" in refusal(path, **(off | {f"{kind}_column": kind}))
    text = write(tmp_path / "b.parquet", {"prompt": ["a"], "id": [1.5], "seed": ["1"]})
    assert "dataset.id_column=''" in refusal(text)
    assert opened(text, id_column="", drop_columns=["id"]).id_type == pa.int64()
    message = refusal(text, id_column="", drop_columns=["id"], sampling_columns=["seed"])
    assert "a number is needed" in message


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([3, 1, 2, 1]),
        pa.array([2**64 - 1, 5, 2**64 - 1, 0], pa.uint64()),
        pa.array(["a", "b", "c", "b"]),
        pa.array(["a", "b", "a", "c"]).dictionary_encode(),
    ],
    ids=lambda ids: str(ids.type),
)
def test_a_repeated_id_is_named_with_both_rows(tmp_path: Path, ids: Any) -> None:
    path = write(tmp_path / "a.parquet", {"prompt": list("abcd"), "id": ids}, row_group_size=2)
    values = ids.to_pylist()
    repeated = next(value for value in values if values.count(value) == 2)
    rows = [i for i, value in enumerate(values) if value == repeated]
    message = refusal(path)
    assert repr(repeated) in message
    assert f"rows {rows[0]} and {rows[1]}" in message


def test_a_null_or_undecodable_id_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"prompt": list("abc"), "id": [1, 2, None]})
    assert "null in row 2" in refusal(path)
    raw = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    path = write(tmp_path / "b.parquet", {"prompt": list("abc"), "id": raw})
    assert "not UTF-8" in refusal(path)


def test_equal_numbers_and_negative_ids_do_not_count_as_repeated(tmp_path: Path) -> None:
    ids = pa.array([-1, -2, 2**63 - 1, -(2**63), 0])
    path = write(tmp_path / "a.parquet", {"prompt": list("abcde"), "id": ids})
    assert [row.id for row in opened(path).rows()] == ids.to_pylist()


def test_sampling_columns_override_and_bad_values_spoil_only_their_row(tmp_path: Path) -> None:
    columns = {
        "prompt": list("abcdef"),
        "temperature": [0.5, None, 1.0, float("nan"), 1.0, 2.0],
        "seed": pa.array([2**64 - 1, 1, None, 1, 1, 1], pa.uint64()),
        "n": [2.0, None, 1.0, 1.0, 1.5, 3.0],
        "stop": [["x"], None, [], ["y"], ["y"], [""]],
    }
    path = write(tmp_path / "a.parquet", columns)
    names = ["temperature", "seed", "n", "stop"]
    rows = list(opened(path, sampling_columns=names).rows())
    assert rows[0].overrides == {"temperature": 0.5, "seed": 2**64 - 1, "n": 2, "stop": ("x",)}
    assert type(rows[0].overrides["n"]) is int
    assert rows[1].overrides == {"seed": 1}
    assert rows[2].overrides == {"temperature": 1.0, "n": 1, "stop": ()}
    assert [row.error is None for row in rows] == [True, True, True, False, False, False]
    assert "nan" in str(rows[3].error)
    assert "whole number" in str(rows[4].error)
    assert rows[5].overrides["n"] == 3


def test_colliding_names_are_refused_naming_both_ways_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"prompt": ["a"], "error": ["e"], "key": [1], "id": [2]})
    message = refusal(path)
    assert "columns error have" in message
    assert "dataset.drop_columns=[error]" in message
    assert "dataset.output_prefix" in message
    assert opened(path, output_prefix="new_").columns.output_id == "new_id"
    assert opened(path, drop_columns=["error"]).columns.output_id == "id"
    assert "columns id have" in refusal(path, drop_columns=["error"], id_column="key")


def test_directories_and_globs_read_only_parquet_in_sorted_order(tmp_path: Path) -> None:
    root = tmp_path / "in [1] a=b (x)"
    for name in ("b.parquet", "a.PARQUET", "sub/c.pq", "_x.parquet", ".y.parquet", "_t/z.parquet"):
        write(root / name, {"prompt": [name]})
    write(root / "o.parquet.parts" / "left.parquet", {"prompt": ["left"]})
    (root / "notes.txt").write_text("no")
    (root / "_metadata").write_text("no")
    prompts = [row.prompt for row in opened(str(root)).rows()]
    assert prompts == ["a.PARQUET", "b.parquet", "sub/c.pq"]
    pattern = str(tmp_path / "in*" / "*.parquet")
    assert [row.prompt for row in opened(pattern).rows()] == ["b.parquet"]
    assert [row.prompt for row in opened(str(root / "b.parquet")).rows()] == ["b.parquet"]
    uri = (tmp_path / "plain.parquet").as_uri()
    write(tmp_path / "plain.parquet", {"prompt": ["by uri"]})
    assert [row.prompt for row in opened(uri).rows()] == ["by uri"]


def test_what_matches_nothing_or_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"prompt": ["a"]})
    assert "does not exist" in refusal(str(tmp_path / "b.parquet"))
    assert "matches no Parquet file" in refusal(str(tmp_path / "*.pq"))
    (tmp_path / "empty").mkdir()
    assert "holds no Parquet files" in refusal(str(tmp_path / "empty"))
    assert "twice" in refusal([path, str(tmp_path / "*.parquet")])
    assert "nosuch://x" in refusal("nosuch://x")
    with pytest.raises(InputError):
        find_files([])


def test_files_of_different_schemas_are_refused_naming_the_file(tmp_path: Path) -> None:
    a = write(tmp_path / "a.parquet", {"prompt": ["a"], "x": [1]})
    b = write(tmp_path / "b.parquet", {"prompt": ["a"], "x": ["1"]})
    c = write(tmp_path / "c.parquet", {"prompt": ["a"]})
    assert "b.parquet" in refusal([a, b])
    assert "c.parquet has the columns prompt" in refusal([a, c])


def test_the_content_hash_depends_on_content_and_not_on_place(tmp_path: Path) -> None:
    a = write(tmp_path / "a.parquet", {"prompt": ["a"]})
    b = write(tmp_path / "b.parquet", {"prompt": ["b"]})
    moved = tmp_path / "elsewhere" / "z.parquet"
    moved.parent.mkdir()
    moved.write_bytes(Path(a).read_bytes())
    assert opened(str(moved)).content_hash() == opened(a).content_hash()
    assert opened(b).content_hash() != opened(a).content_hash()
    assert opened([a, b]).content_hash() != opened([b, a]).content_hash()


def test_an_input_that_changes_under_the_job_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"prompt": ["a"]})
    dataset = opened(path)
    write(tmp_path / "a.parquet", {"prompt": ["b"]})
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match="has changed"):
        list(dataset.rows())


def test_files_that_are_not_parquet_are_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for content in (b"", b"PAR1PAR1", b"x" * 100, b"PAR1" + b"\xff" * 20 + b"PAR1"):
        path.write_bytes(content)
        assert "a.parquet cannot be read as Parquet" in refusal(str(path))


def test_an_output_among_the_inputs_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "in" / "a.parquet", {"prompt": ["a"]})
    folder = str(tmp_path / "in")
    for data, output in (
        (path, path),
        (folder, f"{folder}/out.parquet"),
        (folder, f"{folder}/sub/out.parquet"),
        (f"{folder}/*.parquet", f"{folder}/out.parquet"),
    ):
        with pytest.raises(OutputError, match="would lie among the input files"):
            opened(data).check_output(output)
    for data, output in (
        (path, f"{folder}/out.parquet"),
        (folder, str(tmp_path / "out.parquet")),
        (folder, f"{folder}/_out.parquet"),
        (f"{folder}/a*.parquet", f"{folder}/out.parquet"),
    ):
        opened(data).check_output(output)


def test_an_input_without_rows_opens(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"prompt": pa.array([], pa.string()), "id": [1][:0]})
    dataset = opened(path)
    assert dataset.num_rows == 0
    assert list(dataset.rows()) == []


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.none() | st.text(max_size=20), max_size=30),
    row_group_size=st.integers(1, 8),
    skipped=st.sets(st.integers(0, 29)),
)
def test_any_prompts_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory,
    prompts: list[str | None],
    row_group_size: int,
    skipped: set[int],
) -> None:
    path = tmp_path_factory.mktemp("any") / "a.parquet"
    write(path, {"prompt": pa.array(prompts, pa.string())}, row_group_size=row_group_size)
    rows = list(opened(str(path)).rows(skip=skipped.__contains__))
    expected = [(i, prompt) for i, prompt in enumerate(prompts) if i not in skipped]
    assert [(row.index, row.prompt) for row in rows] == expected
    assert all((row.error is None) == (row.prompt is not None) for row in rows)
