"""Greedy decoding on the numpy engine, beside the floor set by its own matrix products.

    python benchmarks/numpy_decode.py [MODEL.gguf] [--sequences 16] [--prompt 32] [--steps 40]

Each round times one engine step and, right after it, the same step's bare matrix products twice:
as plain `x @ weight.T` with BLAS's own threads, and in the engine's tiles. The three alternate, so
that a busy machine slows all of them alike; the share compares medians of the same minutes.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from orcd_batch.backend.numpy_linear import PanelWeight
from orcd_batch.backend.numpy_threads import available_cpus
from orcd_batch.checkpoint import GGUFFile, read_model_config
from orcd_batch.config import EngineOptions
from orcd_batch.engine import Engine, Request, SamplingParams
from orcd_batch.engine_factory import BuiltEngine, OpenModel, build_engine, choose_engine

# BLAS's own threads go on spinning this long after a call and would slow down what comes next.
_BLAS_REST_S = 0.1
DEFAULT_MODEL = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def load(path: Path, num_sequences: int) -> BuiltEngine:
    with GGUFFile.open(path) as gguf:
        source = OpenModel(gguf, read_model_config(gguf))
        options = EngineOptions(kind="numpy", max_num_seqs=num_sequences, max_model_len=1024)
        return build_engine(source, options, choose_engine("numpy"))


def linears(engine: Engine) -> list[PanelWeight]:
    """Every weight one decode step multiplies with, in order."""
    names = ("attn_qkv", "attn_output", "ffn_gate_up", "ffn_down")
    layers = engine.weights.layers
    return [getattr(layer, name) for layer in layers for name in names] + [engine.weights.output]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def fill(engine: Engine, num_sequences: int, num_prompt: int, num_steps: int) -> None:
    """Starts the sequences and runs until all of them decode."""
    generator = np.random.default_rng(0)
    params = SamplingParams(max_tokens=num_steps, ignore_eos=True)
    for index in range(num_sequences):
        prompt = generator.integers(1000, engine.config.vocab_size, num_prompt).tolist()
        engine.add(Request(index, tuple(prompt), params))
    while engine.num_waiting or any(
        sequence.num_uncomputed_tokens > 1 for sequence in engine.scheduler.running
    ):
        engine.step()


def measure(built: BuiltEngine, num_sequences: int, num_steps: int) -> dict[str, list[float]]:
    engine, ops = built.engine, built.ops
    weights = linears(engine)
    rows = [weight.rows[: weight.num_rows] for weight in weights]
    inputs = {
        size: np.random.default_rng(size).standard_normal((num_sequences, size), np.float32)
        for size in {w.rows.shape[1] for w in weights}
    }

    def in_tiles() -> None:
        for weight in weights:
            ops.linear(inputs[weight.rows.shape[1]], weight)

    def in_blas() -> None:
        for weight in rows:
            np.matmul(inputs[weight.shape[1]], weight.T)

    times: dict[str, list[float]] = {"step": [], "tiles": [], "blas": []}
    for _ in range(num_steps):
        times["step"].append(seconds(engine.step))
        times["tiles"].append(seconds(in_tiles))
        with threadpool_limits(available_cpus(), user_api="blas"):
            times["blas"].append(seconds(in_blas))
        time.sleep(_BLAS_REST_S)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    with load(options.model, options.sequences) as built:
        fill(built.engine, options.sequences, options.prompt, options.steps + 8)
        for _ in range(3):
            built.engine.step()
        report(measure(built, options.sequences, options.steps), built, options.sequences)


def report(times: dict[str, list[float]], built: BuiltEngine, num_sequences: int) -> None:
    products = sum(2 * weight.rows.size for weight in linears(built.engine)) * num_sequences
    streamed = sum(weight.nbytes for weight in linears(built.engine))
    print(
        f"{built.config.name}: {num_sequences} sequences, {built.ops.num_threads} threads, "
        f"{built.ops.blas_kernel or 'unknown'} kernels"
    )
    step = statistics.median(times["step"])
    for name, label in (
        ("step", "engine step"),
        ("tiles", "bare products, the engine's tiles"),
        ("blas", "bare products, x @ W.T in BLAS"),
    ):
        middle, best = statistics.median(times[name]), min(times[name])
        print(
            f"{label:34} {middle * 1e3:7.1f} ms (best {best * 1e3:6.1f})  "
            f"{num_sequences / middle:6.1f} tok/s (best {num_sequences / best:6.1f})  "
            f"{products / middle / 1e9:6.1f} GFLOP/s  {streamed / middle / 1e9:5.1f} GB/s"
        )
    for name in ("tiles", "blas"):
        floor = statistics.median(times[name])
        print(f"share of the {name} floor: {floor / step:.0%}")


if __name__ == "__main__":
    main()
