"""The five workloads through the engine at true model shapes, against the card's limits.

    python benchmarks/cuda_workloads.py [--shapes phi3 qwen2_5] [--workloads w1 w2 w3 w4 w5]
        [--max-num-seqs 512 1024]

Loading and start-up are not counted; a short run before each workload compiles kernels and records
graphs. Per step: `gpu_ms` is the time between events around a step's launches, `idle_share` the
part of the time in which the GPU waits for the next launch. `card` says whether the power limit
held the clock down (card_state.py). Results go to benchmarks/results/.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from card_state import card_state
from random_models import model_file, models_folder, open_engine
from results_file import RESULTS, write_results
from true_shapes import SHAPES, Shape
from workloads import WORKLOADS, Workload, limit_s

from orcd_batch.collector import relaxed_collector
from orcd_batch.engine import Request, SamplingParams
from orcd_batch.engine_factory import BuiltEngine, choose_engine


class StepTimes:
    """Times of the engine's steps, from events on its stream and the host's clock."""

    def __init__(self, built: BuiltEngine) -> None:
        self._stream = built.ops.device.stream
        self._launch: Callable[..., Any] = built.ops.launch
        self._steps: list[tuple[int, int, float, Any, Any]] = []
        built.ops.launch = self._timed

    def clear(self) -> None:
        self._steps.clear()

    def summary(self) -> dict[str, Any]:
        """Over all steps; and of those in which every sequence decodes, the widest ones."""
        gpu = [end - start for *_, start, end in self._steps]
        pairs = zip(self._steps, self._steps[1:], strict=False)
        gaps = [max(after[3] - before[4], 0.0) for before, after in pairs]
        total = sum(gpu) + sum(gaps)
        decode = [i for i, step in enumerate(self._steps) if step[0] == step[1]]
        found: dict[str, Any] = {
            "steps": len(gpu),
            "decode_steps": len(decode),
            "gpu_s": round(total / 1e3, 4),
            "decode_gpu_s": round(sum(gpu[i] for i in decode) / 1e3, 4),
            "idle_share": round(sum(gaps) / total, 4),
        }
        if decode:
            widest = max(self._steps[i][0] for i in decode)
            steady = [i for i in decode if self._steps[i][0] == widest and i < len(gaps)]
            if steady:
                found["widest_decode"] = {
                    "num_seqs": widest,
                    "gpu_ms": round(statistics.median(gpu[i] for i in steady), 4),
                    "gap_ms": round(statistics.median(gaps[i] for i in steady), 4),
                    "launch_ms": round(statistics.median(self._steps[i][2] for i in steady), 4),
                    "idle_share": round(
                        sum(gaps[i] for i in steady) / sum(gpu[i] + gaps[i] for i in steady), 4
                    ),
                }
        return found

    def _timed(self, compute: Any, batch: Any, sampling: Any) -> Any:
        start, began = self._event(), time.perf_counter()
        launched = self._launch(compute, batch, sampling)
        ms = (time.perf_counter() - began) * 1e3
        sizes = len(batch.token_ids), len(batch.context_lens)
        self._steps.append((*sizes, ms, start, self._event()))
        return launched

    def _event(self) -> Any:
        from cuda.core import EventOptions

        return self._stream.record(options=EventOptions(timing_enabled=True))


def requests(workload: Workload, repeat: int, most_new: int | None = None) -> list[Request]:
    """The workload's samples; every repeat has other prompts, so that none is in the cache."""
    vocabulary = range(5, 32000)
    shifted: dict[int, tuple[int, ...]] = {}
    todo = []
    for index, work in enumerate(workload.works):
        prompt = shifted.setdefault(
            id(work), tuple(vocabulary[(token + 7919 * repeat) % 31995] for token in work.prompt)
        )
        num_new = min(work.num_new, most_new or work.num_new)
        params = SamplingParams(max_tokens=num_new, temperature=workload.temperature)
        todo.append(Request(index, prompt, params, stream=index))
    return todo


def run(built: BuiltEngine, todo: list[Request]) -> float:
    """Seconds until all are finished. Raises RuntimeError when one fails."""
    engine = built.engine
    started = time.perf_counter()
    for request in todo:
        engine.add(request)
    while engine.has_unfinished:
        for completion in engine.step():
            wanted = todo[int(str(completion.key))].params.max_tokens
            if completion.error or len(completion.token_ids) != wanted:
                raise RuntimeError(f"{completion.key}: {completion.error or 'ended early'}")
    return time.perf_counter() - started


def measure(built: BuiltEngine, shape: Shape, workload: Workload, repeats: int) -> dict[str, Any]:
    times = StepTimes(built)
    run(built, requests(workload, 0, most_new=6))
    seconds, steps = [], {}
    with card_state() as card:
        for repeat in range(1, repeats + 1):
            times.clear()
            todo = requests(workload, repeat)
            with relaxed_collector():  # as in a job
                seconds.append(run(built, todo))
            built.ops.device.synchronize()
            steps = times.summary()
    with suppress(AttributeError):
        del built.ops.launch
    median = statistics.median(seconds)
    limit = limit_s(workload, shape)
    row = {
        "workload": workload.name,
        "what": workload.what,
        "max_num_seqs": built.engine.max_num_seqs,
        "tokens_per_s": round(workload.num_counted / median, 1),
        "limit_tokens_per_s": round(workload.num_counted / limit, 1),
        "share_of_limit": round(limit / median, 4),
        "seconds": [round(s, 4) for s in seconds],
        "step_times": steps,
        "card": card,
    }
    print(json.dumps({"shape": shape.model_option, **row}), file=sys.stderr, flush=True)
    return row


def measure_shape(
    name: str, names: list[str], repeats: int, folder: Path, options: dict[str, Any]
) -> dict[str, Any]:
    path = model_file(name, folder)
    choice = choose_engine("cuda")
    rows = []
    started = time.perf_counter()
    with open_engine(path, choice, **options) as built:
        start_s = round(time.perf_counter() - started, 2)
        print(f"{name}: engine ready in {start_s} s", file=sys.stderr, flush=True)
        for workload in names:
            many = 3 if workload == "w1" else 1
            rows.append(measure(built, SHAPES[name], WORKLOADS[workload](), repeats * many))
    return {"shape": name, "start_s": start_s, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["phi3", "qwen2_5"])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=1, help="medians over so many (w1: 3 times)")
    parser.add_argument("--models", type=Path, help="folder for the model files; kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument(
        "--max-num-seqs",
        type=int,
        nargs="+",
        default=[None],
        help="one engine for each; default: its",
    )
    options = parser.parse_args()
    with models_folder(options.models) as folder:
        found = [
            measure_shape(
                shape,
                options.workloads,
                options.repeats,
                folder,
                {"graphs": not options.no_graphs, "max_num_seqs": max_num_seqs},
            )
            for shape in options.shapes
            for max_num_seqs in options.max_num_seqs
        ]
    what = "workloads-eager" if options.no_graphs else "workloads"
    write_results(options.results, what, choose_engine("cuda"), {"shapes": found})
    for entry in found:
        for row in entry["rows"]:
            print(
                f"{entry['shape']:8} {row['workload']} {row['tokens_per_s']:>10,.0f} tokens/s "
                f"({row['max_num_seqs']} sequences), "
                f"{row['share_of_limit']:.0%} of {row['limit_tokens_per_s']:,.0f}; GPU idle "
                f"{row['step_times']['idle_share']:.1%}"
            )


if __name__ == "__main__":
    main()
