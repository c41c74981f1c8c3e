"""Sweeps through the command line: jobs side by side over one model, each as if it were alone."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.gguf_factory import write_model
from support.paths import REPO_ROOT

from orcd_batch import job
from orcd_batch.cli import main
from orcd_batch.data import part_store, read_manifest

SMOLLM2 = REPO_ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
# One of more than a block, so that its keys and values are shared.
PROMPTS = ["one", "two two", "three, and a longer prompt " * 4, "four?", "ünïcode 🙂"]
TABLE = {"id": list("abcde"), "prompt": PROMPTS, "extra": range(5)}
SWEEP = ["sampling.temperature=0,0.7,1.0", "sampling.seed=range(2)"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two small models; a chat template is not needed here."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("tiny", 0), ("other", 1)):
        write_model(folder / f"{name}.gguf", num_layers=2, hidden_size=64, num_heads=2, seed=seed,
                    num_kv_heads=1, intermediate_size=64, context_length=256)  # fmt: skip
    return folder


def base_options(models):
    return [
        "model=smollm2", f'model.path="{models}/tiny.gguf"', "model.chat=false", "engine=numpy",
        "sampling.max_tokens=6",
    ]  # fmt: skip


@pytest.fixture
def run(models, tmp_path, monkeypatch, capsys):
    """Runs one command line in an empty directory; returns exit code, last JSON, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def command(*args, first=()):
        code = main([*first, *base_options(models), *args])
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if out else None, err

    return command


@pytest.fixture
def loads(monkeypatch):
    """The model files whose weights were loaded, in order."""
    loaded: list[str] = []
    engine = job.LoadedEngine

    def counting(source, *args):
        loaded.append(source.gguf.path.name)
        return engine(source, *args)

    monkeypatch.setattr(job, "LoadedEngine", counting)
    return loaded


def write(path, **columns):
    pq.write_table(pa.table(columns), path)
    return f"data={path}"


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "prompts.parquet", **TABLE)


@pytest.fixture(scope="module")
def fused(models, tmp_path_factory):
    """The documents of SWEEP over the prompts, as it runs by default."""
    folder, out = tmp_path_factory.mktemp("fused"), io.StringIO()
    data = write(folder / "prompts.parquet", **TABLE)
    sweep = ["-m", *base_options(models), data, *SWEEP, f"hydra.sweep.dir={folder}/swept"]
    with contextlib.redirect_stdout(out):
        assert main(sweep) == 0
    return json.loads(out.getvalue().splitlines()[-1])


def assert_as_alone(run, document, *overrides):
    """The job run by itself gives the same table: every column, every row, every bit."""
    code, alone, err = run(*overrides, "output=alone.parquet", "overwrite=true")
    assert code == 0, err
    assert alone["run_hash"] == document["run_hash"]
    assert pq.read_table("alone.parquet").equals(pq.read_table(document["output"]))


def statistics(document):
    return read_manifest(document["output"])["statistics"]


def test_every_job_of_a_sweep_gives_what_it_gives_alone_over_one_loaded_model(run, prompts, loads):
    code, documents, err = run("-m", prompts, *SWEEP, "sampling.n=2")
    assert code == 0, err
    assert loads == ["tiny.gguf"]
    assert len({d["output"] for d in documents}) == 6
    chosen = [("0", 0, 0), ("0.7", 1, 3), ("1.0", 0, 4)]
    for temperature, seed, place in chosen:
        how = [f"sampling.temperature={temperature}", f"sampling.seed={seed}", "sampling.n=2"]
        assert_as_alone(run, documents[place], prompts, *how)


@pytest.mark.parametrize(
    "how",
    [
        ["engine.max_num_seqs=1"],
        ["engine.max_num_seqs=3", "engine.max_num_batched_tokens=7"],
        ["engine.prefix_caching=false"],
        ["hydra/launcher=basic"],
    ],
)
def test_how_a_sweep_runs_changes_no_bit(run, fused, prompts, how):
    code, other, err = run("-m", prompts, *SWEEP, *how)
    assert code == 0, err
    assert [d["run_hash"] for d in other] == [d["run_hash"] for d in fused]
    for one, two in zip(fused, other, strict=True):
        assert pq.read_table(one["output"]).equals(pq.read_table(two["output"]))


def test_a_prompt_is_read_once_and_greedy_samples_are_computed_once(run, tmp_path):
    data = write(tmp_path / "long.parquet", prompt=[PROMPTS[2]])
    _, alone, _ = run(data, "output=alone.parquet")
    num_prompt_tokens = statistics(alone)["prefill_tokens"]
    _, documents, _ = run("-m", data, *SWEEP)
    group = statistics(documents[0])["group"]
    assert group["prefill_tokens"] + group["shared_prompt_tokens"] == 5 * num_prompt_tokens
    assert group["shared_prompt_tokens"] >= 4 * 64
    assert group["tokens_computed"] == sum(d["tokens"] for d in documents)
    assert group["tokens_sampled"] <= 5 * 6


def test_the_manifests_of_a_sweep_say_what_was_shared_and_add_up(run, fused, prompts):
    found = [statistics(document) for document in fused]
    assert [s["shared_with"] for s in found] == [5] * 6
    assert len({json.dumps(s["group"], sort_keys=True) for s in found}) == 1
    group = found[0]["group"]
    assert group["jobs"] == 6
    assert sum(s["tokens_computed"] for s in found) == group["tokens_computed"]
    rates = [s["tokens_per_s"] for s in found]
    assert sum(rates) == pytest.approx(group["tokens_per_s"], rel=0.01)
    assert "prefill_tokens" not in found[0]
    _, alone, _ = run(prompts, "output=alone.parquet")
    assert statistics(alone)["shared_with"] == 0
    assert "group" not in statistics(alone)


def test_jobs_that_sweep_the_number_of_samples_agree_in_those_they_share(run, prompts):
    code, documents, err = run("-m", prompts, "sampling=default", "sampling.n=1,3")
    assert code == 0, err
    assert [d["rows"] for d in documents] == [5, 15]
    few, many = (pq.read_table(d["output"]).to_pylist() for d in documents)
    assert few == [row for row in many if row["sample_index"] == 0]
    assert_as_alone(run, documents[1], prompts, "sampling=default", "sampling.n=3")


def test_rows_with_their_own_sampling_keep_it_in_a_sweep(run, tmp_path):
    data = write(
        tmp_path / "own.parquet",
        prompt=["x", "x", "x", "x"],
        max_tokens=pa.array([1, 2, None, 3]),
        n=pa.array([1, 3, 1, -1]),
    )
    columns = "dataset.sampling_columns=[max_tokens,n]"
    code, documents, err = run("-m", data, columns, "sampling.temperature=0,0.7,1.0")
    assert code == 0, err
    assert [d["errors"] for d in documents] == [1, 1, 1]
    for document, temperature in zip(documents, ("0", "0.7", "1.0"), strict=True):
        assert_as_alone(run, document, data, columns, f"sampling.temperature={temperature}")


def test_error_rows_are_in_every_job_and_end_only_the_one_that_asks_for_it(run, tmp_path):
    data = write(tmp_path / "bad.parquet", prompt=["fine", None, "much too long " * 200, "", "ok"])
    code, documents, err = run(
        "-m", data, "dataset.on_error=record,raise", "sampling.seed=1,2",
        'hydra.sweep.subdir="${dataset.on_error}-${sampling.seed}"',
    )  # fmt: skip
    assert code == 1
    assert [d.get("errors") for d in documents[:2]] == [3, 3]
    assert all("Row" in d["error"] and "cannot be run" in d["error"] for d in documents[2:])
    assert_as_alone(run, documents[0], data, "sampling.seed=1")
    assert "dataset.on_error=record goes on" in err


def test_a_bad_job_does_not_take_the_others_along(run, prompts, loads):
    code, documents, err = run("-m", prompts, "sampling.top_p=0,1", "sampling.seed=1,2")
    assert code == 2
    assert all("top_p=0" in d["error"] for d in documents[:2])
    assert [d["rows"] for d in documents[2:]] == [5, 5]
    assert loads == ["tiny.gguf"]
    assert "Traceback" not in err


def test_a_foreign_output_is_refused_and_the_others_go_on(run, prompts, tmp_path):
    outputs = 'output="out-${sampling.seed}.parquet"'
    write(tmp_path / "out-2.parquet", mine=[1])
    run(prompts, "output=out-3.parquet", "sampling.temperature=0.1")
    code, documents, _ = run("-m", prompts, "sampling=default", "sampling.seed=1,2,3,4", outputs)
    assert code == 2
    assert "was not written by orcd_batch" in documents[1]["error"]
    assert "different job" in documents[2]["error"]
    for seed in (1, 4):
        document = documents[seed - 1]
        assert_as_alone(run, document, prompts, "sampling=default", f"sampling.seed={seed}")
    assert pq.read_table("out-2.parquet").column_names == ["mine"]


def test_an_output_that_cannot_be_written_ends_its_job_alone(run, prompts, tmp_path):
    (tmp_path / "1").write_text("a file, not a directory")
    code, documents, _ = run(
        "-m", prompts, "sampling.seed=0,1", 'output="${sampling.seed}/out.parquet"'
    )
    assert code == 2
    assert documents[0]["rows"] == 5
    assert "1/out.parquet" in documents[1]["error"]


def test_jobs_with_one_output_are_refused_by_name_before_anything_runs(run, prompts, loads):
    code, documents, err = run("-m", prompts, "sampling.seed=1,2", "output=same.parquet")
    assert code == 2
    sentence = "same.parquet would be the output of 2 jobs of this sweep"
    assert all(sentence in d["error"] for d in documents)
    assert f"orcd-batch: 2 jobs (sampling.seed=1, sampling.seed=2): {sentence}" in err
    assert not loads
    assert not Path("same.parquet").exists()


@pytest.mark.parametrize("swept", ["sampling.seed=1,1", "engine.max_num_seqs=1,2", "output=a,b"])
def test_jobs_that_compute_the_same_are_refused_as_they_have_one_directory(run, prompts, swept):
    code, documents, err = run("-m", prompts, swept, "sampling.temperature=0.5")
    assert code == 2
    assert all("would be the directory of 2 jobs" in d["error"] for d in documents)
    assert "hydra.sweep.subdir" in err


def test_jobs_that_compute_the_same_run_in_directories_of_their_own(run, prompts):
    named = "hydra.sweep.subdir='${engine.max_num_seqs}'"
    code, documents, err = run("-m", prompts, "engine.max_num_seqs=1,2", named)
    assert code == 0, err
    assert [Path(d["output"]).parent.name for d in documents] == ["1", "2"]
    assert documents[0]["run_hash"] == documents[1]["run_hash"]


def test_an_error_of_many_jobs_is_told_once_with_their_names(run, prompts, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, documents, err = run("-m", prompts, "sampling.seed=range(5)", "model.path=gone.gguf")
    assert (code, len(documents)) == (2, 5)
    (line,) = (line for line in err.splitlines() if line.startswith("orcd-batch: "))
    names = "sampling.seed=0, sampling.seed=1, sampling.seed=2, …"
    assert line.startswith(f"orcd-batch: 5 jobs ({names}): There is no model file gone.gguf")
    table = [line.split("│")[1:-1] for line in err.splitlines() if "│" in line]
    assert [(cells[0].strip(), cells[-1].strip()) for cells in table] == [
        (str(seed), "failed") for seed in range(5)
    ]


def test_a_sweep_directory_that_cannot_be_made_is_a_sentence(run, prompts, tmp_path):
    (tmp_path / "taken").write_text("a file")
    code, _, err = run("-m", prompts, "sampling.seed=1,2", "hydra.sweep.dir=taken")
    assert code == 2
    assert "cannot be made: File exists: 'taken'; name another place" in err


def test_finished_jobs_are_skipped_without_loading_the_model(run, prompts, loads):
    _, first, _ = run("-m", prompts, "sampling.seed=1,2")
    code, second, err = run("-m", prompts, "sampling.seed=1,2")
    assert code == 0, err
    assert loads == ["tiny.gguf"]
    assert [d["rows_computed"] for d in second] == [0, 0]
    assert [d["run_hash"] for d in second] == [d["run_hash"] for d in first]


def test_a_sweep_goes_on_in_its_directory_with_other_engine_options(run, prompts):
    how = ["-m", prompts, "sampling=default", "sampling.seed=1,2"]
    _, first, _ = run(*how)
    other = ["engine.max_num_seqs=2", "++engine.num_threads=1", "dataset.on_error=raise"]
    code, second, err = run(*how, *other)
    assert code == 0, err
    assert [d["output"] for d in second] == [d["output"] for d in first]
    assert [d["rows_computed"] for d in second] == [0, 0]
    _, shorter, _ = run(*how, "engine.max_model_len=200")
    assert {d["output"] for d in shorter}.isdisjoint(d["output"] for d in first)


def test_a_sweep_finishes_what_one_job_has_done_and_another_has_half_done(run, prompts, tmp_path):
    _, whole, _ = run("-m", prompts, "sampling=default", "sampling.seed=1,2,3")
    outputs = 'output="out-${sampling.seed}.parquet"'
    how = [prompts, "sampling=default"]
    run(*how, "sampling.seed=1", outputs)
    half_done(run, [*how, "sampling.seed=2", outputs], num_rows=2)
    code, documents, err = run("-m", *how, "sampling.seed=1,2,3", outputs)
    assert code == 0, err
    assert [d["rows_resumed"] for d in documents] == [5, 2, 0]
    assert [d["run_hash"] for d in documents] == [d["run_hash"] for d in whole]


def half_done(run, overrides, num_rows):
    """Leaves a job of which num_rows rows are finished and the rest was never computed."""
    add, patch = part_store.PartStore.add, pytest.MonkeyPatch()
    added: list[int] = []

    def stopping(store, results):
        if len(added) == num_rows:
            raise KeyboardInterrupt
        added.append(results[0].row_index)
        add(store, results)

    with patch.context() as context:
        context.setattr(part_store.PartStore, "add", stopping)
        assert run(*overrides)[0] == 130


def test_different_models_and_data_run_group_by_group(run, prompts, models, tmp_path, loads):
    other = write(tmp_path / "other.parquet", prompt=["another", "file"])
    code, documents, err = run(
        "-m", f"{prompts},{other.removeprefix('data=')}", "sampling.seed=1,2",
        "sampling.temperature=0.7", f"model.path={models}/tiny.gguf,{models}/other.gguf",
    )  # fmt: skip
    assert code == 0, err
    assert sorted(loads) == ["other.gguf", "other.gguf", "tiny.gguf", "tiny.gguf"]
    assert sorted(d["rows"] for d in documents) == [2] * 4 + [5] * 4
    assert len({d["run_hash"] for d in documents}) == 8
    how = [other, "sampling.seed=2", "sampling.temperature=0.7"]
    last = next(d for d in reversed(documents) if d["rows"] == 2)
    assert_as_alone(run, last, *how, f"model.path={models}/other.gguf")


def test_a_model_that_is_not_there_ends_its_group_alone(run, prompts, models):
    code, documents, _ = run(
        "-m", prompts, f"model.path=nowhere.gguf,{models}/tiny.gguf", "sampling.seed=1,2"
    )
    assert code == 2
    assert all("nowhere.gguf" in d["error"] for d in documents[:2])
    assert [d["rows"] for d in documents[2:]] == [5, 5]


def test_each_job_has_its_own_directory_config_and_log(run, tmp_path):
    data = write(tmp_path / "bad.parquet", prompt=["fine", None])
    _, documents, _ = run("-m", data, "sampling.seed=5,6", "dataset.on_error=record")
    logs = []
    for seed, document in zip((5, 6), documents, strict=True):
        directory = Path(document["output"]).parent
        overrides = (directory / ".hydra" / "overrides.yaml").read_text()
        assert f"sampling.seed={seed}" in overrides
        assert "seed: " + str(seed) in (directory / ".hydra" / "config.yaml").read_text()
        logs.append((directory / "orcd_batch.log").read_text())
    for log, document, other in zip(logs, documents, reversed(documents), strict=True):
        assert "loaded output" in log
        assert log.count("row 1 (id 1)") == 1
        assert f"output: {document['output']}" in log
        assert other["output"] not in log


def test_the_error_of_one_job_is_in_its_log_only(run, prompts):
    _, documents, _ = run("-m", prompts, "sampling.top_p=0,1")
    bad = Path(documents[0]["directory"]) / "orcd_batch.log"
    good = Path(documents[1]["output"]).parent / "orcd_batch.log"
    assert "top_p=0" in bad.read_text()
    assert "top_p=0" not in good.read_text()


def test_the_table_at_the_end_has_a_line_for_each_job(run, prompts):
    _, documents, err = run("-m", prompts, "sampling.temperature=0,0.7", "sampling.seed=3")
    table = [line for line in err.splitlines() if "│" in line]
    assert len(table) == 2
    for line, document in zip(table, documents, strict=True):
        assert document["run_hash"][:12] in line
    assert "0.7" in table[1]
    assert "two two" not in err


def test_a_sweep_ends_with_one_combined_file(run, prompts):
    _, documents, err = run("-m", prompts, "sampling.seed=1,2", "hydra.sweep.dir=swept")
    combined = pq.read_table("swept/combined.parquet")
    assert combined.num_rows == sum(d["rows"] for d in documents)
    assert "combined.parquet" in err


def test_a_combined_file_that_cannot_be_written_is_a_warning(run, prompts, tmp_path):
    (tmp_path / "swept" / "combined.parquet").mkdir(parents=True)
    code, documents, err = run("-m", prompts, "sampling.seed=1,2", "hydra.sweep.dir=swept")
    assert code == 0
    assert len(documents) == 2
    assert "no combined file" in err


def test_options_that_need_a_process_for_each_job_are_refused_with_the_way_out(run, prompts):
    code, documents, err = run("-m", prompts, "sampling.seed=1,2", "hydra.job.chdir=true")
    assert code == 2
    assert documents is None
    assert "hydra/launcher=basic" in err
    assert len(err.strip().splitlines()) == 1


def test_a_sweep_that_a_file_describes_is_a_sweep_like_any_other(run, prompts, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "seeds.yaml").write_text(
        "defaults: [config, _self_]\n"
        "hydra: {mode: MULTIRUN, sweeper: {params: {sampling.seed: '1,2'}}}\n"
    )
    named = ["--config-dir", "mine", "--config-name", "seeds"]
    code, documents, err = run(prompts, first=named)
    assert code == 0, err
    assert [d["rows"] for d in documents] == [5, 5]
    assert " seed " in err
    own = write(tmp_path / "own.parquet", prompt=["x"], seed=[3])
    code, documents, _ = run(own, "dataset.sampling_columns=[seed]", first=named)
    assert code == 2
    assert all("sampling.seed is swept" in d["error"] for d in documents)


def test_one_engine_is_gone_before_the_next_is_loaded(run, prompts, models, monkeypatch):
    import gc

    from orcd_batch.engine.engine import Engine

    alive = []
    engine = job.LoadedEngine

    def counting(*args):
        alive.append(sum(isinstance(found, Engine) for found in gc.get_objects()))
        return engine(*args)

    monkeypatch.setattr(job, "LoadedEngine", counting)
    before = sum(isinstance(found, Engine) for found in gc.get_objects())
    gc.disable()
    try:
        run("-m", prompts, f"model.path={models}/tiny.gguf,{models}/other.gguf")
    finally:
        gc.enable()
    assert alive == [before, before]


def test_ctrl_c_keeps_the_finished_rows_of_every_job_and_the_command_continues(models, tmp_path):
    write(tmp_path / "in.parquet", prompt=[f"row {i}" for i in range(150)])
    main_with_small_parts = (
        "import sys; from orcd_batch.data import part_store; part_store.COMMIT_ROWS = 10; "
        "from orcd_batch.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [
        sys.executable, "-c", main_with_small_parts, "-m", *base_options(models), "data=in.parquet",
        "sampling=default", "sampling.seed=1,2,3", "hydra.sweep.dir=swept",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while process.poll() is None and num_jobs_with_rows(tmp_path / "swept") < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    interrupted = json.loads(out.splitlines()[-1])
    assert ["Interrupted" in d["error"] for d in interrupted] == [True] * 3
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    documents = json.loads(done.stdout.splitlines()[-1])
    assert [d["rows"] for d in documents] == [150] * 3
    assert all(d["rows_resumed"] > 0 for d in documents)


def test_ctrl_c_begins_no_further_batch_of_jobs(run, prompts, monkeypatch):
    """The first batch loads its model when the interrupt comes; Hydra would launch three more."""
    engine = job.LoadedEngine

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return engine(*args)

    monkeypatch.setattr(job, "LoadedEngine", interrupted)
    code, documents, _ = run(
        "-m", prompts, "sampling.seed=1,2,3,4", "hydra.sweeper.max_batch_size=1"
    )
    assert code == 130
    assert ["Interrupted" in document["error"] for document in documents] == [True]


def test_ctrl_c_while_an_output_is_written_begins_no_further_group(
    run, prompts, models, loads, monkeypatch
):
    assemble = part_store.PartStore.assemble

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        assemble(*args)

    monkeypatch.setattr(part_store.PartStore, "assemble", interrupted)
    both = f"model.path={models}/tiny.gguf,{models}/other.gguf"
    code, (done, left), _ = run("-m", prompts, both)
    assert (code, done["rows"], loads) == (130, 5, ["tiny.gguf"])
    assert "the same command continues" in left["error"]


def num_jobs_with_rows(sweep: Path) -> int:
    return len({part.parent for part in sweep.glob("*/*.parts/*.arrow")})


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason="the demo model is not there: make demo")
def test_a_sweep_on_smollm2_gives_each_job_what_it_gives_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    how = [
        "model=smollm2", f"model.path={SMOLLM2}", "engine=numpy", "sampling.max_tokens=8",
        f"data={REPO_ROOT}/examples/prompts.parquet", "sampling.n=2",
    ]  # fmt: skip
    assert main(["-m", *how, *SWEEP]) == 0
    documents = json.loads(capsys.readouterr().out.splitlines()[-1])
    jobs = [(t, s) for t in ("0", "0.7", "1.0") for s in range(2)]
    for (temperature, seed), document in zip(jobs, documents, strict=True):
        output = f"alone-{temperature}-{seed}.parquet"
        own = [f"sampling.temperature={temperature}", f"sampling.seed={seed}", f"output={output}"]
        assert main([*how, *own]) == 0
        assert pq.read_table(output).equals(pq.read_table(document["output"]))
