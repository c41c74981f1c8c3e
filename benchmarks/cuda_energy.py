"""Joules of a decode step's parts, each alone: what the power limit leaves room for.

    python benchmarks/cuda_energy.py PHI3.gguf [--rows 256 1920]

Run on a GPU machine with nvidia-smi; PHI3.gguf as `benchmarks/make_model.py phi3 PHI3.gguf` writes
it. Beside copying memory: attention in the middle of w2 and of w4, and the four products of a layer
in the way that the engine chose, the weights of all layers in turn. The last lines add up what a
step of w4 takes at least: its products at the joules per flop of the best of them, its bytes at
those of w2's attention, which reads at the memory's limit.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from card_state import card_state
from cuda_ops import PHI3, Bench
from random_models import open_engine
from results_file import RESULTS, write_results

from orcd_batch.backend.cuda.array import FP16, FP32, DeviceArray
from orcd_batch.backend.cuda.driver import call
from orcd_batch.backend.cuda.graph import time_lasting
from orcd_batch.engine_factory import BuiltEngine, choose_engine

SETTLE_S, MEASURED_S = 0.8, 1.4
COPIED_BYTES = 4 << 30
PROMPTS, SAMPLES, SHARED_BLOCKS = 64, 30, 8
KV_BYTES_PER_TOKEN = 2 * 2 * PHI3[1] * PHI3[2]  # of a layer


@dataclass(frozen=True)
class Case:
    """queue() queues the op `runs` times; bytes and flops are those of one."""

    name: str
    queue: Callable[[], object]
    runs: int
    num_bytes: int = 0
    flops: int = 0


def measure(bench: Bench, case: Case) -> dict[str, Any]:
    with card_state() as card:
        seconds = time_lasting(bench.ops.device, case.queue, SETTLE_S, MEASURED_S) / case.runs
    joules = seconds * card["watts"]
    row = {
        "what": case.name,
        "us": round(seconds * 1e6, 2),
        "watts": card["watts"],
        "sm_mhz": card["sm_mhz"],
        "mj": round(joules * 1e3, 3),
    }
    if case.num_bytes:
        row["gb_per_s"] = round(case.num_bytes / seconds / 1e9)
        row["pj_per_byte"] = round(joules / case.num_bytes * 1e12, 1)
    if case.flops:
        row["tflops"] = round(case.flops / seconds / 1e12, 1)
        row["pj_per_flop"] = round(joules / case.flops * 1e12, 3)
    print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return row


def copy(bench: Bench) -> Case:
    from cuda.bindings import driver

    ends = [bench.ops.device.allocate(COPIED_BYTES, "staging").ptr for _ in range(2)]
    handle = bench.ops.device.stream.handle

    def queue() -> None:
        call(driver.cuMemcpyDtoDAsync(ends[1], ends[0], COPIED_BYTES, handle))

    return Case("copy of 4 GiB, read and write", queue, 1, 2 * COPIED_BYTES)


def attention(
    bench: Bench, name: str, contexts: list[int], samples: int = 1, num_shared: int = 0
) -> Case:
    sequences = [(context, 1) for context in contexts]
    q = bench.normal(len(sequences), PHI3[0], PHI3[2], dtype=FP16)
    cache, batch = bench.cache(PHI3, sequences, samples, num_shared)
    num_keys = sum(contexts) - num_shared * 64 * (len(contexts) - len(contexts) // samples)
    runs = 16

    def queue() -> None:
        for _ in range(runs):
            bench.ops.attention(q, cache, batch, 0)

    return Case(name, queue, runs, num_keys * KV_BYTES_PER_TOKEN)


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
    found = []
    for name, run in ways.items():
        weights = [getattr(layer, name) for layer in layers]
        size = int(np.prod(weights[0].shape))
        found.append(
            Case(
                f"{name}, {num_rows} rows",
                lambda run=run, weights=weights: [run(w) for w in weights],
                len(weights),
                2 * size,
                2 * num_rows * size,
            )
        )
    return found


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
    rng = np.random.default_rng(3)
    own = rng.integers(1, 128, PROMPTS * SAMPLES).tolist()
    rows = [measure(bench, copy(bench))]
    bench.free()
    w2 = attention(bench, "attention of w2: 256 x 256..511", rng.integers(256, 512, 256).tolist())
    rows.append(measure(bench, w2))
    bench.free()
    shared = 64 * SHARED_BLOCKS
    contexts = [shared + n for n in own]
    name = f"attention of w4: {PROMPTS} x {SAMPLES}, {shared} shared + 1..127"
    w4 = attention(bench, name, contexts, SAMPLES, SHARED_BLOCKS)
    rows.append(measure(bench, w4))
    bench.free()
    with open_engine(options.model, choice, kv_cache_bytes=4_000_000_000) as built:
        # One stream: the products' launches are timed on the engine's own.
        bench.ops.device.stream = built.ops.device.stream
        for num_rows in options.rows:
            rows += [measure(bench, case) for case in products(bench, built, num_rows)]
            bench.free()
        least = step_floor(built, rows, w4.num_bytes)
    print(", ".join(f"{name} {value}" for name, value in least.items()))
    write_results(options.results, "energy", choice, {"parts": rows, "w4_step_at_least": least})


def step_floor(built: BuiltEngine, rows: list[dict[str, Any]], kv_bytes: int) -> dict[str, float]:
    """Joules of a step of all of w4's samples where nothing takes more than the best found here,
    and milliseconds at the watts of its products."""
    num_rows = PROMPTS * SAMPLES
    weights = [w for layer in built.engine.weights.layers for w in
               (layer.attn_qkv, layer.attn_output, layer.ffn_gate_up, layer.ffn_down)]  # fmt: skip
    size = sum(int(np.prod(w.shape)) for w in (*weights, built.engine.weights.output))
    flop_j = min(row["pj_per_flop"] for row in rows if "pj_per_flop" in row) * 1e-12
    byte_j = next(row["pj_per_byte"] for row in rows if "of w2" in row["what"]) * 1e-12
    watts = max(row["watts"] for row in rows)
    num_layers = len(built.engine.weights.layers)
    joules = 2 * num_rows * size * flop_j + num_layers * kv_bytes * byte_j
    return {
        "joules": round(joules, 2),
        "products_joules": round(2 * num_rows * size * flop_j, 2),
        "watts": watts,
        "ms": round(joules / watts * 1e3, 2),
    }


if __name__ == "__main__":
    main()
