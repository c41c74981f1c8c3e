"""verify and report: what is equal, where the first difference is, and what could explain it."""

import io
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from large_job import trivial_result
from rich.console import Console

from orcd_batch.data import DatasetOptions, InputDataset, PartStore, SampleResult
from orcd_batch.errors import ConfigError, InputError
from orcd_batch.reproducibility import (
    baseline,
    numerics_hash,
    report,
    run_output,
    token_hash,
    verify,
)
from orcd_batch.reproducibility.baseline import Baseline
from orcd_batch.reproducibility.baseline_verify import verify as verify_command
from orcd_batch.reproducibility.verify import compare


def with_tokens(result: SampleResult, completion_ids: list[int]) -> SampleResult:
    return replace(
        result,
        completion_ids=completion_ids,
        completion_tokens=len(completion_ids),
        token_hash=token_hash([1, 2, 3, 4], completion_ids),
    )


def with_fingerprints(result: SampleResult, fingerprints: list[int]) -> SampleResult:
    return replace(result, fingerprints=fingerprints, numerics_hash=numerics_hash(fingerprints))


def run(
    path: Path,
    ids: Iterable[int | str],
    changes: dict[tuple[int | str, int], Any] | None = None,
    manifest: dict[str, Any] | None = None,
    num_samples: int = 2,
    **options: Any,
) -> str:
    """An output whose rows depend on their ids alone, except for `changes`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = list(ids)
    pq.write_table(pa.table({"prompt": [f"p{i}" for i in rows], "id": rows}), f"{path}.in")
    dataset = InputDataset.open(f"{path}.in", DatasetOptions(**options))
    with PartStore.open(str(path), {"job": 1}) as store:
        for row in dataset.rows():
            results = []
            for sample in range(num_samples):
                seed = replace(row, index=int(str(row.id)))
                result = replace(trivial_result(seed, sample, 4), row_index=row.index)
                change = (changes or {}).get((row.id, sample))
                results.append(change(result) if change else result)
            store.add(results)
        store.assemble(dataset, manifest or {})
    return str(path)


def shown(renderable: Any) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_same_rows_in_another_order_are_equal(tmp_path: Path) -> None:
    a = run(tmp_path / "a" / "completions.parquet", range(50))
    b = run(tmp_path / "b.parquet", reversed(range(50)))
    found = compare(str(Path(a).parent), b)
    assert found.equal
    assert found.num_equal == found.num_rows_a == found.num_rows_b == 100
    assert found.differing == []
    assert "Equal: all 100 rows" in shown(verify.render(found))
    assert verify.as_dict(found)["equal"] is True


def test_the_first_differing_token_and_the_margins_there_are_found(tmp_path: Path) -> None:
    def other(result: SampleResult) -> SampleResult:
        ids = list(result.completion_ids or [])
        changed = with_tokens(result, [*ids[:2], 77, *ids[3:]])
        return replace(changed, margins=[1.0, 1.0, 0.125, 1.0])

    a = run(tmp_path / "a.parquet", ["3", "4", "5"])
    b = run(tmp_path / "b.parquet", ["5", "4", "3"], {("4", 1): other})
    found = compare(a, b)
    assert not found.equal
    assert (found.num_equal, found.num_tokens_differ, found.num_numerics_differ) == (5, 1, 0)
    (row,) = found.differing
    assert (row.kind, row.id, row.sample_index, row.position) == ("tokens", "4", 1, 2)
    assert (row.token_a, row.token_b, row.margin_a, row.margin_b) == (7, 77, 0.25, 0.125)
    assert row.numerics_position is None
    text = shown(verify.render(found))
    assert "'4'" in text
    assert "0.125" in text


def test_a_completion_that_ends_early_differs_at_its_end(tmp_path: Path) -> None:
    a = run(tmp_path / "a.parquet", [8])
    shorter = {(8, 0): lambda result: with_tokens(result, list(result.completion_ids)[:3])}
    (row,) = compare(a, run(tmp_path / "b.parquet", [8], shorter)).differing
    assert (row.position, row.token_a, row.token_b) == (3, 11, None)


def test_equal_tokens_with_different_numerics_are_told_apart(tmp_path: Path) -> None:
    def nudged(result: SampleResult) -> SampleResult:
        prints = list(result.fingerprints or [])
        return with_fingerprints(result, [prints[0], prints[1] ^ 1, *prints[2:]])

    a = run(tmp_path / "a.parquet", range(3))
    found = compare(a, run(tmp_path / "b.parquet", range(3), {(2, 0): nudged}))
    assert (found.num_equal, found.num_tokens_differ, found.num_numerics_differ) == (5, 0, 1)
    (row,) = found.differing
    assert (row.kind, row.id, row.position, row.token_a, row.token_b) == ("numerics", 2, 1, 3, 3)


def test_a_different_prompt_with_the_same_completion_is_called_so(tmp_path: Path) -> None:
    def prompted(result: SampleResult) -> SampleResult:
        return replace(result, token_hash=token_hash([9], result.completion_ids or []))

    a = run(tmp_path / "a.parquet", range(3))
    found = compare(a, run(tmp_path / "b.parquet", range(3), {(1, 1): prompted}))
    assert [(row.kind, row.position) for row in found.differing] == [("prompt", None)]


def test_error_rows_are_equal_when_their_kinds_are(tmp_path: Path) -> None:
    def failed(reason: str, kind: Any) -> Any:
        return lambda result: SampleResult.failed(
            result.row_index, result.sample_index, result.id, reason, kind
        )

    a = run(tmp_path / "a.parquet", range(3), {(0, 0): failed("x", "input")})
    b = run(tmp_path / "b.parquet", range(3), {(0, 0): failed("y", "input")})
    c = run(tmp_path / "c.parquet", range(3), {(0, 0): failed("z", "infrastructure")})
    assert compare(a, b).equal
    (row,) = compare(a, c).differing
    assert (row.kind, row.error_a, row.error_b) == ("error", "x", "z")
    (row,) = compare(run(tmp_path / "d.parquet", range(3)), a).differing
    assert (row.error_a, row.error_b) == (None, "x")


def test_rows_on_one_side_only_are_listed_and_typed_ids_do_not_mix(tmp_path: Path) -> None:
    a = run(tmp_path / "a.parquet", [1, 2, 3])
    b = run(tmp_path / "b.parquet", [2, 3, 4, 5])
    found = compare(a, b)
    assert (found.num_only_a, found.only_a) == (2, [(1, 0), (1, 1)])
    assert (found.num_only_b, found.only_b) == (4, [(4, 0), (4, 1), (5, 0), (5, 1)])
    found = compare(a, run(tmp_path / "c.parquet", ["1", "2", "3"]))
    assert (found.num_equal, found.num_only_a, found.num_only_b) == (0, 6, 6)
    assert "In A but not in B: id 1 sample 0" in shown(verify.render(found))


def test_manifest_fields_that_could_explain_it_are_named_and_times_are_not(tmp_path: Path) -> None:
    first = {
        "config": {"sampling": {"seed": 1}, "output": "x", "data": ["p"], "model": {"path": "a"}},
        "run_hash": "a",
        "statistics": {"tokens_per_s": 1.0, "prefill_tokens": 5},
        "start_s": 1.0,
        "engine": {"device": "one card", "chunks": [1, 2]},
    }
    second = {
        "config": {"sampling": {"seed": 2}, "output": "y", "data": ["q"], "model": {"path": "b"}},
        "run_hash": "b",
        "statistics": {"tokens_per_s": 2.0, "prefill_tokens": 7},
        "start_s": 3.0,
        "engine": {"device": "another", "chunks": [1, 2], "graphs": True},
    }
    a = run(tmp_path / "a.parquet", [1], manifest=first)
    b = run(tmp_path / "b.parquet", [1], manifest=second)
    assert compare(a, b).manifest_differences == [
        ("config.sampling.seed", 1, 2),
        ("engine.device", "one card", "another"),
        ("engine.graphs", None, True),
    ]
    assert json.loads(json.dumps(verify.as_dict(compare(a, b))))["manifest_differences"] == {
        "config.sampling.seed": {"a": 1, "b": 2},
        "engine.device": {"a": "one card", "b": "another"},
        "engine.graphs": {"a": None, "b": True},
    }


def test_a_prefix_on_either_side_is_respected(tmp_path: Path) -> None:
    a = run(tmp_path / "a.parquet", range(4), output_prefix="new_")
    assert compare(a, run(tmp_path / "b.parquet", range(4))).equal


def test_many_passes_over_the_keys_find_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop = {(n, 0): lambda result: with_tokens(result, [5]) for n in range(0, 40, 4)}
    a = run(tmp_path / "a.parquet", range(2, 42))
    b = run(tmp_path / "b.parquet", reversed(range(40)), drop)
    at_once = compare(a, b, max_listed=5)
    monkeypatch.setattr(run_output, "_ROWS_IN_MEMORY", 20)
    assert compare(a, b, max_listed=5) == at_once
    assert len(at_once.differing) == 5
    assert at_once.num_tokens_differ == 9
    assert [row.id for row in at_once.differing] == [4, 8, 12, 16, 20]


def test_a_drift_is_one_sentence_with_the_kind_the_place_and_the_margin(tmp_path: Path) -> None:
    def other(result: SampleResult) -> SampleResult:
        ids = list(result.completion_ids or [])
        return replace(with_tokens(result, [*ids[:2], 77, *ids[3:]]), margins=[1.0, 1.0, 0.125, 1])

    def nudged(result: SampleResult) -> SampleResult:
        prints = list(result.fingerprints or [])
        return with_fingerprints(result, [prints[0], prints[1] ^ 1, *prints[2:]])

    a = run(tmp_path / "a.parquet", range(3))
    b = run(tmp_path / "b.parquet", range(1, 4), {(1, 0): other, (2, 1): nudged})
    assert verify.explanation(compare(a, b), "the baseline", "tonight") == (
        "1 of 8 rows differ in tokens, 1 of 8 rows differ in numerics only, 2 of 8 rows are only "
        "in the baseline, 2 of 8 rows are only in tonight; the first is id 1: token 3 in the "
        "baseline, 77 in tonight at position 2 (margin 0.25 in the baseline, 0.125 in tonight)"
    )
    alone = compare(a, run(tmp_path / "c.parquet", range(3), {(2, 1): nudged}))
    assert verify.explanation(alone) == (
        "1 of 6 rows differ in numerics only; the first is id 2 sample 1: same tokens, other "
        "logits from position 1 on (margin 0.25 in A, 0.25 in B)"
    )
    assert verify.explanation(compare(a, a)).startswith("all 6 rows are equal")


def test_a_golden_result_is_made_compared_and_replaced_with_its_history(tmp_path: Path) -> None:
    golden = str(tmp_path / "golden")
    first = run(tmp_path / "a" / "completions.parquet", range(4), manifest={"seed": 1})
    changed = {(2, 0): lambda result: with_tokens(result, [5])}
    second = run(tmp_path / "b" / "completions.parquet", range(4), changed, manifest={"seed": 2})
    document, _, code = verify_command(str(tmp_path / "a"), golden, True, "the first")
    assert (code, document["results"]["."]["old_run_hash"]) == (0, None)
    document, text, code = verify_command(first, golden, False, None)
    assert (code, document["equal"]) == (0, True)
    assert "Equal: all 8 rows" in shown(text)
    document, text, code = verify_command(str(tmp_path / "b"), golden, False, None)
    assert (code, document["equal"]) == (1, False)
    assert document["comparisons"]["."]["manifest_differences"] == {"seed": {"a": 1, "b": 2}}
    assert "could explain it" in shown(text)
    document, text, _ = verify_command(second, golden, True, "  a new seed ")
    result = document["results"]["."]
    assert (result["num_equal"], result["num_tokens_differ"]) == (7, 1)
    assert result["first_difference"]["id"] == 2
    assert result["manifest_differences"] == [["seed", 1, 2]]
    assert "→" in shown(text)
    assert verify_command(second, golden, False, None)[2] == 0
    assert verify_command(first, golden, False, None)[2] == 1
    updates = json.loads((tmp_path / "golden" / "baseline.json").read_text())["updates"]
    assert [update["reason"] for update in updates] == ["the first", "a new seed"]
    assert updates[1]["results"]["."]["old_run_hash"] == updates[0]["results"]["."]["new_run_hash"]
    assert not list((tmp_path / "golden").glob("*.new"))


def test_the_runs_of_a_sweep_are_compared_by_the_names_of_their_folders(tmp_path: Path) -> None:
    for sweep, names in (("one", ["x", "y"]), ("two", ["y", "z"])):
        for name in names:
            run(tmp_path / sweep / name / "completions.parquet", range(3), num_samples=1)
    one, two, golden = (str(tmp_path / name) for name in ("one", "two", "golden"))
    assert verify_command(one, golden, True, "the first")[2] == 0
    document, _, code = verify_command(one, golden, False, None)
    assert (code, list(document["comparisons"])) == (0, ["x", "y"])
    for expected in (golden, one):
        document, text, code = verify_command(two, expected, False, None)
        assert (code, document["only_baseline"], document["only_run"]) == (1, ["x"], ["z"])
        assert document["comparisons"]["y"]["equal"]
        assert "Only in the run: z" in shown(text)
    verify_command(two, golden, True, "also z")
    assert set(Baseline(golden).run_hashes) == {"x", "y", "z"}


def test_a_golden_result_needs_a_reason_and_the_run_comes_first(tmp_path: Path) -> None:
    a, golden = run(tmp_path / "a.parquet", range(2)), str(tmp_path / "golden")
    for reason in (None, " "):
        with pytest.raises(ConfigError, match="--reason"):
            verify_command(a, golden, True, reason)
    with pytest.raises(ConfigError, match="add --update"):
        verify_command(a, golden, False, "why")
    with pytest.raises(ConfigError, match="is a file"):
        verify_command(a, a, True, "why")
    verify_command(a, golden, True, "why")
    with pytest.raises(ConfigError, match="name the run first"):
        verify_command(golden, a, False, None)
    with pytest.raises(InputError, match=r"nowhere\.parquet does not exist"):
        verify_command(str(tmp_path / "nowhere.parquet"), golden, True, "why")
    assert len(Baseline(golden).updates) == 1


def test_an_update_that_was_cut_short_is_noticed_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(temporary: str, final: str) -> None:
        raise KeyboardInterrupt

    golden = str(tmp_path / "golden")
    a = run(tmp_path / "a.parquet", range(2))
    b = run(tmp_path / "b.parquet", range(2), {(0, 0): lambda result: with_tokens(result, [5])})
    verify_command(a, golden, True, "the first")
    with monkeypatch.context() as patched:
        patched.setattr(baseline, "publish", crash)
        with pytest.raises(KeyboardInterrupt):
            verify_command(b, golden, True, "the second")
    with pytest.raises(InputError, match="an update was cut short"):
        verify_command(b, golden, False, None)
    verify_command(b, golden, True, "the second, again")
    assert verify_command(b, golden, False, None)[2] == 0
    assert len(Baseline(golden).updates) == 3


def test_a_golden_result_that_is_gone_is_named_with_what_to_do(tmp_path: Path) -> None:
    a, golden = run(tmp_path / "a.parquet", range(2)), tmp_path / "golden"
    verify_command(a, str(golden), True, "the first")
    (golden / "completions.parquet").unlink()
    with pytest.raises(InputError, match=r"completions\.parquet is gone: restore it, repeat"):
        verify_command(a, str(golden), False, None)
    verify_command(a, str(golden), True, "it was lost")
    assert verify_command(a, str(golden), False, None)[2] == 0


def test_an_update_from_a_run_that_is_not_there_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        verify_command(str(tmp_path / "nowhere"), str(tmp_path / "golden"), True, "why")
    assert not (tmp_path / "golden").exists()


def test_a_damaged_list_of_updates_is_refused_in_a_sentence(tmp_path: Path) -> None:
    for text in ("no json", "[]", '{"updates": 3}', '{"updates": [{"results": 1}]}'):
        (tmp_path / "baseline.json").write_text(text)
        with pytest.raises(InputError, match=r"baseline\.json"):
            Baseline(tmp_path)


def test_what_is_not_an_output_is_refused_in_a_sentence(tmp_path: Path) -> None:
    a = run(tmp_path / "a.parquet", range(2))
    with pytest.raises(InputError, match=r"b\.parquet does not exist"):
        compare(a, str(tmp_path / "b.parquet"))
    with pytest.raises(InputError, match="carries no manifest"):
        compare(a, f"{a}.in")
    table = pq.ParquetFile(a).read()
    pq.write_table(table.drop_columns(["margins"]), tmp_path / "c.parquet")
    with pytest.raises(InputError, match="lacks the output columns margins"):
        compare(a, str(tmp_path / "c.parquet"))
    pq.write_table(pa.concat_tables([table, table]), tmp_path / "d.parquet")
    with pytest.raises(InputError, match="same id and sample_index"):
        compare(a, str(tmp_path / "d.parquet"))


def test_a_report_counts_rows_tokens_and_agreement(tmp_path: Path) -> None:
    def failed(result: SampleResult) -> SampleResult:
        return SampleResult.failed(result.row_index, 1, result.id, "why", "input")

    def manifest(seed: int) -> dict[str, Any]:
        return {
            "identity": {"job": 1},
            "model": {"name": "tiny"},
            "run_hash": f"{seed}" * 64,
            "statistics": {"tokens_per_s": 12.5},
        }

    sweep = tmp_path / "sweep"
    changed = {(1, 0): lambda result: with_tokens(result, [5]), (0, 1): failed}
    run(sweep / "0" / "completions.parquet", range(4), manifest=manifest(1))
    run(sweep / "1" / "completions.parquet", range(5), changed, manifest=manifest(2))
    found = report.report([str(sweep)])
    first, second = found.runs
    assert (first.model, first.run_hash, first.tokens_per_s) == ("tiny", "1" * 64, 12.5)
    assert (first.num_rows, first.num_tokens, first.mean_tokens) == (8, 32, 4.0)
    assert first.mean_logprob == pytest.approx(-0.5)
    assert (first.errors, first.finish_reasons) == ({}, {"stop": 8})
    assert (second.errors, second.finish_reasons) == ({"input": 1}, {"error": 1, "stop": 9})
    assert second.num_tokens == 4 * 8 + 1
    (pair,) = found.agreements
    assert (pair.a, pair.b, pair.num_shared) == (0, 1, 8)
    assert (pair.num_same_tokens, pair.num_same_bits) == (6, 6)
    text = shown(report.render(found))
    assert "tiny" in text
    assert "6 (75.00 %)" in text
    assert json.loads(json.dumps(report.as_dict(found)))["runs"][0]["num_tokens"] == 32


def test_a_report_of_no_runs_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no completions\.parquet"):
        report.report([str(tmp_path)])
