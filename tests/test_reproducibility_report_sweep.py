"""A sweep as one thing: its jobs, the combined file, and how its variants agree."""

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.made_runs import failed, made_run, made_sweep, with_ids

from orcd_batch import cli
from orcd_batch.data.results import COMPUTED_SCHEMA
from orcd_batch.errors import InputError
from orcd_batch.reproducibility import combine as combining
from orcd_batch.reproducibility import variants
from orcd_batch.reproducibility.combine import SWEEP_KEY, combine
from orcd_batch.reproducibility.report import as_dict, report
from orcd_batch.reproducibility.run_output import RunOutput
from orcd_batch.reproducibility.sweep_directory import find_sweep
from orcd_batch.reproducibility.variants import compare_variants, edit_distances


def test_a_sweep_becomes_one_file_with_its_parameters_as_typed_columns(tmp_path: Path) -> None:
    root = made_sweep(tmp_path / "sweep")
    combined = combine(root)
    table = pq.read_table(combined.path)
    assert (combined.num_rows, combined.num_jobs) == (table.num_rows, 6) == (18, 6)
    assert table.schema.names[:3] == ["job_id", "sampling.temperature", "sampling.seed"]
    assert [field.type for field in table.schema][:3] == [pa.string(), pa.float64(), pa.int64()]
    assert table.schema.names[3:] == ["prompt", "id", *COMPUTED_SCHEMA.names]
    keys = list(
        zip(*(table[c].to_pylist() for c in ("sampling.temperature", "sampling.seed")), strict=True)
    )
    assert keys == [(t, s) for t in (0.0, 0.7) for s in (0, 1, 2) for _ in range(3)]
    for job in sorted(root.glob("*/completions.parquet")):
        rows = table.filter(pa.compute.equal(table["job_id"], job.parent.name))
        assert rows.drop_columns(table.schema.names[:3]).equals(pq.read_table(job))


def test_the_combined_file_says_which_jobs_it_holds(tmp_path: Path) -> None:
    root = made_sweep(tmp_path / "sweep", unfinished=[(0.7, 1)])
    combined = combine(root)
    facts = json.loads(pq.read_schema(combined.path).metadata[SWEEP_KEY])
    assert facts["sweep_hash"] == combined.sweep_hash
    assert facts["parameters"] == ["sampling.temperature", "sampling.seed"]
    assert [job["job_id"] for job in facts["jobs"]] == ["0000", "0001", "0002", "0700", "0702"]
    assert [job["num_rows"] for job in facts["jobs"]] == [3] * 5


def test_a_current_file_is_left_alone_and_a_finished_job_is_added(tmp_path: Path) -> None:
    root = made_sweep(tmp_path / "sweep", unfinished=[(0.7, 2)])
    assert combine(root).written
    before = (root / "combined.parquet").stat().st_mtime_ns
    assert not combine(root).written
    assert (root / "combined.parquet").stat().st_mtime_ns == before
    sampling = {"temperature": 0.7, "seed": 2}
    made_run(root / "0702" / "completions.parquet", ["one", "two", "three"], 72, sampling)
    again = combine(root)
    assert (again.written, again.num_jobs, again.num_rows) == (True, 6, 18)
    (root / "combined.parquet").write_bytes(b"PAR1 damaged")
    assert combine(root).written
    assert pq.read_table(root / "combined.parquet").num_rows == 18


def test_a_crash_while_combining_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = made_sweep(tmp_path / "sweep", unfinished=[(0.7, 2)])
    combine(root)
    before = (root / "combined.parquet").read_bytes()
    made_run(root / "0702" / "completions.parquet", ["a", "b", "c"], 1, {"seed": 2})

    def stop(path: str) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(combining, "sync_path", stop)
    with pytest.raises(Exception, match="no space left on device"):
        combine(root)
    assert (root / "combined.parquet").read_bytes() == before
    assert sorted(p.name for p in root.glob("combined*")) == ["combined.parquet"]


def test_combining_holds_one_row_group_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = made_sweep(tmp_path / "sweep", prompts=[f"p{i}" for i in range(200)])
    monkeypatch.setattr(combining, "_MAX_ROW_GROUP_ROWS", 150)
    metadata = pq.read_metadata(combine(root).path)
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sum(sizes) == 1200
    assert max(sizes) < 150 + 200


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5], pa.float64()),
        ([1, 2.5], pa.float64()),
        ([1, 2], pa.int64()),
        ([1, 2**63], pa.uint64()),
        ([None, 3], pa.int64()),
        ([True, False], pa.bool_()),
        ([True, 1], pa.string()),
        (["a", None], pa.string()),
        ([["a"], []], pa.list_(pa.string())),
        ([["a"], "b"], pa.string()),
    ],
)
def test_a_parameter_has_the_type_of_its_values(
    tmp_path: Path, values: list[Any], expected: Any
) -> None:
    root = tmp_path / "sweep"
    root.mkdir()
    (root / "multirun.yaml").write_text("hydra: {}\n")
    for index, value in enumerate(values):
        made_run(root / f"job{index}" / "completions.parquet", ["p"], index, {"given": value})
    table = pq.read_table(combine(root).path)
    assert table.schema.field("sampling.given").type == expected
    by_job = dict(
        zip(table["job_id"].to_pylist(), table["sampling.given"].to_pylist(), strict=True)
    )
    for index, value in enumerate(values):
        as_text = pa.types.is_string(expected) and not isinstance(value, str | None)
        assert by_job[f"job{index}"] == (json.dumps(value) if as_text else value)


def test_columns_of_the_data_keep_their_names_and_ours_give_way(tmp_path: Path) -> None:
    root = made_sweep(tmp_path / "sweep", temperatures=(0.7,), seeds=(0, 1))
    for output in root.glob("*/completions.parquet"):
        table = pq.read_table(output)
        table = table.append_column("job_id", pa.array(["mine"] * table.num_rows))
        pq.write_table(table, output)
    table = pq.read_table(combine(root).path)
    assert table["sweep.job_id"].to_pylist() == ["0700"] * 3 + ["0701"] * 3
    assert set(table["job_id"].to_pylist()) == {"mine"}


def test_a_column_with_two_types_is_refused_and_a_missing_one_is_null(tmp_path: Path) -> None:
    root = made_sweep(tmp_path / "sweep", temperatures=(0.7,), seeds=(0, 1))
    output = root / "0701" / "completions.parquet"
    table = pq.read_table(output)
    pq.write_table(table.append_column("extra", pa.array([1, 2, 3])), output)
    assert pq.read_table(combine(root).path)["extra"].to_pylist() == [None] * 3 + [1, 2, 3]
    column = table.schema.get_field_index("prompt")
    pq.write_table(table.set_column(column, "prompt", pa.array([1, 2, 3])), output)
    with pytest.raises(InputError, match="prompt has type string in job 0700 and int64 in 0701"):
        combine(root)


def test_unfinished_jobs_are_named_whether_started_or_not(tmp_path: Path) -> None:
    root = made_sweep(tmp_path / "sweep", unfinished=[(0.7, 1), (0.7, 2)])
    shutil.rmtree(root / "0702")
    sweep = find_sweep(root)
    assert len(sweep.jobs) == 4
    started, missing = sweep.unfinished
    assert (started.job_id, missing.job_id) == ("0701", None)
    assert set(missing.overrides) == {"sampling.temperature=0.7", "sampling.seed=2"}


def test_the_swept_columns_are_there_before_the_jobs_differ_in_them(tmp_path: Path) -> None:
    pending = [(0.7, seed) for seed in (0, 1, 2)] + [(0.0, 1), (0.0, 2)]
    root = made_sweep(tmp_path / "sweep", unfinished=pending)
    early = pq.read_schema(combine(root).path)
    whole = pq.read_schema(combine(made_sweep(tmp_path / "whole")).path)
    assert early.remove_metadata().equals(whole.remove_metadata())


def test_a_job_that_wrote_elsewhere_is_found_by_its_config(tmp_path: Path) -> None:
    root = made_sweep(tmp_path / "sweep", unfinished=[(0.7, 1)])
    sampling = {"temperature": 0.7, "seed": 1}
    output = made_run(tmp_path / "elsewhere.parquet", ["one", "two", "three"], 71, sampling)
    (root / "0701" / ".hydra" / "config.yaml").write_text(f"output: {output}\n")
    sweep = find_sweep(root)
    assert (len(sweep.jobs), sweep.unfinished) == (6, [])
    assert combine(sweep).num_rows == 18


def test_a_sweep_without_a_finished_job_and_a_plain_directory_are_refused(tmp_path: Path) -> None:
    root = made_sweep(tmp_path / "sweep", temperatures=(0.7,), seeds=(0,), unfinished=[(0.7, 0)])
    with pytest.raises(InputError, match="holds no finished job"):
        combine(root)
    with pytest.raises(InputError, match=r"holds no multirun\.yaml"):
        combine(tmp_path)


def levenshtein(a: list[int], b: list[int]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        new = [i + 1]
        for j, y in enumerate(b):
            new.append(min(row[j] + (x != y), row[j + 1] + 1, new[j] + 1))
        row = new
    return row[-1]


TOKENS = st.lists(st.integers(0, 3), max_size=8)


@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=5))
@settings(deadline=None, max_examples=50)
def test_edit_distances_are_levenshtein_s(pairs: list[tuple[list[int], list[int]]]) -> None:
    left, right = ([np.array(ids, np.int32) for ids in side] for side in zip(*pairs, strict=True))
    matrix = variants._padded([*left, *right])
    lengths = [np.array([len(ids) for ids in side]) for side in (left, right)]
    found = edit_distances(matrix[: len(pairs)], matrix[len(pairs) :], *lengths)
    assert found.tolist() == [levenshtein(a, b) for a, b in pairs]


def test_variants_are_compared_within_each_prompt_only(tmp_path: Path) -> None:
    prompts = [f"p{i}" for i in range(40)]
    paths = [tmp_path / f"{n}.parquet" for n in range(3)]
    salts = zip(paths, (1, 1, 2), strict=True)
    outputs = [made_run(path, prompts, salt, num_samples=3) for path, salt in salts]
    found = compare_variants([RunOutput(path) for path in outputs])
    tokens: list[list[list[int]]] = [[] for _ in prompts]
    for path in outputs:
        for row, ids in enumerate(pq.read_table(path)["completion_ids"].to_pylist()):
            tokens[row // 3].append(ids)
    pairs = [pair for variants_of in tokens for pair in combinations(variants_of, 2)]
    assert (found.num_prompts, found.num_variants, found.num_pairs) == (40, 360, len(pairs))
    assert found.num_same_tokens == sum(a == b for a, b in pairs)
    grams = [[t for ids in v for t in ids] for v in tokens]
    assert found.distinct_1 == sum(len(set(g)) for g in grams) / sum(map(len, grams))
    differing = [next(i for i in range(5) if a[i] != b[i]) for a, b in pairs if a != b]
    assert found.mean_divergence == pytest.approx(np.mean(differing))
    curve = [np.mean([a[:p] == b[:p] for a, b in pairs]) for p in range(6)]
    assert found.agreement_curve[:6].tolist() == pytest.approx(curve)
    distances = [levenshtein(a, b) / 5 for a, b in pairs]
    assert found.mean_edit_distance == pytest.approx(np.mean(distances))


def test_failed_rows_and_early_ends_are_no_agreement(tmp_path: Path) -> None:
    prompts = ["a", "b"]
    first = made_run(tmp_path / "1.parquet", prompts, 1)
    shorter = made_run(
        tmp_path / "2.parquet",
        prompts,
        1,
        change=lambda r: failed(r) if r.id == "row 1" else with_ids(r, list(r.completion_ids)[:3]),
    )
    found = compare_variants([RunOutput(first), RunOutput(shorter)])
    assert (found.num_variants, found.num_pairs, found.num_same_tokens) == (3, 1, 0)
    assert found.mean_divergence == 3
    assert found.agreement_curve[3:5].tolist() == [1, 0]


def test_runs_of_other_rows_are_not_compared_as_variants(tmp_path: Path) -> None:
    a = made_run(tmp_path / "a.parquet", ["x", "y"])
    b = made_run(tmp_path / "b.parquet", ["x", "y"], ids=["row 1", "row 0"])
    c = made_run(tmp_path / "c.parquet", ["x"])
    for other in (b, c):
        with pytest.raises(InputError, match="do not hold the same rows"):
            compare_variants([RunOutput(a), RunOutput(other)])


def test_a_sweep_s_report_groups_by_all_but_the_seed(tmp_path: Path) -> None:
    found = report([str(made_sweep(tmp_path / "sweep"))])
    greedy, warm = as_dict(found)["groups"]
    assert greedy["parameters"] == {"sampling.temperature": 0.0}
    assert (greedy["same_tokens"], greedy["same_bits"]) == (1.0, 1.0)
    assert (warm["same_tokens"], warm["distinct_completions"]) == (0.0, 1.0)
    assert warm["runs"] == [3, 4, 5]
    assert len(found.agreements) == 15


def test_report_writes_page_pictures_and_combined_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = made_sweep(tmp_path / "sweep", unfinished=[(0.7, 1)])
    assert cli.main(["report", str(root)]) == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out.splitlines()[-1])
    assert document["combined"] == str(root / "combined.parquet")
    assert document["page"] == str(root / "report" / "report.html")
    assert all(Path(path).is_file() for path in (document["page"], *document["images"]))
    assert [job["job_id"] for job in document["unfinished"]] == ["0701"]
    assert "1 of the sweep's jobs are not finished" in " ".join(shown.err.split())
    assert "all seeds agree bit for bit" in " ".join(shown.err.split())


def test_report_without_files_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = made_sweep(tmp_path / "sweep")
    before = sorted(root.rglob("*"))
    assert cli.main(["report", "--no-files", str(root)]) == 0
    assert sorted(root.rglob("*")) == before
    assert "page" not in json.loads(capsys.readouterr().out.splitlines()[-1])
