"""One job over the GPUs of a host: how much faster, and with the same bits.

    python benchmarks/scale_out_gpu.py [--gpus 2 4] [--shape phi3] [--results FOLDER]

w3's prompts (benchmarks/workloads.py) on one GPU without Ray; then, for each number k of GPUs, k
times as many prompts over k workers, and w3 itself over them. Prints each run's tokens/s, whole job
and while nothing starts or ends (between a tenth and six tenths of all tokens), and its ratio to
one GPU; exit code 1 where the run hash of the same rows differs or a row failed. Without GPUs:

    python benchmarks/scale_out_gpu.py --engine numpy --shape smollm2 --layers 1 --prompts 40
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow as pa
import pyarrow.parquet as pq
from make_model import make_model
from results_file import RESULTS, write_results
from true_shapes import SHAPES
from workloads import w3

from orcd_batch.config import (
    DatasetOptions,
    EngineOptions,
    JobOptions,
    ModelOptions,
    SamplingOptions,
    ScaleOutOptions,
)
from orcd_batch.data import read_manifest
from orcd_batch.engine_factory import choose_engine
from orcd_batch.job import run_job
from orcd_batch.reproducibility.hashes import RunHash
from orcd_batch.view import JobView

_STEADY = 0.1, 0.6
_HASHED = ["id", "sample_index", "token_hash", "numerics_hash", "error_kind"]


class RateView(JobView):
    """Notes how many tokens there were when, from the moment that all workers are ready."""

    num_samples = 0

    def __init__(self, num_workers: int) -> None:
        super().__init__()
        self._ready = f"{num_workers} of {num_workers} workers" if num_workers else ""
        self.samples: list[tuple[float, int]] = []

    def rows(self, done: int, tokens: int) -> None:
        super().rows(done, tokens)
        if self._ready in self.note and (not self.samples or self.samples[-1][1] < tokens):
            self.samples.append((time.perf_counter(), tokens))

    def steady_rate(self, num_tokens: int) -> float | None:
        """Tokens/s between two shares of all tokens; None where there are too few samples."""
        first, last = (share * num_tokens for share in _STEADY)
        inside = [sample for sample in self.samples if first <= sample[1] <= last]
        if len(inside) < 2:
            return None
        (began, before), (ended, after) = inside[0], inside[-1]
        return (after - before) / (ended - began)


@dataclass(frozen=True, slots=True)
class Run:
    """num_workers: 0 is one process without Ray. times: w3 so many times."""

    num_workers: int
    times: int

    @property
    def name(self) -> str:
        how = f"ray-{self.num_workers}" if self.num_workers else "one-process"
        return f"{how}-w3x{self.times}"


def write_w3(path: Path, times: int, num_prompts: int | None) -> None:
    """w3's prompts (the first num_prompts) `times` over, each time with other tokens."""
    works = [(work, turn) for turn in range(times) for work in w3().works[:num_prompts]]
    prompts = [[(t - 5 + 7919 * turn) % 31995 + 5 for t in work.prompt] for work, turn in works]
    table = pa.table({"token_ids": prompts, "max_tokens": [work.num_new for work, _ in works]})
    pq.write_table(table, path, row_group_size=1000)


def run_here(run: Run, folder: Path, engine: EngineOptions) -> dict[str, Any]:
    """The job in this process, which must be a fresh one; what there is to say of it."""
    began = time.perf_counter()
    data, output = folder / f"w3x{run.times}.parquet", folder / f"{run.name}.parquet"
    num_tokens = sum(pq.read_table(data, columns=["max_tokens"]).column(0).to_pylist())
    spread = ScaleOutOptions("ray", replicas=run.num_workers) if run.num_workers else None
    options = JobOptions(
        model=ModelOptions("w3", str(folder / "model.gguf"), architectures=[], chat=False),
        sampling=SamplingOptions(temperature=0.0, ignore_eos=True),
        dataset=DatasetOptions(sampling_columns=["max_tokens"]),
        engine=engine,
        scale_out=spread or ScaleOutOptions(),
        data=[str(data)],
        output=str(output),
    )
    view = RateView(run.num_workers)
    document = run_job(options, folder / run.name, view)
    statistics = read_manifest(str(output))["statistics"]
    steady = view.steady_rate(num_tokens)
    return {
        "run": run.name,
        "gpus": max(run.num_workers, 1),
        "tokens": document["tokens"],
        "wall_s": round(time.perf_counter() - began, 1),
        "start_s": statistics["start_s"],
        "generate_s": statistics["generate_s"],
        "tokens_per_s": document["tokens_per_s"],
        "steady_tokens_per_s": steady and round(steady, 1),
        "errors": document["errors"],
        "workers": [
            {"rows": w["rows"], "starts": w["starts"], "device": w["device"]}
            for w in read_manifest(str(output))["workers"]
        ],
        "run_hash": document["run_hash"],
        "code": read_manifest(str(output))["identity"]["code_hash"],
    }


def run_apart(run: Run, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """The job in a process of its own."""
    how = ["--child", run.name, "--models", str(folder), *arguments]
    done = subprocess.run(
        [sys.executable, __file__, *how], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{run.name}: exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def hash_of(output: Path, num_rows: int) -> str:
    """The run hash of the first num_rows rows alone."""
    run_hash = RunHash()
    for row in pq.read_table(output, columns=_HASHED).slice(0, num_rows).to_pylist():
        run_hash.add(*(row[name] for name in _HASHED))
    return run_hash.hexdigest()


def compare(options: argparse.Namespace, folder: Path, arguments: list[str]) -> list[Any]:
    shape = SHAPES[options.shape]
    if options.layers is not None:
        shape = replace(shape, num_layers=options.layers)
    make_model(folder / "model.gguf", shape)
    for times in {1, *options.gpus}:
        write_w3(folder / f"w3x{times}.parquet", times, options.prompts)
    alone = run_apart(Run(0, 1), folder, arguments)
    rows = [alone]
    num_rows = pq.read_metadata(folder / "w3x1.parquet").num_rows
    for num_gpus in options.gpus:
        times = [num_gpus] if options.no_same_data else [num_gpus, 1]
        for run in (Run(num_gpus, number) for number in dict.fromkeys(times)):
            row = run_apart(run, folder, arguments)
            row["hash_of_w3"] = hash_of(folder / f"{run.name}.parquet", num_rows)
            row["same_hash"] = row["hash_of_w3"] == alone["run_hash"]
            for name in ("tokens_per_s", "steady_tokens_per_s"):
                if row[name] and alone[name]:
                    row[f"{name}_ratio"] = round(row[name] / alone[name], 3)
            rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'run':20}{'wall s':>8}{'start':>7}{'tokens/s':>10}{'x':>7}{'steady':>10}{'x':>7}  bits"
    )
    for row in rows:
        rates = ""
        for name in ("tokens_per_s", "steady_tokens_per_s"):
            ratio = row.get(f"{name}_ratio")
            rates += f"{row[name] or 0:>10,.0f}{f'{ratio:.3f}' if ratio else '':>7}"
        bits = {None: "", True: "equal", False: "DIFFERENT"}[row.get("same_hash")]
        bits += f", {row['errors']} ERRORS" if row["errors"] else ""
        print(f"{row['run']:20}{row['wall_s']:>8}{row['start_s']:>7.1f}{rates}  {bits}")


def num_gpus_here() -> int:
    listed = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, text=True, check=False)
    return max(2, listed.stdout.count("GPU "))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gpus", type=int, nargs="+", help="numbers of workers; default: all GPUs")
    parser.add_argument("--shape", choices=SHAPES, default="phi3")
    parser.add_argument("--layers", type=int, help="other than the true number")
    parser.add_argument("--prompts", type=int, help="only w3's first so many")
    parser.add_argument("--engine", choices=("cuda", "numpy"), default="cuda")
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--no-same-data", action="store_true", help="without w3x1 over k GPUs")
    parser.add_argument("--models", type=Path, help="folder for model, input and output; kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    engine = EngineOptions(options.engine, max_model_len=2048, max_num_seqs=options.max_num_seqs)
    if options.child:
        how, times = options.child.split("-w3x")
        num_workers = int(how.removeprefix("ray-")) if how != "one-process" else 0
        print(json.dumps(run_here(Run(num_workers, int(times)), options.models, engine)))
        return 0
    options.gpus = options.gpus or [num_gpus_here()]
    arguments = ["--engine", options.engine]
    if options.max_num_seqs:
        arguments += ["--max-num-seqs", str(options.max_num_seqs)]
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as temporary:
        folder = options.models or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = compare(options, folder, arguments)
    write_results(options.results, "scale-out", choose_engine(options.engine), {"rows": rows})
    show(rows)
    good = all(row.get("same_hash", True) and not row["errors"] for row in rows)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
