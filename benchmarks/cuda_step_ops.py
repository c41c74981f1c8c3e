"""Where a step's GPU time goes, op by op: full prefill steps, wide decode steps, samples'.

    python benchmarks/cuda_step_ops.py [--shapes phi3 qwen2_5] [--cases "decode 256 at 384"]

Steps run as single launches with events around every op, so the sums are a little above a
replayed step's; ops shorter than their launch are not to be trusted here (see cuda_ops.py).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from random_models import model_file, models_folder, open_engine
from results_file import RESULTS, write_results
from true_shapes import SHAPES
from workloads import Work, Workload

from orcd_batch.backend.cuda.op_times import OpTimes
from orcd_batch.engine_factory import BuiltEngine, choose_engine

from cuda_workloads import requests, run  # isort: skip

# Sequences, tokens of each prompt, new tokens, how often, and samples of each prompt (which are
# drawn at temperature 1).
CASES = {
    "prefill 8 x 1,024": (8, 1024, 1, 2, 1),
    "prefill 1 x 4,000": (1, 4000, 1, 2, 1),
    "decode 256 at 384": (256, 370, 40, 1, 1),
    "decode 34 x 30 at 512 + 64": (1020, 512, 128, 1, 30),
}


def watch_products(ops: Any, times: OpTimes, shapes: set[tuple[int, ...]]) -> None:
    """Times every weight's shape under a name of its own."""
    timed = {
        (name, shape): times.timed(f"{name} {shape[0]} x {shape[1]}", getattr(ops, name))
        for name in ("linear", "linear_add", "gated_linear", "logits")
        for shape in shapes
    }
    times.watch(ops)
    ops.gated_linear = lambda x, weight: timed["gated_linear", weight.shape](x, weight)
    ops.linear = lambda x, weight: timed["linear", weight.shape](x, weight)
    ops.linear_add = lambda x, weight, y: timed["linear_add", weight.shape](x, weight, y)
    ops.logits = lambda x, weight: timed["logits", weight.shape](x, weight)


def measure(built: BuiltEngine, name: str, repeat: int) -> dict[str, Any]:
    num_seqs, num_in, num_out, times_over, samples = CASES[name]
    works = [
        Work([(7 * i + 13 * j) % 30000 for j in range(num_in)], num_out)
        for i in range(num_seqs // samples)
        for _ in range(samples)
    ]
    workload = Workload(name, name, works, samples, temperature=float(samples > 1))
    ops, engine = built.ops, built.engine
    names = set(vars(ops))
    run(built, requests(workload, repeat, most_new=1))
    times = OpTimes(ops.device)
    weights = engine.weights
    first = weights.layers[0]
    linears = (first.attn_qkv, first.attn_output, first.ffn_gate_up, first.ffn_down, weights.output)
    watch_products(ops, times, {weight.shape for weight in linears})
    for again in range(times_over):
        todo = requests(workload, repeat + again + 1)
        for request in todo:
            engine.add(request)
        if num_out > 1:
            while engine.scheduler.waiting or any(
                not s.is_decoding for s in engine.scheduler.running
            ):
                engine.step()
            ops.device.synchronize()
            times.summary()
            times.clear()
        steps = engine.num_steps
        while engine.has_unfinished:
            engine.step()
        steps = engine.num_steps - steps
    found = times.summary()
    for added in set(vars(ops)) - names:
        delattr(ops, added)
    total = sum(op["seconds"] for op in found.values())
    steps *= times_over
    rows = {
        op: {
            "ms_per_step": round(v["seconds"] / steps * 1e3, 4),
            "us_per_call": round(v["us_per_call"], 2),
        }
        for op, v in sorted(found.items(), key=lambda item: -item[1]["seconds"])
    }
    print(f"{name}: {total / steps * 1e3:.2f} ms a step", file=sys.stderr)
    for op, row in rows.items():
        print(f"  {op:24} {row['ms_per_step']:9.3f} ms {row['us_per_call']:9.1f} us a call",
              file=sys.stderr)  # fmt: skip
    return {"case": name, "steps": steps, "ms_per_step": round(total / steps * 1e3, 3), "ops": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["phi3"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--models", type=Path, help="folder for the model files; kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    choice = choose_engine("cuda")
    found = []
    with models_folder(options.models) as folder:
        for shape in options.shapes:
            with open_engine(model_file(shape, folder), choice, max_num_seqs=1024) as built:
                rows = [measure(built, case, 10 * i) for i, case in enumerate(options.cases)]
            found.append({"shape": shape, "cases": rows})
    write_results(options.results, "step-ops", choice, {"shapes": found})
    print(json.dumps({"shapes": [entry["shape"] for entry in found]}))


if __name__ == "__main__":
    main()
