"""Kills workers and drivers of real runs on Ray at random moments; nothing is lost or doubled.

`python tests/scale_out_trials.py --trials 20` runs a small job on two workers over and over. Up to
three times in each run it ends a worker's process with SIGKILL; in every fifth trial it ends the
driver as well, sees that none of Ray's processes stays behind, and gives the same command again.
Every run must end with the hash and the rows of a run in one process. One line per trial; exit
code 1 on a failure.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from support import trial_job
from support.trial_job import finish, write_numbered_prompts, write_tiny_model

from orcd_batch.scale_out.keeper import SESSION_VARIABLE

_VARIABLE = f"{SESSION_VARIABLE}=".encode()
_DRIVER_EVERY = 5
_LEFT_BEHIND_S = 30.0
_COMPARED = ["number", "sample_index", "token_hash", "numerics_hash", "error"]


@dataclass(frozen=True, slots=True)
class Bench:
    """A small model and an input, and what one process makes of them."""

    folder: Path
    num_rows: int
    undisturbed: dict[str, Any]
    rows: list[dict[str, Any]]

    @classmethod
    def make(cls, folder: Path, num_rows: int) -> "Bench":
        write_tiny_model(folder)
        write_numbered_prompts(folder, num_rows)
        document = finish(start(folder, "whole", "scale_out=none"))
        return cls(folder, num_rows, document, rows_of(folder, "whole"))


def start(folder: Path, name: str, *overrides: str) -> "subprocess.Popen[str]":
    command = [
        sys.executable, "-m", "orcd_batch", "model=smollm2", "model.path=tiny.gguf",
        "model.chat=false", "data=in.parquet", f"output={name}.parquet", f"hydra.run.dir={name}",
        "engine=numpy", "engine.num_threads=1", "sampling=default", "sampling.max_tokens=4",
        "dataset.id_column=number", "scale_out=ray", "scale_out.replicas=2", *overrides,
    ]  # fmt: skip
    return trial_job.start(command, folder)


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{name}.parquet", columns=_COMPARED).to_pylist()


def worker_processes(folder: Path, name: str) -> list[int]:
    """The newest process of each worker, as its log tells."""
    found = []
    for log in sorted((folder / name / "workers").glob("*.log")):
        processes = re.findall(r"process (\d+) on", log.read_text())
        found += [int(processes[-1])] if processes else []
    return found


def wait_for_part(folder: Path, name: str, process: "subprocess.Popen[str]") -> None:
    parts = folder / f"{name}.parquet.parts"
    while process.poll() is None and not list(parts.glob("*.arrow")):
        time.sleep(0.01)


def kill_workers(bench: Bench, name: str, process: Any, rng: random.Random) -> int:
    """Kills up to three workers at random moments; returns how many were there to be killed."""
    num_killed = 0
    while not worker_processes(bench.folder, name) and process.poll() is None:
        time.sleep(0.01)
    for _ in range(rng.randint(1, 3)):
        time.sleep(rng.uniform(0, 2.0))
        victims = worker_processes(bench.folder, name)
        if process.poll() is None and victims:
            try:
                os.kill(rng.choice(victims), signal.SIGKILL)
                num_killed += 1
            except ProcessLookupError:
                continue
    return num_killed


def left_behind(folder: Path) -> list[int]:
    """Processes of Ray that this script's runs started and that are still there."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            ours = _VARIABLE in (place / "environ").read_bytes()
            if ours and os.readlink(place / "cwd") == str(folder):
                found.append(int(place.name))
        except OSError:
            continue
    return found


def kill_driver(bench: Bench, name: str, process: Any, rng: random.Random) -> bool:
    """Kills the driver after its first part; False when it had finished by then."""
    wait_for_part(bench.folder, name, process)
    time.sleep(rng.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + _LEFT_BEHIND_S
    while (left := left_behind(bench.folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f"processes left behind: {left}"
    return bool(process.returncode == -signal.SIGKILL)


def trial(bench: Bench, number: int, rng: random.Random) -> str:
    name = f"trial-{number}"
    process = start(bench.folder, name)
    num_killed = kill_workers(bench, name, process, rng)
    driver_killed = False
    if number % _DRIVER_EVERY == 0:
        while not (driver_killed := kill_driver(bench, name, process, rng)):
            (bench.folder / f"{name}.parquet").unlink()
            process = start(bench.folder, name)
        process = start(bench.folder, name)
        num_killed += kill_workers(bench, name, process, rng)
    document = finish(process)
    assert document["run_hash"] == bench.undisturbed["run_hash"], document
    assert document["errors"] == 0, document
    assert document["rows_resumed"] + document["rows_computed"] == bench.num_rows, document
    assert rows_of(bench.folder, name) == bench.rows, "the rows differ"
    assert not left_behind(bench.folder), "processes left behind"
    return (
        f"trial {number}: {num_killed} workers killed"
        + (", driver killed" if driver_killed else "")
        + f", {document['rows_resumed']} rows resumed, same hash"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench.make(Path(folder).resolve(), options.rows)
        for number in range(options.trials):
            print(trial(bench, number, rng), flush=True)
    print(f"{options.trials} trials: nothing lost, nothing double, the same run hash every time")


if __name__ == "__main__":
    main()
