"""The parts of a nightly check: its plan, its history, its words, and its inputs."""

import json
import signal
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orcd_batch.config import CheckOptions, JobOptions
from orcd_batch.data import DatasetOptions, InputDataset
from orcd_batch.errors import InputError, OutputError
from orcd_batch.job import dataset_options
from orcd_batch.nightly.inputs import InputVariations
from orcd_batch.nightly.plan import JobFacts, Stop, Variation, plan
from orcd_batch.reproducibility.drift import describe
from orcd_batch.reproducibility.facts import Change, changes
from orcd_batch.reproducibility.history import SCHEMA, History
from orcd_batch.reproducibility.junit import junit_xml

CPU = JobFacts("numpy", 5, 16, 512)
FULL = CheckOptions(
    runs=2, batch_sizes=[1, 600], chunk_sizes=[4], orders=1, single_rows=3, stop_after=[1],
    kill_after=[4], thread_counts=[1], prefix_caching=True, graphs=True, gpus=True,
)  # fmt: skip


def night(name="n", verdict="pass", **columns):
    return {"night": name, "verdict": verdict, "facts": json.dumps({"a": name}), **columns}


def test_every_variation_has_a_name_of_its_own_and_says_what_it_is():
    found = plan(FULL, CPU)
    names = [variation.name for variation in found]
    assert len(set(names)) == len(names)
    assert names[:4] == ["repeat-2", "batch-1", "batch-600", "chunk-4"]
    assert [v.row for v in found if v.row is not None] == [0, 2, 4]
    assert all(variation.title for variation in found)


def test_what_makes_no_sense_here_is_left_out_with_a_reason():
    left_out = {v.name: v.reason for v in plan(FULL, CPU) if v.reason}
    assert set(left_out) == {"killed-4", "no-graphs", "gpus"}
    assert left_out["killed-4"] == "there are only 5 rows"
    on_gpu = JobFacts("cuda", 5, 256, 8192, ("H200", "H100", "H200"))
    found = {v.name: v for v in plan(FULL, on_gpu)}
    assert {name for name, v in found.items() if v.reason} == {"killed-4", "threads-1"}
    assert found["gpu-2"].gpu == 2
    assert "gpu-1" not in found
    one_row = {v.name for v in plan(FULL, JobFacts("numpy", 1, 16, 512)) if v.reason}
    assert {"order-1", "row-0", "stopped-1", "killed-4"} <= one_row


@pytest.mark.parametrize(
    ("check", "job", "expected"),
    [
        ({"replicas": [2]}, {"has_ray": True}, {"replicas-2": None}),
        ({"replicas": [2]}, {}, {"replicas-2": "Ray is not installed"}),
        ({"gpus": True}, {"gpu_names": ("H200",) * 3, "has_ray": True}, {"replicas-3": None}),
        ({"gpus": True}, {"gpu_names": ("H200", "H100"), "has_ray": True}, {}),
        ({"gpus": True}, {"gpu_names": ("H200",), "has_ray": True}, {}),
        (
            {"gpus": True, "replicas": [2, 3]},
            {"gpu_names": ("H200",) * 2, "has_ray": True},
            {"replicas-2": None, "replicas-3": "2 GPUs here"},
        ),
    ],
)
def test_rows_are_dealt_to_workers_where_there_are_places_for_them(check, job, expected):
    engine = "cuda" if "gpu_names" in job else "numpy"
    facts = JobFacts(engine, 12, 256, 8192, **job)
    found = [v for v in plan(CheckOptions(**check), facts) if v.replicas is not None]
    assert {v.name: v.reason and v.reason.split(":")[0] for v in found} == expected
    for variation in found:  # the first worker to be ready cannot take all rows
        assert variation.engine["max_num_seqs"] * variation.replicas < facts.num_rows


def test_a_batch_never_asks_for_more_sequences_than_tokens():
    for variation in plan(FULL, CPU):
        engine = {"max_num_seqs": 16, "max_num_batched_tokens": 512} | dict(variation.engine)
        assert engine["max_num_seqs"] <= engine["max_num_batched_tokens"]


@pytest.mark.parametrize("num_rows", range(3, 40))
def test_an_interrupted_run_has_rows_left_when_its_signal_comes(num_rows):
    check = CheckOptions(stop_after=[1], kill_after=[2])
    for variation in plan(check, JobFacts("cuda", num_rows, 256, 8192)):
        if variation.stop is not None and variation.reason is None:
            together = variation.engine["max_num_seqs"]
            # The signal comes a step after `rows` are done; both steps may end a whole batch.
            assert variation.stop.rows - 1 + 2 * together <= num_rows
    assert plan(check, CPU)[1].stop == Stop(1, signal.SIGTERM)


@pytest.mark.parametrize("with_ids", [True, False])
def test_shuffled_and_single_rows_keep_their_ids_and_sampling(tmp_path, with_ids):
    columns = {"id": list("abcdef")} if with_ids else {}
    table = pa.table({"prompt": list("uvwxyz"), **columns, "seed": range(6), "other": range(6)})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=2)
    read = {"sampling_columns": ["seed"], "limit": 5}
    options = JobOptions(data=[str(tmp_path / "in.parquet")])
    options.dataset.sampling_columns, options.dataset.limit = ["seed"], 5
    dataset = InputDataset.open(options.data, DatasetOptions(**read))
    inputs = InputVariations(dataset, options, tmp_path / "inputs")
    expected = {row.id: (row.prompt, row.overrides) for row in dataset.rows()}

    def rows(variation):
        found = inputs.options_of(variation)
        opened = InputDataset.open(
            found.data,
            DatasetOptions(id_column=found.dataset.id_column, sampling_columns=["seed"]),
        )
        return [(row.id, (row.prompt, row.overrides)) for row in opened.rows()]

    shuffled = rows(Variation("order-1", "", order=1))
    assert dict(shuffled) == expected
    assert [row_id for row_id, _ in shuffled] != list(expected)
    assert rows(Variation("row-3", "", row=3)) == [list(expected.items())[3]]
    assert inputs.options_of(Variation("same", "")) is options
    dealt = inputs.options_of(Variation("replicas-2", "", replicas=2)).scale_out
    assert (dealt.kind, dealt.replicas) == ("ray", 2)


def test_shuffled_rows_keep_the_prefix_that_sets_the_output_apart(tmp_path):
    """An earlier output as input: its `completion` column would collide without the prefix."""
    pq.write_table(pa.table({"completion": ["a", "b"]}), tmp_path / "in.parquet")
    read = {"prompt_column": "completion", "output_prefix": "new_"}
    options = JobOptions(data=[str(tmp_path / "in.parquet")])
    options.dataset.prompt_column, options.dataset.output_prefix = "completion", "new_"
    dataset = InputDataset.open(options.data, DatasetOptions(**read))
    inputs = InputVariations(dataset, options, tmp_path / "inputs")
    found = inputs.options_of(Variation("order-1", "", order=1))
    opened = InputDataset.open(found.data, dataset_options(found))
    assert sorted(row.prompt for row in opened.rows()) == ["a", "b"]


def test_a_history_grows_and_knows_the_last_good_night(tmp_path):
    path = str(tmp_path / "deep" / "history.parquet")
    for name, verdict in (("1", "pass"), ("2", "fail"), ("3", "fail")):
        with History(path) as history:
            history.append(night(name, verdict))
    with History(path) as history:
        assert len(history) == 3
        assert history.last_good() == {"night": "1", "verdict": "pass", "facts": {"a": "1"}}
        assert history.failing_since() == "2"
        with pytest.raises(OutputError, match="already has the night 2"):
            history.check_new("2")
        history.append(night("4"))
        assert history.failing_since() is None
    assert pq.read_schema(path).equals(SCHEMA)


def test_a_history_of_an_older_or_newer_version_keeps_its_columns(tmp_path):
    path = str(tmp_path / "history.parquet")
    old = pa.table({"night": ["1"], "verdict": ["pass"], "facts": ["{}"], "later": [7]})
    pq.write_table(old, path)
    with History(path) as history:
        history.append(night("2"))
    rows = pq.read_table(path).to_pylist()
    assert [row["later"] for row in rows] == [7, None]
    assert [row["run_hash"] for row in rows] == [None, None]


@pytest.mark.parametrize(
    "content",
    [b"", b"no parquet", pa.table({"prompt": ["x"]}), pa.table({"night": [1], "verdict": ["p"]})],
)
def test_what_is_no_history_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "history.parquet"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pq.write_table(content, path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"history\.parquet"):
        History(str(path))
    assert path.read_bytes() == before


def test_two_checks_do_not_write_one_history(tmp_path):
    path = str(tmp_path / "history.parquet")
    with History(path), pytest.raises(OutputError, match="Another process"):
        History(path)
    History(path).close()


def test_a_history_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "history.parquet"
    with History(str(path)) as history:
        history.append(night("1"))
        before = path.read_bytes()
        (tmp_path / "history.parquet.tmp").mkdir()
        with pytest.raises(OutputError, match="cannot be written"):
            history.append(night("2"))
    assert path.read_bytes() == before


def test_changes_are_told_in_words_and_what_follows_from_them_is_not():
    before = {
        "model.hash": "1" * 64, "model.tensors.blk.0.attn_q.weight": "x", "code_hash": "2" * 64,
        "code.backend/numpy_ops.py": "a", "versions.numpy": "2.4.5", "git_commit": "c", "cpu": "A",
    }  # fmt: skip
    now = before | {
        "model.hash": "3" * 64, "model.tensors.blk.0.attn_q.weight": "y", "versions.numpy": "2.4.6",
    }  # fmt: skip
    assert describe(changes(before, now)) == (
        "the model file's tensor blk.0.attn_q.weight; numpy 2.4.5 → 2.4.6"
    )
    now = before | {"code_hash": "4" * 64, "code.backend/numpy_ops.py": "b", "git_commit": "d"}
    assert describe(changes(before, now)) == "orcd_batch's code in backend/numpy_ops.py"
    assert describe(changes(before, before)) == "nothing on record"
    assert describe(changes(before, before | {"cpu": "B"})) == "cpu A → B"
    assert describe(changes(before, before | {"model.hash": "5" * 64})) == "the model file"


def test_many_changes_of_one_kind_are_cut_short():
    found = [Change(f"code.file{i}.py", "a", "b") for i in range(9)]
    assert describe(found) == "orcd_batch's code in file0.py, file1.py, file2.py and 6 more"


def test_junit_survives_what_xml_cannot_hold():
    compared = {"name": "batch-1", "title": "<&>", "equal": False}
    compared["explanation"] = "id '\x00\x1b[31m' \ud800"
    names = ("cause", "run_hash", "baseline_hash", "model_hash", "engine", "device")
    document = {
        **dict.fromkeys((*names, "last_good_night", "failing_since", "model_name")),
        "comparisons": [compared], "skipped": [{"name": "gpus", "title": "t", "reason": "none"}],
        "variations": [{"name": "batch-1", "seconds": 1.5}], "changed": [], "verdict": "fail",
        "seconds": 2.0, "started": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    suite = ElementTree.fromstring(junit_xml(document))[0]
    case = suite.find("testcase")
    assert case.get("name") == "batch-1: <&>"
    assert case.get("time") == "1.500"
    assert case.find("failure").get("message") == "id '\ufffd\ufffd[31m' \ufffd"
    assert suite.get("skipped") == "1"
