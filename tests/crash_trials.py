"""Kills real runs with SIGKILL at random moments and checks that rerunning loses nothing.

`python tests/crash_trials.py --trials 20` prints one line per trial and exits 1 on a failure;
with `--sweep` the runs are sweeps of four jobs over one loaded model.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from support.trial_job import finish, start, write_numbered_prompts, write_tiny_model


@dataclass(frozen=True, slots=True)
class Bench:
    """A small model and an input, and the undisturbed run's document and output."""

    folder: Path
    num_rows: int
    undisturbed: dict[str, Any]
    seconds_after_first_part: float = 0.0

    @classmethod
    def make(cls, folder: Path, num_rows: int) -> "Bench":
        write_tiny_model(folder)
        write_numbered_prompts(folder, num_rows)
        bench = cls(folder, num_rows, {})
        process = bench.start("whole.parquet")
        bench.wait_for_part(process, "whole.parquet")
        first_part = time.monotonic()
        document = finish(process)
        return cls(folder, num_rows, document, time.monotonic() - first_part)

    def start(self, output: str) -> "subprocess.Popen[str]":
        command = [
            sys.executable, "-m", "orcd_batch", "model=smollm2", "model.path=tiny.gguf",
            "model.chat=false", "data=in.parquet", f"output={output}", "engine=numpy",
            "engine.num_threads=1", "sampling=default", "sampling.max_tokens=2",
            "dataset.id_column=number",
        ]  # fmt: skip
        return start(command, self.folder)

    def wait_for_part(self, process: "subprocess.Popen[str]", output: str) -> None:
        """Returns when the first part is committed, or the process has ended."""
        parts = self.folder / f"{output}.parts"
        while process.poll() is None and not _has_part(parts):
            time.sleep(0.002)

    def rows(self, output: str) -> list[dict[str, Any]]:
        columns = ["number", "sample_index", "token_hash", "numerics_hash"]
        return pq.read_table(self.folder / output, columns=columns).to_pylist()


def _has_part(parts: Path) -> bool:
    try:
        return any(name.endswith(".arrow") for name in os.listdir(parts))
    except FileNotFoundError:
        return False


def kill_somewhere(bench: Bench, output: str, rng: random.Random) -> bool:
    """Starts a run and kills it after its first committed part; False when it had finished."""
    process = bench.start(output)
    bench.wait_for_part(process, output)
    time.sleep(rng.uniform(0, 0.8 * bench.seconds_after_first_part))
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), err[-2000:]
    return process.returncode == -signal.SIGKILL


def trial(bench: Bench, number: int, rng: random.Random) -> str:
    """One run killed after its first committed part, then run again. Returns a line about it."""
    output = f"trial-{number}.parquet"
    parts = bench.folder / f"{output}.parts"
    while not kill_somewhere(bench, output, rng):
        (bench.folder / output).unlink()
    document = finish(bench.start(output))
    assert document["rows_resumed"] > 0, document
    assert document["rows_resumed"] + document["rows_computed"] == bench.num_rows, document
    assert document["run_hash"] == bench.undisturbed["run_hash"], document
    assert bench.rows(output) == bench.rows("whole.parquet")
    assert not parts.exists(), "the parts outlive the finished output"
    return (
        f"trial {number}: killed, "
        f"{document['rows_resumed']} rows resumed, {document['rows_computed']} computed, same hash"
    )


@dataclass(frozen=True, slots=True)
class SweepBench:
    """A small model, an input, and the run hashes of an undisturbed sweep's jobs.

    seconds: how long that sweep took, from its start to its end.
    """

    folder: Path
    run_hashes: list[str]
    seconds: float = 0.0

    @classmethod
    def make(cls, folder: Path, num_rows: int) -> "SweepBench":
        write_tiny_model(folder)
        prompts = [f"Row {i}: {'word ' * (i % 40)}" for i in range(num_rows)]
        pq.write_table(pa.table({"prompt": prompts}), folder / "in.parquet", row_group_size=100)
        bench, started = cls(folder, []), time.monotonic()
        documents = finish(bench.start("whole"))
        return cls(folder, [job["run_hash"] for job in documents], time.monotonic() - started)

    def start(self, directory: str) -> "subprocess.Popen[str]":
        command = [
            sys.executable, "-c",
            # Parts of a few rows each, so that a short sweep has many moments to be killed at.
            "import sys; from orcd_batch.data import part_store; part_store.COMMIT_ROWS = 20; "
            "from orcd_batch.cli import main; sys.exit(main(sys.argv[1:]))",
            "-m", "model=smollm2", "model.path=tiny.gguf", "model.chat=false", "data=in.parquet",
            "engine=numpy", "engine.num_threads=1", "sampling.max_tokens=4",
            "sampling.temperature=0,0.8", "sampling.seed=1,2", f"hydra.sweep.dir={directory}",
        ]  # fmt: skip
        return start(command, self.folder)


def killed(process: "subprocess.Popen[str]", seconds: float) -> bool:
    """Kills a process after so many seconds; False when it had ended before."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.returncode in (0, -signal.SIGKILL), f"exit code {process.returncode}"
    return process.returncode == -signal.SIGKILL


def sweep_trial(bench: SweepBench, number: int, rng: random.Random) -> str:
    """One sweep killed up to three times at random moments. Returns a line about it."""
    directory, longest, num_kills = f"trial-{number}", bench.seconds, 0
    for _ in range(rng.randint(1, 3)):
        process = bench.start(directory)
        while not killed(process, rng.uniform(0.3, 0.95) * longest) and not num_kills:
            shutil.rmtree(bench.folder / directory)  # it was faster today: it proves nothing
            longest *= 0.8
            process = bench.start(directory)
        num_kills += process.returncode == -signal.SIGKILL
    if process.returncode != 0:
        process = bench.start(directory)
    documents = finish(process)
    assert [job["run_hash"] for job in documents] == bench.run_hashes, documents
    for job in documents:
        whole = bench.folder / "whole" / Path(job["output"]).parent.name / "completions.parquet"
        assert pq.read_table(bench.folder / job["output"]).equals(pq.read_table(whole))
    assert not list((bench.folder / directory).glob("*/*.parts")), "parts outlive their output"
    resumed = sum(job["rows_resumed"] for job in documents)
    computed = sum(job["rows_computed"] for job in documents)
    return (
        f"trial {number}: killed {num_kills} times; then {resumed} rows of four jobs resumed, "
        f"{computed} computed, the same hashes"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--sweep", action="store_true", help="kill sweeps instead of single runs")
    parser.add_argument("--rows", type=int, help="of the input: 6000, or 400 for a sweep")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        if options.sweep:
            sweep_bench = SweepBench.make(Path(folder), options.rows or 400)
            for number in range(options.trials):
                print(sweep_trial(sweep_bench, number, rng), flush=True)
        else:
            bench = Bench.make(Path(folder), options.rows or 6000)
            for number in range(options.trials):
                print(trial(bench, number, rng), flush=True)
    print(f"{options.trials} trials: nothing lost, nothing double, the same run hash every time")


if __name__ == "__main__":
    main()
