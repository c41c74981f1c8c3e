"""Joules of a decode step's parts, each alone: what the power limit leaves room for.

    python benchmarks/cuda_energy.py PHI3.gguf [--rows 256 1920]

Run on a GPU machine; PHI3.gguf as `benchmarks/make_model.py phi3 PHI3.gguf` writes it. Each part is
replayed for MEASURED_S after SETTLE_S, and its watts come from the card's own energy counter (NVML)
over that time. The parts: attention in the middle of w2 and of w4, whose bytes are those of
queries, results, keys and values, a shared prompt's once; the four products of a layer in the way
that the engine chose, the weights of all layers in turn. The last line adds up a step of all of
w4's samples from the best of them: every product at the fewest joules per flop, attention's bytes
at w2's joules per byte, one after the other.
"""

import argparse
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cuda_ops import PHI3, Bench, Case
from random_models import open_engine
from results_file import RESULTS, write_results

from orcd_batch.backend.cuda.array import FP16, FP32, DeviceArray
from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.cuda.graph import time_lasting
from orcd_batch.backend.ops import BLOCK_SIZE
from orcd_batch.engine_factory import BuiltEngine, choose_engine

SETTLE_S, MEASURED_S = 0.7, 1.5
RUNS = 16
PROMPTS, SAMPLES, SHARED_BLOCKS = 64, 30, 8


class EnergyCounter:
    """The joules that a card has taken, as NVML counts them: in steps of some 20 to 100 ms, which
    a thread notes while the context is open."""

    def __init__(self, index: int) -> None:
        from cuda.bindings import nvml

        nvml.init_v2()
        self._nvml, self._card = nvml, nvml.device_get_handle_by_index_v2(index)
        self._steps: list[tuple[float, float]] = []
        self._done = threading.Event()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._note)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def watts(self, start: float, end: float) -> float:
        """The mean between two readings of time.perf_counter()."""
        return mean_watts(self._steps, start, end)

    def sm_mhz(self) -> int:
        return int(self._nvml.device_get_clock_info(self._card, self._nvml.ClockType.CLOCK_SM))

    def _note(self) -> None:
        before = -1.0
        while not self._done.wait(0.002):
            joules = self._nvml.device_get_total_energy_consumption(self._card) / 1e3
            if joules != before:
                self._steps.append((time.perf_counter(), joules))
                before = joules


def mean_watts(steps: Sequence[tuple[float, float]], start: float, end: float) -> float:
    """From the first to the last step of a counter, (seconds, joules), between start and end.

    Raises RuntimeError where there are not two.
    """
    between = [step for step in steps if start <= step[0] <= end]
    if len(between) < 2:
        raise RuntimeError(
            f"The energy counter moved {len(between)} times in {end - start:.2f} s: measure longer."
        )
    (began, first), (ended, last) = between[0], between[-1]
    return (last - first) / (ended - began)


def measure(device: Device, counter: EnergyCounter, case: Case) -> dict[str, Any]:
    """case.run(i) for i up to case.count is replayed."""

    def queue() -> None:
        for i in range(case.count):
            case.run(i)

    queue()
    device.synchronize()
    seconds = time_lasting(device, queue, SETTLE_S, MEASURED_S) / case.count
    end, mhz = time.perf_counter(), counter.sm_mhz()
    watts = counter.watts(end - MEASURED_S, end)
    joules = seconds * watts
    row = {
        "what": case.name,
        "us": round(seconds * 1e6, 2),
        "watts": round(watts, 1),
        "sm_mhz": mhz,
        "mj": round(joules * 1e3, 3),
    }
    if case.num_bytes:
        row["bytes"] = case.num_bytes
        row["gb_per_s"] = round(case.num_bytes / seconds / 1e9)
        row["pj_per_byte"] = round(joules / case.num_bytes * 1e12, 1)
    else:
        row["tflops"] = round(case.flops / seconds / 1e12, 1)
        row["pj_per_flop"] = round(joules / case.flops * 1e12, 3)
    print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return row


def decode_attention(bench: Bench, counter: EnergyCounter) -> list[dict[str, Any]]:
    """Of w2 and of w4, in the middle of their decoding."""
    rng = np.random.default_rng(3)
    shared = BLOCK_SIZE * SHARED_BLOCKS
    w2 = [(int(context), 1) for context in rng.integers(256, 512, 256)]
    w4 = [(shared + int(own), 1) for own in rng.integers(1, 128, PROMPTS * SAMPLES)]
    name = f"attention of w4, {PROMPTS} x {SAMPLES}, {shared} shared + 1..127"
    cases = chain(
        bench.attention("attention of w2, 256..511", PHI3, w2),
        bench.attention(name, PHI3, w4, SAMPLES, SHARED_BLOCKS),
    )
    # One cache of either is far beyond the L2 cache; so many runs are one replay.
    return [
        measure(bench.ops.device, counter, replace(case, run=partial(_first, case), count=RUNS))
        for case in cases
    ]


def _first(case: Case, _: int) -> object:
    return case.run(0)


def products(bench: Bench, built: BuiltEngine, num_rows: int) -> list[Case]:
    layers, ops = built.engine.weights.layers, built.ops
    hidden, ffn = layers[0].ffn_gate_up.shape[1], layers[0].ffn_down.shape[1]
    x, gated = (bench.normal(num_rows, k, dtype=FP16) for k in (hidden, ffn))
    residual = bench.normal(num_rows, hidden, dtype=FP32)
    ways: dict[str, Callable[[DeviceArray], object]] = {
        "attn_qkv": lambda w: ops.linear(x, w),
        "attn_output": lambda w: ops.linear_add(x, w, residual),
        "ffn_gate_up": lambda w: ops.gated_linear(x, w),
        "ffn_down": lambda w: ops.linear_add(gated, w, residual),
    }

    def case(name: str, run: Callable[[DeviceArray], object]) -> Case:
        weights = [getattr(layer, name) for layer in layers]
        size = math.prod(weights[0].shape)
        flops = 2 * num_rows * size
        return Case(f"{name}, {num_rows} rows", 0, lambda i: run(weights[i]), len(weights), flops)

    return [case(name, run) for name, run in ways.items()]


def step_of_the_best(built: BuiltEngine, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Joules of a step of all of w4's samples, and milliseconds at the watts of its products.

    rows: first attention of w2, then of w4, then products.
    """
    w2, w4, *products = rows
    layers = built.engine.weights.layers
    names = ("attn_qkv", "attn_output", "ffn_gate_up", "ffn_down")
    size = sum(math.prod(getattr(layer, name).shape) for layer in layers for name in names)
    size += math.prod(built.engine.weights.output.shape)
    best = min(products, key=lambda row: row["pj_per_flop"])
    product_j = 2 * PROMPTS * SAMPLES * size * best["pj_per_flop"] * 1e-12
    joules = product_j + len(layers) * w4["bytes"] * w2["pj_per_byte"] * 1e-12
    return {
        "joules": round(joules, 2),
        "products_joules": round(product_j, 2),
        "watts": best["watts"],
        "ms": round(joules / best["watts"] * 1e3, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1920])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    choice = choose_engine("cuda")
    bench = Bench()
    with EnergyCounter(bench.ops.device.index) as counter:
        rows = decode_attention(bench, counter)
        with open_engine(options.model, choice, kv_cache_bytes=4_000_000_000) as built:
            for num_rows in options.rows:
                cases = products(bench, built, num_rows)
                rows += [measure(built.ops.device, counter, case) for case in cases]
                bench.free()
            step = step_of_the_best(built, rows)
    bench.ops.close()
    print("a step of w4 of the best:", ", ".join(f"{name} {value}" for name, value in step.items()))
    write_results(options.results, "energy", choice, {"parts": rows, "w4_step_of_the_best": step})


if __name__ == "__main__":
    main()
