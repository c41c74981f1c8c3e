"""A fused sweep beside its jobs run alone: time, and every column's bits.

    python benchmarks/sweep.py [--prompts 64] [--max-tokens 16] [--singles 30] [--folder DIR]
                               [--model phi3 --path FILE.gguf --engine cuda] [--results DIR]

The command line is run as a user runs it, in processes of their own, by default with the demo model
on the numpy engine. Single jobs are run before and after the sweep, half of them each, so that a
busy machine slows both alike; with fewer, the time of all is estimated from their mean. `load` is
how many processes wanted to run in the minute before, those of this benchmark and all others.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from results_file import write_results

from orcd_batch.engine_factory import choose_engine

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPERATURES = ("0.0", "0.7", "1.0")
SEEDS = range(10)
_STYLES = ("", "Be brief. ", "Think first. ", "Answer politely. ")


def write_prompts(path: Path, num_prompts: int) -> None:
    """The example's prompts, each in several wordings."""
    examples = pq.read_table(ROOT / "examples" / "prompts.parquet", columns=["prompt"])
    texts = [style + text for style in _STYLES for text in examples["prompt"].to_pylist()]
    repeated = [texts[n % len(texts)] + "!" * (n // len(texts)) for n in range(num_prompts)]
    pq.write_table(pa.table({"id": list(range(num_prompts)), "prompt": repeated}), path)


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a process, from its start to its end; on a busy machine cpu_s says more.

    load: of the machine in the minute before.
    """

    wall_s: float
    cpu_s: float
    load: float

    def __str__(self) -> str:
        return f"{self.wall_s:.1f} s (CPU {self.cpu_s:.1f} s, load {self.load:.1f})"


def run(folder: Path, *overrides: str) -> tuple[Any, Cost]:
    """The document and the cost of one command line."""
    command = [sys.executable, "-m", "orcd_batch", "data=prompts.parquet", *overrides]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    load, start, cpu_before = os.getloadavg()[0], time.perf_counter(), cpu_of_children()
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"exit code {done.returncode}: {done.stderr[-2000:]}")
    cost = Cost(time.perf_counter() - start, cpu_of_children() - cpu_before, load)
    return json.loads(done.stdout.splitlines()[-1]), cost


def cpu_of_children() -> float:
    """CPU seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def same_rows(one: Path, other: Path) -> bool:
    """Whether two outputs agree in every column of every row."""
    return bool(pq.read_table(one).equals(pq.read_table(other)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--singles", type=int, default=30, help="how many jobs to run alone too")
    parser.add_argument("--model", default="smollm2", help="as in model=")
    parser.add_argument("--path", type=Path, default=MODEL, help="its file")
    parser.add_argument("--engine", default="numpy", choices=("numpy", "cuda"))
    parser.add_argument("--folder", type=Path, help="keep the outputs here")
    parser.add_argument("--results", type=Path, help="store the figures as JSON in this folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        facts = measure(options.folder or Path(temporary), options)
    if options.results:
        write_results(options.results, "sweep", choose_engine(options.engine), facts)
    sys.exit(0 if facts["num_equal"] == facts["num_alone"] else 1)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Runs everything; what was found, as the results file has it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(folder / "prompts.parquet", options.prompts)
    common = (
        *(f"model={options.model}", f'model.path="{options.path.resolve()}"'),
        *(f"engine={options.engine}", f"sampling.max_tokens={options.max_tokens}"),
    )
    jobs = list(product(TEMPERATURES, SEEDS))
    chosen = [n * len(jobs) // options.singles for n in range(options.singles)]
    costs: dict[int, Cost] = {}

    def run_alone(numbers: list[int]) -> None:
        for number in numbers:
            temperature, seed = jobs[number]
            document, took = run(
                folder, *common, f"sampling.temperature={temperature}", f"sampling.seed={seed}",
                f"output=alone-{number}.parquet", "overwrite=true",
            )  # fmt: skip
            costs[number] = took
            print(f"alone {number:2}: {took}, {document['tokens']} tokens", flush=True)

    run_alone(chosen[::2])
    sweep, fused = run(
        folder, "--multirun", *common, f"sampling.temperature={','.join(TEMPERATURES)}",
        f"sampling.seed=range({len(SEEDS)})", "overwrite=true",
    )  # fmt: skip
    tokens = sum(job["tokens"] for job in sweep)
    print(f"sweep of {len(jobs)}: {fused}, {tokens} tokens", flush=True)
    run_alone(chosen[1::2])
    equal = sum(
        same_rows(folder / f"alone-{number}.parquet", folder / sweep[number]["output"])
        for number in chosen
    )
    return summary(options, fused, costs, tokens, equal)


def summary(
    options: argparse.Namespace, fused: Cost, costs: dict[int, Cost], tokens: int, equal: int
) -> dict[str, Any]:
    """Prints one sentence, and gives the same as plain values. costs: of the jobs run alone."""
    num_jobs = len(TEMPERATURES) * len(SEEDS)
    share = num_jobs / len(costs)
    wall_s = share * sum(cost.wall_s for cost in costs.values())
    cpu_s = share * sum(cost.cpu_s for cost in costs.values())
    print(
        f"{options.prompts} prompts x {num_jobs} jobs, max_tokens={options.max_tokens}: fused "
        f"{fused}, {num_jobs} single runs {wall_s:.1f} s (CPU {cpu_s:.1f} s), {len(costs)} of them "
        f"measured; ratio {fused.wall_s / wall_s:.3f} (CPU {fused.cpu_s / cpu_s:.3f}); "
        f"{equal} of {len(costs)} outputs equal in every column"
    )
    return {
        "num_prompts": options.prompts,
        "max_tokens": options.max_tokens,
        "num_jobs": num_jobs,
        "num_tokens": tokens,
        "num_alone": len(costs),
        "num_equal": equal,
        "ratio": round(fused.wall_s / wall_s, 4),
        "cpu_ratio": round(fused.cpu_s / cpu_s, 4),
        "fused": asdict(fused),
        "all_alone": {"wall_s": wall_s, "cpu_s": cpu_s},
        "alone": {str(number): asdict(cost) for number, cost in sorted(costs.items())},
    }


if __name__ == "__main__":
    main()
