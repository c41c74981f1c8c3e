"""A fused sweep beside its jobs run alone, on the numpy engine: time, and every column's bits.

    python benchmarks/sweep.py [--prompts 64] [--max-tokens 16] [--singles 30] [--folder DIR]

The command line is run as a user runs it, in processes of their own, with the demo model. Single
jobs are run before and after the sweep, half of them each, so that a busy machine slows both alike;
with fewer than all of them, the time of all is estimated from their mean.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
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
    """Seconds of a process, from its start to its end; on a busy machine cpu_s says more."""

    wall_s: float
    cpu_s: float

    def __str__(self) -> str:
        return f"{self.wall_s:.1f} s (CPU {self.cpu_s:.1f} s)"


def run(folder: Path, *overrides: str) -> tuple[Any, Cost]:
    """The document and the cost of one command line."""
    command = [
        sys.executable, "-m", "orcd_batch", "model=smollm2",
        f"model.path={ROOT / 'models' / 'SmolLM2-135M-Instruct.Q4_1.gguf'}",
        "data=prompts.parquet", "engine=numpy", *overrides,
    ]  # fmt: skip
    start, cpu_before = time.perf_counter(), cpu_of_children()
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"exit code {done.returncode}: {done.stderr[-2000:]}")
    cost = Cost(time.perf_counter() - start, cpu_of_children() - cpu_before)
    return json.loads(done.stdout.splitlines()[-1]), cost


def cpu_of_children() -> float:
    """CPU seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def same_rows(one: Path, other: Path) -> bool:
    """Whether two outputs agree in every column of every row."""
    return bool(pq.read_table(one).equals(pq.read_table(other)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--singles", type=int, default=30, help="how many jobs to run alone too")
    parser.add_argument("--folder", type=Path, help="keep the outputs here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(options.folder or Path(temporary), options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(folder / "prompts.parquet", options.prompts)
    common = f"sampling.max_tokens={options.max_tokens}"
    jobs = list(product(TEMPERATURES, SEEDS))
    chosen = [n * len(jobs) // options.singles for n in range(options.singles)]
    costs: list[Cost] = []

    def run_alone(numbers: list[int]) -> None:
        for number in numbers:
            temperature, seed = jobs[number]
            document, took = run(
                folder, common, f"sampling.temperature={temperature}", f"sampling.seed={seed}",
                f"output=alone-{number}.parquet", "overwrite=true",
            )  # fmt: skip
            costs.append(took)
            print(f"alone {number:2}: {took}, {document['tokens']} tokens", flush=True)

    run_alone(chosen[::2])
    sweep, fused = run(
        folder, "--multirun", common, f"sampling.temperature={','.join(TEMPERATURES)}",
        f"sampling.seed=range({len(SEEDS)})", "overwrite=true",
    )  # fmt: skip
    tokens = sum(job["tokens"] for job in sweep)
    print(f"sweep of {len(jobs)}: {fused}, {tokens} tokens", flush=True)
    run_alone(chosen[1::2])
    share = len(jobs) / len(costs)
    alone = Cost(share * sum(c.wall_s for c in costs), share * sum(c.cpu_s for c in costs))
    equal = sum(
        same_rows(folder / f"alone-{number}.parquet", folder / sweep[number]["output"])
        for number in chosen
    )
    print(
        f"{options.prompts} prompts x {len(jobs)} jobs, max_tokens={options.max_tokens}: "
        f"fused {fused}, {len(jobs)} single runs {alone}, {len(chosen)} of them measured; ratio "
        f"{fused.wall_s / alone.wall_s:.3f} (CPU {fused.cpu_s / alone.cpu_s:.3f}); "
        f"{equal} of {len(chosen)} outputs equal in every column"
    )
    sys.exit(0 if equal == len(chosen) else 1)


if __name__ == "__main__":
    main()
