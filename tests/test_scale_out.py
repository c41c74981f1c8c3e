"""Jobs on Ray give what they give in one process, whatever happens to the workers.

The slow tests share one Ray cluster in a process of its own, joined through scale_out.address.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.gguf_factory import write_model
from support.paths import REPO_ROOT

from orcd_batch import job as job_module
from orcd_batch.config import EngineOptions, JobOptions, ModelOptions, SamplingOptions
from orcd_batch.config import ScaleOutOptions as Options
from orcd_batch.data import read_manifest
from orcd_batch.errors import RowError, ScaleOutError
from orcd_batch.job import run_jobs
from orcd_batch.provenance import choose_here
from orcd_batch.scale_out.driver import ScaleOut
from orcd_batch.scale_out.worker import load_engine

NUM_ROWS = 12
POISON = 7


def needs_ray():
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'orcd-batch[ray]'")


class DeadlyRunner:
    """A worker's runner whose process dies when it gets to the poisonous row."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def submit(self, row: Any, jobs: Any) -> None:
        if row.id == POISON:
            os.kill(os.getpid(), signal.SIGKILL)
        self._runner.submit(row, jobs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


def deadly_engine(source: Any, assignment: Any) -> Any:
    engine = load_engine(source, assignment)
    engine.runner = DeadlyRunner(engine.runner)
    return engine


def broken_engine(source: Any, assignment: Any) -> Any:
    raise RuntimeError("the GPU has fallen off the bus")


@pytest.fixture
def options(tmp_path, monkeypatch):
    """One small job in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPO_ROOT), str(REPO_ROOT / "tests")]))
    write_model(tmp_path / "tiny.gguf", num_layers=1, hidden_size=64, num_heads=2,
                num_kv_heads=1, intermediate_size=64, context_length=128)  # fmt: skip
    prompts = [f"Row {i}: {'word ' * (i % 7)}" for i in range(NUM_ROWS)]
    pq.write_table(pa.table({"id": list(range(NUM_ROWS)), "prompt": prompts}), "in.parquet")
    return JobOptions(
        model=ModelOptions("tiny", "tiny.gguf", architectures=["llama"], chat=False),
        sampling=SamplingOptions(temperature=0.8, max_tokens=5),
        engine=EngineOptions("numpy", max_num_seqs=2, num_threads=1),
        data=["in.parquet"],
    )


def seeded(options: JobOptions, seed: int, output: str, **scale_out: Any) -> JobOptions:
    return replace(
        options,
        sampling=replace(options.sampling, seed=seed),
        output=output,
        scale_out=Options("ray", **scale_out) if scale_out else Options(),
    )


def table(output: str) -> list[dict[str, Any]]:
    return pq.read_table(output).to_pylist()


def test_two_jobs_on_two_workers_are_what_they_are_in_one_process(options, tmp_path):
    needs_ray()
    alone = [seeded(options, seed, f"alone{seed}.parquet") for seed in (1, 2)]
    spread = [seeded(options, seed, f"ray{seed}.parquet", replicas=2) for seed in (1, 2)]
    expected = run_jobs([(job, tmp_path) for job in alone])
    found = run_jobs([(job, tmp_path) for job in spread])
    assert [d["run_hash"] for d in found] == [d["run_hash"] for d in expected]
    assert table("ray1.parquet") == table("alone1.parquet")
    assert pq.read_schema("ray2.parquet").equals(pq.read_schema("alone2.parquet"))
    manifest, one = read_manifest("ray1.parquet"), read_manifest("alone1.parquet")
    assert manifest["identity"] == one["identity"]
    assert manifest["num_devices"] == 2
    assert sum(worker["rows"] for worker in manifest["workers"]) == 2 * NUM_ROWS
    # A worker may still be starting when the other has done all rows.
    busy = [worker for worker in manifest["workers"] if worker["rows"]]
    assert {worker["device"] for worker in busy} == {one["identity"]["device"]}
    logs = [tmp_path / "workers" / f"{worker['worker']}.log" for worker in busy]
    assert all("ready" in log.read_text() for log in logs)
    assert run_jobs([(spread[0], tmp_path)])[0]["rows_computed"] == 0


def test_without_ray_a_sentence_says_what_to_install(options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ScaleOutError, match=r"orcd-batch\[ray\]"):
        run_jobs([(seeded(options, 1, "out.parquet", replicas=2), tmp_path)])


def test_an_address_where_nobody_answers_is_refused_at_once(options, tmp_path):
    needs_ray()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ScaleOutError, match=f"scale_out.address=127.0.0.1:{port}"):
        run_jobs([(seeded(options, 1, "out.parquet", address=f"127.0.0.1:{port}"), tmp_path)])


@pytest.fixture(scope="module", autouse=True)
def token():
    """Ray's processes recognise each other by a token; this one is known to these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        yield


@pytest.fixture(scope="module")
def cluster():
    """The address of a Ray cluster on this machine."""
    needs_ray()
    script = (
        "import ray, sys; c = ray.init(address='local', num_cpus=2, include_dashboard=False,"
        " log_to_driver=False); print('at', c.address_info['gcs_address'], flush=True);"
        " sys.stdin.read()"
    )
    folders = os.pathsep.join([str(REPO_ROOT), str(REPO_ROOT / "tests")])
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": folders},
    )
    assert process.stdout is not None
    address = next(line.split()[1] for line in process.stdout if line.startswith("at "))
    yield address
    process.communicate("")


def run_with(make_engine: Any, job: JobOptions, folder: Path, monkeypatch: Any) -> Any:
    """Runs the job with something else in the place of a worker's engine."""
    monkeypatch.setattr(job_module, "_scale_out", lambda o, d: ScaleOut(o, d, make_engine))
    (result,) = run_jobs([(job, folder)])
    return result


@pytest.mark.slow
def test_a_row_that_kills_its_workers_becomes_an_infrastructure_error_that_a_resume_retries(
    options, tmp_path, monkeypatch, cluster
):
    (alone,) = run_jobs([(seeded(options, 1, "alone.parquet"), tmp_path)])
    job = seeded(options, 1, "out.parquet", address=cluster, replicas=2)
    with monkeypatch.context() as patch:
        document = run_with(deadly_engine, job, tmp_path, patch)
    assert document["errors"] == 1
    found, expected = table("out.parquet"), table("alone.parquet")
    assert found[POISON]["error_kind"] == "infrastructure"
    assert "died" in found[POISON]["error"]
    assert found[:POISON] + found[POISON + 1 :] == expected[:POISON] + expected[POISON + 1 :]
    (resumed,) = run_jobs([(job, tmp_path)])
    assert resumed["rows_computed"] == 1
    assert resumed["run_hash"] == alone["run_hash"]


@pytest.mark.slow
def test_workers_that_never_get_ready_end_the_job_with_a_sentence(
    options, tmp_path, monkeypatch, cluster
):
    job = seeded(options, 1, "out.parquet", address=cluster, replicas=2, retries=1)
    with pytest.raises(ScaleOutError, match=r"No usable worker is left.*fallen off the bus"):
        run_with(broken_engine, job, tmp_path, monkeypatch)


@pytest.mark.slow
def test_a_worker_of_another_kind_is_refused_by_name(options, tmp_path, monkeypatch, cluster):
    monkeypatch.setattr("orcd_batch.engine_factory.cpu_name", lambda: "Another CPU")
    monkeypatch.setattr(
        ScaleOut, "choose", lambda self, check: choose_here("numpy")
    )  # this process's, not the cluster's
    with pytest.raises(ScaleOutError, match=r"Worker \d on .*\(device is Another CPU here"):
        run_jobs([(seeded(options, 1, "out.parquet", address=cluster), tmp_path)])


@pytest.mark.slow
def test_a_model_that_a_worker_cannot_see_is_an_error_that_names_its_node(
    options, tmp_path, monkeypatch, cluster
):
    elsewhere = ScaleOut._worker_options

    def moved(self: ScaleOut, *args: Any) -> JobOptions:
        told = elsewhere(self, *args)
        return replace(told, model=replace(told.model, path="/nowhere/tiny.gguf"))

    monkeypatch.setattr(ScaleOut, "_worker_options", moved)
    with pytest.raises(ScaleOutError, match=r"Worker \d on .*nowhere.tiny.gguf"):
        run_jobs([(seeded(options, 1, "out.parquet", address=cluster), tmp_path)])


@pytest.mark.slow
def test_more_workers_than_fit_are_refused_with_both_numbers(options, tmp_path, cluster):
    with pytest.raises(ScaleOutError, match="Ray has 2 CPUs, not enough for 9 workers"):
        run_jobs([(seeded(options, 1, "out.parquet", address=cluster, replicas=9), tmp_path)])


@pytest.mark.slow
def test_on_error_raise_ends_the_job_and_keeps_finished_rows(options, tmp_path, cluster):
    prompts = [None if i == 5 else f"Row {i}" for i in range(NUM_ROWS)]
    pq.write_table(pa.table({"id": list(range(NUM_ROWS)), "prompt": prompts}), "in.parquet")
    job = seeded(options, 1, "out.parquet", address=cluster, replicas=2)
    job = replace(job, dataset=replace(job.dataset, on_error="raise"))
    (error,) = run_jobs([(job, tmp_path)])
    assert isinstance(error, RowError)
    assert "Row 5" in str(error)
    recording = replace(job, dataset=replace(job.dataset, on_error="record"))
    (document,) = run_jobs([(recording, tmp_path)])
    assert document["errors"] == 1


@pytest.mark.slow
def test_an_interrupted_run_stops_at_once_and_resumes(options, tmp_path):
    needs_ray()
    args = ["model=smollm2", "model.path=tiny.gguf", "model.chat=false", "data=in.parquet",
            "engine=numpy", "sampling.max_tokens=100", "sampling.n=6", "scale_out=ray",
            "scale_out.replicas=1", "engine.max_num_seqs=1", "output=out.parquet"]  # fmt: skip
    command = [sys.executable, "-m", "orcd_batch", *args]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "numpy engine" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == 6 * NUM_ROWS
