"""What `make bench` runs on a GPU machine: every benchmark in turn, in under eight minutes.

    python benchmarks/suite.py [--only ops linear] [--models /dev/shm]

The models are written once. A script's lines pass through; what it measured is stored in
benchmarks/results/, one JSON each. A script that fails is named at the end (exit code 1); the
others run all the same.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from random_models import model_file, models_folder
from results_file import RESULTS, write_results

from orcd_batch.engine_factory import choose_engine

HERE = Path(__file__).resolve().parent
# No single benchmark may hold up the others for longer.
TIMEOUT_S = 240


@dataclass(frozen=True, slots=True)
class Step:
    """One script. stores: it writes its own result, else its last line of stdout is stored.

    "{models}" in an argument stands for the folder of the model files.
    """

    name: str
    script: str
    args: tuple[str, ...] = ()
    stores: bool = True


STEPS = (
    Step("ops", "cuda_ops.py", stores=False),
    Step("linear", "cuda_linear.py", stores=False),
    Step("load", "cuda_load.py"),
    Step("start", "start_up.py", ("{models}/phi3.gguf", "--overrides", "engine=cuda")),
    Step("workloads", "cuda_workloads.py", ("--shapes", "phi3", "--models", "{models}")),
    Step(
        "qwen2_5",
        "cuda_workloads.py",
        ("--shapes", "qwen2_5", "--models", "{models}", "--workloads", "w1", "w2", "w3"),
    ),
)


def run(step: Step, models: Path, results: Path) -> bool:
    """Runs one script; False where it failed. Its results lie under the step's own name."""
    args = [arg.format(models=models) for arg in step.args]
    with tempfile.TemporaryDirectory() as name:
        kept = ["--results", name] if step.stores else []
        command = [sys.executable, str(HERE / step.script), *args, *kept]
        print(f"== {step.name}: {' '.join([step.script, *args])}", file=sys.stderr, flush=True)
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            print(f"{step.name}: not done after {TIMEOUT_S} s", flush=True)
            return False
        lines = done.stdout.splitlines()
        if done.returncode != 0 or not lines:
            print(*lines, f"{step.name}: exit code {done.returncode}", sep="\n", flush=True)
            return False
        if step.stores:
            print(*lines, sep="\n", flush=True)
            _keep(Path(name), results, step)
        else:
            print(*lines[:-1], sep="\n", flush=True)
            facts = {"script": step.script, "rows": json.loads(lines[-1])}
            write_results(results, step.name, choose_engine("cuda"), facts)
    return True


def _keep(found: Path, results: Path, step: Step) -> None:
    """Moves a script's results; runs of one script under two names keep both."""
    results.mkdir(parents=True, exist_ok=True)
    for path in found.glob("*.json"):
        name = path.name
        if step.name == "qwen2_5":
            name = name.replace("workloads", "workloads-qwen2_5")
        (results / name).write_text(path.read_text())
        print(f"stored in {results / name}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [step.name for step in STEPS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--models", type=Path, help="folder for the model files; kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    began = time.perf_counter()
    times: dict[str, Any] = {}
    failed = []
    with models_folder(options.models) as models:
        for step in (step for step in STEPS if step.name in options.only):
            for shape in ("phi3", "qwen2_5"):
                if any(shape in arg for arg in step.args):
                    model_file(shape, models)
            started = time.perf_counter()
            if not run(step, models, options.results):
                failed.append(step.name)
            times[step.name] = round(time.perf_counter() - started, 1)
    total = round(time.perf_counter() - began, 1)
    print(", ".join(f"{name} {seconds} s" for name, seconds in times.items()), f"; {total} s")
    print(json.dumps({"seconds": total, "steps": times, "failed": failed}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
