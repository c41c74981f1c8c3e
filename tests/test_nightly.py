"""The nightly check: it passes while nothing changes, and names what changed when bits drift."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pyarrow.parquet as pq
import pytest
from support.nightly_check import (
    CHATML,
    NOTHING_VARIED,
    CheckFolder,
    copy_source,
    flip_weight_bit,
)
from support.paths import REPO_ROOT

from orcd_batch.cli import main

ONE_BY_ONE = (*NOTHING_VARIED, "check.batch_sizes=[1]")
EVERYTHING = (
    *("check.runs=1", "check.batch_sizes=[1]", "check.chunk_sizes=[7]", "check.orders=1"),
    *("check.single_rows=1", "check.stop_after=[1]", "check.kill_after=[2]"),
)


@pytest.fixture(scope="module")
def proven(tmp_path_factory):
    """A folder in which two nights have passed, and what they said."""
    source = copy_source(REPO_ROOT, tmp_path_factory.mktemp("source"))
    folder = CheckFolder(tmp_path_factory.mktemp("nightly"), source)
    folder.write_inputs()
    return folder, [folder.night(options) for options in (EVERYTHING, NOTHING_VARIED)]


@pytest.fixture
def folder(proven, tmp_path):
    """The same folder, free to be spoilt."""
    original, _ = proven
    shutil.copytree(original.path, tmp_path / "copy")
    return replace(original, path=tmp_path / "copy")


def test_it_passes_twice_in_a_row_with_every_variation(proven):
    _, nights = proven
    for code, document, err in nights:
        assert code == 0, err
        assert (document["verdict"], document["cause"]) == ("pass", None)
        assert document["num_failed"] == 0
    first, second = (document for _, document, _ in nights)
    assert [v["name"] for v in first["variations"] if v["status"] == "equal"] == [
        "reference", "batch-1", "chunk-7", "order-1", "row-0", "no-prefix-caching", "stopped-1",
        "killed-2", "threads-1",
    ]  # fmt: skip
    assert {v["name"] for v in first["variations"] if v["status"] == "skipped"} == {
        "no-graphs",
        "gpus",
    }
    assert first["baseline_status"] == "created"
    assert second["baseline_status"] == "equal"
    assert second["baseline_hash"] == first["run_hash"] == second["run_hash"]
    assert second["last_good_night"] == first["night"]
    assert second["comparisons"][-1]["against"] == "baseline"


def test_interrupted_runs_were_really_ended_half_way(proven):
    folder, _ = proven
    for name in ("stopped-1", "killed-2"):
        run = folder.nights[0] / "runs" / name
        document = json.loads((run / "result.json").read_text())["document"]
        assert 0 < document["rows_resumed"] < 5
        assert document["rows_resumed"] + document["rows_computed"] == 5
    killed = folder.nights[0] / "runs" / "killed-2" / "interrupted"
    assert not (killed / "result.json").exists()


def test_the_history_grows_by_a_row_a_night_and_keeps_what_explains_it(proven):
    folder, nights = proven
    rows = pq.read_table(folder.history).to_pylist()
    assert [row["night"] for row in rows] == [document["night"] for _, document, _ in nights]
    for row, (_, document, _) in zip(rows, nights, strict=True):
        for name in ("verdict", "run_hash", "model_hash", "code_hash", "baseline_hash", "seconds"):
            assert row[name] == document[name]
        assert dict(row["versions"]) == document["versions"]
        assert row["variations"] == document["variations"]
        assert row["tokens_per_s"] > 0
        facts = json.loads(row["facts"])
        assert facts["model.hash"] == row["model_hash"]
        assert "model.tensors.blk.0.ffn_up.weight" in facts
        assert "code.backend/numpy_ops.py" in facts
    assert not list(folder.history.parent.glob("*.tmp"))


def test_a_ci_system_gets_one_testcase_a_comparison(proven):
    folder, _ = proven
    suite = ElementTree.parse(folder.nights[0] / "junit.xml").getroot()[0]
    assert suite.get("tests") == "10"
    assert suite.get("failures") == "0"
    assert len(suite.findall("testcase/skipped")) == 2


def test_one_flipped_weight_bit_fails_and_the_tensor_is_named(folder):
    flip_weight_bit(folder.model, "blk.0.ffn_up.weight")
    code, document, err = folder.night(NOTHING_VARIED)
    assert code == 1
    assert document["verdict"] == "fail"
    assert [c["field"] for c in document["changed"] if c["field"].startswith("model.")] == [
        "model.hash",
        "model.tensors.blk.0.ffn_up.weight",
    ]
    assert "the model file's tensor blk.0.ffn_up.weight" in document["cause"]
    assert "Changed since the last good night" in document["cause"]
    first = document["first_difference"]
    assert (first["comparison"], first["id"], first["sample_index"]) == ("baseline", "a", 0)
    assert first["position"] is not None
    assert [c["name"] for c in document["comparisons"] if not c["equal"]] == ["baseline"]
    assert "Failed. The night differs from the baseline" in err
    suite = ElementTree.parse(folder.path / document["junit"]).getroot()[0]
    (failure,) = suite.findall("testcase/failure")
    assert "id 'a'" in failure.get("message")
    assert "blk.0.ffn_up.weight" in failure.text
    row = pq.read_table(folder.history).to_pylist()[-1]
    assert (row["verdict"], row["failing_since"]) == ("fail", document["night"])
    assert row["first_difference"] == first


def test_a_changed_chat_template_fails_and_is_named(folder):
    folder.write_inputs(chat_template=CHATML.replace("assistant", "helper"))
    code, document, _ = folder.night(NOTHING_VARIED)
    assert code == 1
    assert "the chat template in the model file" in document["cause"]
    assert "tensor" not in document["cause"]
    first = document["first_difference"]
    assert (first["id"], first["kind"] in ("tokens", "prompt")) == ("a", True)


def test_an_altered_reduction_order_fails_and_the_source_file_is_named(folder):
    copy = copy_source(folder.source, folder.path / "patched")
    ops = copy / "orcd_batch" / "backend" / "numpy_ops.py"
    text, ours = ops.read_text(), "np.add.reduce(x * x, axis=1"
    assert text.count(ours) == 1, "rms_norm sums elsewhere now: alter it there"
    ops.write_text(text.replace(ours, "np.add.reduce((x * x)[:, ::-1], axis=1"))
    code, document, _ = replace(folder, source=copy).night(ONE_BY_ONE)
    assert code == 1
    assert "orcd_batch's code in backend/numpy_ops.py" in document["cause"]
    assert "code_hash" in [change["field"] for change in document["changed"]]
    first = document["first_difference"]
    assert (first["comparison"], first["id"]) == ("baseline", "a")
    assert [v["status"] for v in document["variations"][:2]] == ["equal", "equal"]


def test_bits_that_depend_on_the_batch_are_found_without_a_baseline(folder):
    copy = copy_source(folder.source, folder.path / "patched")
    ops = copy / "orcd_batch" / "backend" / "numpy_ops.py"
    text = ops.read_text()
    order = "[:, :: 1 if x.shape[0] > 1 else -1]"
    ops.write_text(
        text.replace("np.add.reduce(x * x, axis=1", f"np.add.reduce((x * x){order}, axis=1")
    )
    alone = replace(folder, source=copy)
    code, document, err = alone.night([*ONE_BY_ONE, "check.baseline=null"])
    assert code == 1
    assert document["groups"] == [["reference"], ["batch-1"]]
    assert "1 of 1 runs do not agree with the job as configured (batch-1)" in document["cause"]
    assert document["first_difference"]["comparison"] == "batch-1"
    assert document["first_difference"]["kind"] in ("tokens", "numerics")
    assert "Runs with the same bits: reference | batch-1" in err


def test_a_run_that_does_not_end_fails_the_night_and_is_recorded(folder):
    before = len(pq.read_table(folder.history))
    code, document, _ = folder.night([*NOTHING_VARIED, "check.timeout_s=0.01"])
    assert code == 1
    assert document["run_hash"] is None
    assert "The job as configured did not end well: It ended with signal 9" in document["cause"]
    assert "Nothing on record changed since the last good night" in document["cause"]
    assert pq.read_table(folder.history)["verdict"].to_pylist()[before:] == ["fail"]
    assert ElementTree.parse(folder.path / document["junit"]).getroot()[0].get("failures") == "1"


def test_a_night_that_is_stopped_ends_with_130_and_leaves_the_history_alone(folder):
    before = folder.history.read_bytes()
    process = folder.start(NOTHING_VARIED)
    job = "*/runs/reference/job.json"
    known = len(list(folder.nights[0].parent.glob(job)))
    while process.poll() is None and len(list(folder.nights[0].parent.glob(job))) == known:
        pass
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert "nothing of it is recorded" in err
    assert folder.history.read_bytes() == before


def test_a_multirun_of_checks_that_is_stopped_begins_no_further_check(folder):
    places = "check.directory=outputs/nightly/seed-${sampling.seed}"
    process = folder.start([*NOTHING_VARIED, "-m", "sampling.seed=1,2", places])
    outputs = folder.path / "outputs"
    while process.poll() is None and not list(outputs.rglob("seed-1/**/runs/reference/job.json")):
        pass
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert process.returncode == 130
    errors = [document["error"] for document in json.loads(out.splitlines()[-1])]
    assert ["nothing of it is recorded" in error for error in errors] == [True, True]
    assert not list(outputs.rglob("seed-2/**/job.json"))


@pytest.fixture
def in_process(monkeypatch, capsys):
    """A night by a call of main, for what ends before or with its first run."""

    def night(folder, *options):
        monkeypatch.chdir(folder.path)
        job = ("--config-dir", "jobs", "--config-name", "nightly_reproducibility")
        model = ("model=smollm2", "model.path=tiny.gguf", "engine=numpy", "data=prompts.parquet")
        code = main([*job, *model, *NOTHING_VARIED, *options])
        out, err = capsys.readouterr()
        return code, out, " ".join(err.split())

    return night


def test_a_golden_result_that_was_changed_is_refused_before_any_work(folder, in_process):
    golden = folder.baseline / "completions.parquet"
    table = pq.read_table(golden)
    pq.write_table(table.slice(0, 4).replace_schema_metadata(table.schema.metadata), golden)
    code, out, err = in_process(folder)
    assert (code, out) == (2, "")
    assert "it was changed, or an update was cut short" in err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["check.runs=0"], "check.runs=0 is out of range"),
        (["check.batchsizes=[1]"], "did you mean check.batch_sizes?"),
        (["check.history=prompts.parquet"], "is no history"),
        (["model.path=nowhere.gguf"], "no model file nowhere.gguf"),
        (["dataset.prompt_column=text"], "dataset.prompt_column"),
        (["dataset.limit=0"], "has no rows"),
        (["sampling.top_p=0"], "top_p=0"),
    ],
)
def test_a_bad_configuration_is_a_sentence_and_exit_code_2(tmp_path, in_process, options, sentence):
    folder = CheckFolder(tmp_path)
    folder.write_inputs()
    code, out, err = in_process(folder, *options)
    assert (code, out) == (2, "")
    assert sentence in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_rows_dealt_to_two_workers_by_ray_are_a_variation_like_any_other(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'orcd-batch[ray]'")
    folder = CheckFolder(tmp_path)
    folder.write_inputs()
    code, document, err = folder.night([*NOTHING_VARIED, "check.replicas=[2]"])
    assert code == 0, err
    assert [v["name"] for v in document["variations"][:2]] == ["reference", "replicas-2"]
    (compared,) = document["comparisons"]
    assert compared["equal"]
    assert "rows of each worker: " in compared["explanation"]
    assert document["num_devices"] == 1


@pytest.mark.slow
def test_ten_runs_of_five_prompts_agree(tmp_path):
    folder = CheckFolder(tmp_path)
    folder.write_inputs()
    code, document, err = folder.night(["check.runs=3"], job="acceptance")
    assert code == 0, err
    assert (document["num_comparisons"], document["groups"]) == (
        2,
        [["reference", "repeat-2", "repeat-3"]],
    )
    assert document["history"] is None


@pytest.mark.slow
def test_real_weights_pass_and_with_one_bit_flipped_fail(real_model, tmp_path):
    folder = CheckFolder(tmp_path)
    folder.write_inputs()
    shutil.copyfile(real_model, folder.model)
    options = [*ONE_BY_ONE, "dataset.limit=2", "sampling.max_tokens=4"]
    code, document, err = folder.night(options)
    assert code == 0, err
    assert (document["num_rows"], document["num_errors"]) == (2, 0)
    assert document["baseline_status"] == "created"
    flip_weight_bit(folder.model, "blk.7.ffn_down.weight", byte=5, mask=0x01)
    code, document, _ = folder.night(options)
    assert code == 1
    assert "tensor blk.7.ffn_down.weight" in document["cause"]
    assert document["first_difference"]["id"] == "a"


def test_every_job_of_the_package_composes():
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra

    from orcd_batch.config import JobOptions, resolve
    from orcd_batch.hydra_app.app import register_resolvers

    GlobalHydra.instance().clear()
    ConfigStore.instance().store(name="orcd_schema", node=JobOptions)
    register_resolvers([])
    names = sorted(path.stem for path in (REPO_ROOT / "jobs").glob("*.yaml"))
    assert names == ["acceptance", "nightly_reproducibility", "sweep_temperature_seed"]
    path = ["hydra.searchpath=[" + str(REPO_ROOT / "conf") + "]"]
    with initialize_config_dir(str(REPO_ROOT / "jobs"), version_base="1.3"):
        for name in names:
            cfg = compose(name, ["model=smollm2", "data=x.parquet", *path])
            assert (resolve(cfg).check is None) == (name == "sweep_temperature_seed")


def test_the_command_on_line_one_of_each_job_names_the_job():
    for path in Path(REPO_ROOT / "jobs").glob("*.yaml"):
        first = path.read_text().splitlines()[0]
        start = f"# python -m orcd_batch --config-dir jobs --config-name {path.stem} model="
        assert first.startswith(start)
