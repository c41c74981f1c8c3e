"""The reading and writing side of a job over Ray alone: how many rows a second it moves.

    python benchmarks/scale_out.py [--rows 500000] [--tokens 4 176] [--replicas 1] [--repeats 3]

Workers give back made-up completions of so many tokens at once. Prints input rows/s, from the first
row dealt to the finished output, and the CPU time of driver and workers a row; with the load of
the machine, since driver and workers share its cores. With --results FOLDER it is stored.
benchmarks/scale_out_gpu.py measures jobs with an engine.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
_TRIVIAL_BATCH = 1024
_NUM_MADE_UP = 251


def made_up(number: int, num_tokens: int) -> tuple[Any, ...]:
    """What a SampleResult has after its id: random tokens and numbers, and their hashes."""
    from orcd_batch.reproducibility import numerics_hash, token_hash

    chance = random.Random(number)
    ids = [chance.randrange(32_000) for _ in range(num_tokens)]
    logprobs = tuple(-chance.random() for _ in ids)
    fingerprints = tuple(chance.getrandbits(63) for _ in ids)
    return (
        " ".join(map(str, ids[: 2 * num_tokens // 3])),  # as many characters as English has
        tuple(ids),
        "stop",
        50,
        num_tokens,
        sum(logprobs),
        logprobs,
        tuple(chance.random() for _ in ids),
        fingerprints,
        token_hash(range(50), ids),
        numerics_hash(fingerprints),
    )


class TrivialRunner:
    """Finishes every row at once, with one of a few completions that were made up before."""

    max_num_seqs = _TRIVIAL_BATCH
    num_sampled_tokens = 0

    def __init__(self, num_tokens: int) -> None:
        self._rows: list[tuple[int, Any]] = []
        self._made_up = [made_up(number, num_tokens) for number in range(_NUM_MADE_UP)]

    @property
    def has_room(self) -> bool:
        return len(self._rows) < _TRIVIAL_BATCH

    @property
    def has_unfinished(self) -> bool:
        return bool(self._rows)

    def submit(self, row: Any, jobs: Iterable[int]) -> None:
        self._rows += [(job, row) for job in jobs]

    def step(self) -> list[Any]:
        from orcd_batch.data import SampleResult
        from orcd_batch.row_runner import JobRow

        rows, self._rows = self._rows, []
        finished = []
        for job, row in rows:
            values = self._made_up[row.index % _NUM_MADE_UP]
            result = SampleResult(row.index, 0, row.id, *values)
            finished.append(JobRow(job, row, 1, results=[result]))
        return finished

    def drop(self, job: int) -> None:
        self._rows = [(j, row) for j, row in self._rows if j != job]


class TrivialEngine:
    """In the place of a worker's engine."""

    def __init__(self, source: Any, assignment: Any, num_tokens: int) -> None:
        self.runner = TrivialRunner(num_tokens)
        self._cpu_started = time.process_time()

    def describe(self) -> dict[str, Any]:
        return {"kind": "trivial"}

    def memory(self) -> dict[str, int]:
        return {}

    def statistics(self) -> dict[str, float]:
        return {"cpu_s": time.process_time() - self._cpu_started}


def trivial(folder: Path, num_rows: int, num_tokens: int, replicas: int) -> dict[str, Any]:
    """One job of made-up completions through Ray; times of its parts."""
    from large_job import write_input
    from support.gguf_factory import write_model

    from orcd_batch.collector import relaxed_collector
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
    options.engine.kind, options.sampling.max_tokens = "numpy", num_tokens
    options.scale_out.kind, options.scale_out.replicas = "ray", replicas
    dataset = InputDataset.open(options.data, DatasetOptions())
    with (
        ScaleOut(options, folder / "run", partial(TrivialEngine, num_tokens=num_tokens)) as workers,
        ModelSource.open(options.model) as source,
        Interrupts() as interrupts,
        JobView() as view,
    ):
        check = interrupts.stop_if_requested
        choice, found = workers.choose(check)
        identity = job_identity(options, source, "trivial", choice, found)
        output = str(folder / "out.parquet")
        with JobRun.open(options, output, identity, dataset, folder) as run:
            machinery = workers.start(choice, [options.sampling], identity, num_rows, check)
            while workers.num_ready < replicas:
                machinery.runner.look()
            started, cpu_started = time.perf_counter(), time.process_time()
            generation = Generation([run], dataset, source, machinery.runner, view, Phases())
            with relaxed_collector():  # as in a job
                generation.run(interrupts)
                moved = time.perf_counter()
                totals = run_totals(run.store)
                run.store.assemble(dataset, {"run_hash": totals.run_hash})
            ended, cpu_ended = time.perf_counter(), time.process_time()
    assert totals.num_rows == num_rows, f"{totals.num_rows} rows of {num_rows}"
    return {
        "rows": num_rows,
        "tokens_per_row": num_tokens,
        "replicas": replicas,
        "load": round(os.getloadavg()[0], 1),
        "driver_cpu_us_per_row": round((cpu_ended - cpu_started) / num_rows * 1e6, 1),
        "workers_cpu_us_per_row": round(machinery.statistics()["cpu_s"] / num_rows * 1e6, 1),
        "moved_s": round(moved - started, 2),
        "finished_s": round(ended - moved, 2),
        "rows_per_s": round(num_rows / (ended - started)),
        "moved_rows_per_s": round(num_rows / (moved - started)),
        "run_hash": totals.run_hash,
    }


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The rates of several runs of one job."""
    assert len({run["run_hash"] for run in found}) == 1, "the run hashes differ"
    rates = sorted(run["rows_per_s"] for run in found)
    return {
        "tokens_per_row": found[0]["tokens_per_row"],
        "rows_per_s": round(statistics.median(rates)),
        "slowest": rates[0],
        "fastest": rates[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4], help="of each completion")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, help="store the figures in this folder")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT / "tests")  # the workers need it, too
    summaries, runs = [], []
    for num_tokens in options.tokens:
        found = []
        for _ in range(options.repeats):
            with tempfile.TemporaryDirectory() as directory:
                job = trivial(Path(directory), options.rows, num_tokens, options.replicas)
            print(json.dumps(job), flush=True)
            found.append(job)
        rates = summary(found)
        print(
            f"{rates['rows_per_s']:,} rows/s of {num_tokens} tokens (median; "
            f"{rates['slowest']:,} to {rates['fastest']:,}), {os.cpu_count()} cores"
        )
        summaries.append(rates)
        runs += found
    if options.results is not None:
        from results_file import write_results

        from orcd_batch.engine_factory import choose_engine

        facts = {"cores": os.cpu_count(), "jobs": summaries, "runs": runs}
        write_results(options.results, "scale-out", choose_engine("numpy"), facts)


if __name__ == "__main__":
    main()
