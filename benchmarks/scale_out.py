"""The reading and writing side of a job over Ray alone: how many rows a second it moves.

    python benchmarks/scale_out.py [--rows 500000] [--replicas 1] [--repeats 3]

Workers give back made-up completions at once. Prints input rows/s, from the first row dealt to the
finished output; with the load of the machine, since driver and workers share its cores.
benchmarks/scale_out_gpu.py measures jobs with an engine.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
_TRIVIAL_BATCH = 1024


class TrivialRunner:
    """Finishes every row at once, with results that depend on the row alone."""

    max_num_seqs = _TRIVIAL_BATCH
    num_sampled_tokens = 0

    def __init__(self) -> None:
        self._rows: deque[Any] = deque()

    @property
    def has_room(self) -> bool:
        return len(self._rows) < _TRIVIAL_BATCH

    @property
    def has_unfinished(self) -> bool:
        return bool(self._rows)

    def submit(self, row: Any, jobs: Iterable[int]) -> None:
        self._rows.extend((job, row) for job in jobs)

    def step(self) -> list[Any]:
        from large_job import trivial_result

        from orcd_batch.row_runner import JobRow

        rows, self._rows = self._rows, deque()
        return [JobRow(job, row, 1, results=[trivial_result(row, 0, 4)]) for job, row in rows]

    def drop(self, job: int) -> None:
        self._rows = deque((j, row) for j, row in self._rows if j != job)


class TrivialEngine:
    """In the place of a worker's engine."""

    def __init__(self, source: Any, assignment: Any) -> None:
        self.runner = TrivialRunner()

    def describe(self) -> dict[str, Any]:
        return {"kind": "trivial"}

    def memory(self) -> dict[str, int]:
        return {}

    def statistics(self) -> dict[str, float]:
        return {}


def trivial(folder: Path, num_rows: int, replicas: int) -> dict[str, Any]:
    """One job of made-up completions through Ray; times of its parts."""
    from large_job import write_input
    from support.gguf_factory import write_model

    from orcd_batch.config import JobOptions
    from orcd_batch.data import DatasetOptions, InputDataset
    from orcd_batch.generation import Generation
    from orcd_batch.interrupts import Interrupts
    from orcd_batch.job_run import JobRun
    from orcd_batch.model_source import ModelSource
    from orcd_batch.phases import Phases
    from orcd_batch.provenance import job_identity, run_totals
    from orcd_batch.scale_out.driver import ScaleOut
    from orcd_batch.view import JobView

    write_model(folder / "tiny.gguf", num_layers=1)
    write_input(folder / "in.parquet", num_rows)
    options = JobOptions(data=[str(folder / "in.parquet")])
    options.model.path, options.model.name = str(folder / "tiny.gguf"), "tiny"
    options.engine.kind, options.sampling.max_tokens = "numpy", 4
    options.scale_out.kind, options.scale_out.replicas = "ray", replicas
    dataset = InputDataset.open(options.data, DatasetOptions())
    with (
        ScaleOut(options, folder / "run", TrivialEngine) as scale_out,
        ModelSource.open(options.model) as source,
        Interrupts() as interrupts,
        JobView() as view,
    ):
        check = interrupts.stop_if_requested
        choice, found = scale_out.choose(check)
        identity = job_identity(options, source, "trivial", choice, found)
        output = str(folder / "out.parquet")
        with JobRun.open(options, output, identity, dataset, folder) as run:
            machinery = scale_out.start(choice, [options.sampling], identity, num_rows, check)
            while scale_out.num_ready < replicas:
                machinery.runner.look()
            started, cpu_started = time.perf_counter(), time.process_time()
            generation = Generation([run], dataset, source, machinery.runner, view, Phases())
            generation.run(interrupts)
            moved = time.perf_counter()
            totals = run_totals(run.store)
            run.store.assemble(dataset, {"run_hash": totals.run_hash})
    ended = time.perf_counter()
    assert totals.num_rows == num_rows, f"{totals.num_rows} rows of {num_rows}"
    return {
        "rows": num_rows,
        "replicas": replicas,
        "load": round(os.getloadavg()[0], 1),
        "driver_cpu_us_per_row": round((time.process_time() - cpu_started) / num_rows * 1e6, 1),
        "moved_s": round(moved - started, 2),
        "finished_s": round(ended - moved, 2),
        "rows_per_s": round(num_rows / (ended - started)),
        "moved_rows_per_s": round(num_rows / (moved - started)),
        "run_hash": totals.run_hash,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT / "tests")  # the workers need it, too
    found = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as directory:
            found.append(trivial(Path(directory), options.rows, options.replicas))
        print(json.dumps(found[-1]), flush=True)
    assert len({row["run_hash"] for row in found}) == 1, "the run hashes differ"
    rates = sorted(row["rows_per_s"] for row in found)
    print(
        f"{statistics.median(rates):,.0f} rows/s (median; {rates[0]:,} to {rates[-1]:,}), "
        f"{os.cpu_count()} cores"
    )


if __name__ == "__main__":
    main()
