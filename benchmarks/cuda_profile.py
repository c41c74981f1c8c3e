"""A workload's steps kernel by kernel, as the GPU's own activity records have them.

    python benchmarks/cuda_profile.py [--shapes phi3] [--workloads w1 w2 w3 w4 w5] [--steps 20]

Steps in the middle of a run, replayed from graphs where they always are (`cuda_step_ops.py`
launches them one by one, which short kernels do not bear). Recording slows the host, so the time
between kernels is above that of an unwatched run; what a kernel takes is not. Kernels that start
before the one before them has ended (programmatic dependent launch) include their wait. Needs
torch, whose profiler reads CUPTI.
"""

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from random_models import model_file, models_folder, open_engine
from results_file import RESULTS, write_results
from true_shapes import SHAPES
from workloads import WORKLOADS, Workload

from orcd_batch.engine_factory import BuiltEngine, choose_engine

from cuda_workloads import requests, run  # isort: skip

_NUM_SHOWN = 18


def records(trace: Path) -> list[tuple[str, float, float]]:
    """Name, start and end in µs of every kernel, copy and fill of a Chrome trace, by start."""
    events = json.loads(trace.read_text())["traceEvents"]
    found = [
        (event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return sorted(found, key=lambda record: record[1])


def summary(found: list[tuple[str, float, float]], num_steps: int) -> dict[str, Any]:
    """By kernel, ms a step, calls a step and µs a call; and the time in which none runs."""
    calls: dict[str, list[float]] = defaultdict(list)
    busy, last = 0.0, found[0][1]
    for name, start, end in found:
        calls[name].append(end - start)
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    span = last - found[0][1]
    kernels = {
        name: {
            "ms_per_step": round(sum(times) / num_steps / 1e3, 4),
            "calls_per_step": round(len(times) / num_steps, 2),
            "us_per_call": round(sum(times) / len(times), 2),
        }
        for name, times in sorted(calls.items(), key=lambda item: -sum(item[1]))
    }
    return {
        "steps": num_steps,
        "ms_per_step": round(span / num_steps / 1e3, 4),
        "ms_without_kernel": round((span - busy) / num_steps / 1e3, 4),
        "kernels": kernels,
    }


def profile(
    built: BuiltEngine, workload: Workload, after: int, num_steps: int, trace: Path
) -> dict[str, Any]:
    """So many steps of a run, after its first ones."""
    engine = built.engine
    run(built, requests(workload, 0, most_new=6))
    for request in requests(workload, 1):
        engine.add(request)
    for _ in range(after):
        engine.step()
    built.ops.device.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(num_steps):
            engine.step()
        built.ops.device.synchronize()
    while engine.has_unfinished:
        engine.step()
    profiler.export_chrome_trace(str(trace))
    return summary(records(trace), num_steps)


def show(name: str, found: dict[str, Any]) -> None:
    print(f"{name}: {found['ms_per_step']:.3f} ms a step, {found['ms_without_kernel']:.3f} between")
    for kernel, row in list(found["kernels"].items())[:_NUM_SHOWN]:
        print(
            f"  {kernel[:58]:58} {row['ms_per_step']:8.3f} ms {row['calls_per_step']:7.1f} x "
            f"{row['us_per_call']:8.1f} µs"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["phi3"])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--after", type=int, default=40, help="steps before the recorded ones")
    parser.add_argument("--steps", type=int, default=20, help="how many to record")
    parser.add_argument("--models", type=Path, help="folder for the model files; kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    choice = choose_engine("cuda")
    torch.cuda.init()
    found = []
    with models_folder(options.models) as folder, tempfile.TemporaryDirectory() as temporary:
        trace = Path(temporary) / "trace.json"
        for shape in options.shapes:
            with open_engine(model_file(shape, folder), choice) as built:
                for name in options.workloads:
                    row = profile(built, WORKLOADS[name](), options.after, options.steps, trace)
                    show(f"{shape} {name}", row)
                    found.append({"shape": shape, "workload": name, **row})
    write_results(options.results, "profile", choice, {"profiles": found})


if __name__ == "__main__":
    main()
