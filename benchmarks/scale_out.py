"""One job over several workers on Ray: how much faster, and with the same bits.

python benchmarks/scale_out.py [--replicas 1 8] [--shape phi3]
    w3's prompts, multiplied by the largest number of replicas, through the whole program: in one
    process, then with each number of replicas (default: one per GPU). Prints tokens/s, the
    ratio to one process and whether the run hashes are equal; exit code 1 where they are not.
python benchmarks/scale_out.py --trivial [--rows 500000] [--replicas 1]
    the driver and the way through Ray alone: workers give back made-up completions at once.
    Prints input rows/s, from the first row dealt to the finished output.
"""

import argparse
import json
import os
import subprocess
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
    from orcd_batch.scale_out import ScaleOut
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
        choice, found = scale_out.choose()
        identity = job_identity(options, source, "trivial", choice, found)
        output = str(folder / "out.parquet")
        check = interrupts.stop_if_requested
        with JobRun.open(options, output, identity, dataset, folder) as run:
            machinery = scale_out.start(choice, [options.sampling], identity, num_rows, check)
            while scale_out.num_ready < replicas:
                machinery.runner.look()
            started = time.perf_counter()
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
        "moved_s": round(moved - started, 2),
        "finished_s": round(ended - moved, 2),
        "rows_per_s": round(num_rows / (ended - started)),
        "moved_rows_per_s": round(num_rows / (moved - started)),
        "run_hash": totals.run_hash,
    }


def write_w3(path: Path, times: int, num_prompts: int | None) -> None:
    """w3's prompts (the first num_prompts) `times` over, each time with other tokens."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from workloads import w3

    works = [(work, turn) for turn in range(times) for work in w3().works[:num_prompts]]
    prompts = [[(t + 7919 * turn) % 31995 + 5 for t in work.prompt] for work, turn in works]
    lengths = [work.num_new for work, _ in works]
    table = pa.table({"token_ids": prompts, "max_tokens": lengths})
    pq.write_table(table, path, row_group_size=1000)


def run_w3(folder: Path, name: str, max_model_len: int, overrides: list[str]) -> dict[str, Any]:
    """The job through the command line; what its document and its manifest say of it."""
    from orcd_batch.data import read_manifest

    command = [
        sys.executable, "-m", "orcd_batch", "model=llama2", "model.path=model.gguf",
        "model.architectures=[]", "model.chat=false", "data=w3.parquet", "sampling=greedy",
        "dataset.sampling_columns=[max_tokens]", "sampling.ignore_eos=true",
        f"engine.max_model_len={max_model_len}", f"output={name}.parquet", f"hydra.run.dir={name}",
        *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}")
    document = json.loads(done.stdout.splitlines()[-1])
    manifest = read_manifest(str(folder / f"{name}.parquet"))
    return {
        "how": name,
        "wall_s": round(time.perf_counter() - began, 1),
        "start_s": manifest["statistics"]["start_s"],
        "generate_s": manifest["statistics"]["generate_s"],
        "tokens_per_s": document["tokens_per_s"],
        "errors": document["errors"],
        "workers": [[w["device"], w["rows"]] for w in manifest["workers"]],
        "run_hash": document["run_hash"],
    }


def compare_w3(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    from make_model import make_model
    from true_shapes import SHAPES

    replicas = options.replicas or [_num_gpus()]
    make_model(folder / "model.gguf", SHAPES[options.shape])
    write_w3(folder / "w3.parquet", options.times or max(replicas), options.prompts)
    alone = run_w3(folder, "one-process", options.max_model_len, options.overrides)
    rows = [alone]
    for number in replicas:
        overrides = [*options.overrides, "scale_out=ray", f"scale_out.replicas={number}"]
        row = run_w3(folder, f"ray-{number}", options.max_model_len, overrides)
        row["ratio"] = round(row["tokens_per_s"] / alone["tokens_per_s"], 3)
        row["same_hash"] = row["run_hash"] == alone["run_hash"]
        rows.append(row)
    return rows


def _num_gpus() -> int:
    listed = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, text=True, check=False)
    return max(1, listed.stdout.count("GPU "))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trivial", action="store_true")
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--replicas", type=int, nargs="+")
    parser.add_argument("--times", type=int, help="w3 so many times; default: most replicas")
    parser.add_argument("--prompts", type=int, help="only w3's first so many prompts")
    parser.add_argument("--shape", default="phi3")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("overrides", nargs="*", help="of the jobs, such as engine=numpy")
    options = parser.parse_args()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        folder = Path(directory)
        if options.trivial:
            os.environ["PYTHONPATH"] = str(ROOT / "tests")  # the workers need it, too
            rows = [trivial(folder, options.rows, (options.replicas or [1])[0])]
        else:
            rows = compare_w3(folder, options)
    for row in rows:
        print(json.dumps(row))
    return 0 if all(row.get("same_hash", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
