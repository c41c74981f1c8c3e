"""What the host does in a decode step of many sequences, without a GPU: ms a step.

    python benchmarks/host_step.py [--sequences 256 512 2000] [--steps 60]

Scheduling, the step's arrays, padding and the search for shared splits as for the CUDA engine, and
taking the results; placing, launching and reading them back are left out. Where a step of the GPU
is shorter than this, the GPU waits.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
from support.fake_ops import CONFIG, WEIGHTS

from orcd_batch.backend.cuda.padding import is_decode, pad_step, step_sizes
from orcd_batch.backend.cuda.shared_splits import SharedSplitFinder
from orcd_batch.backend.ops import BLOCK_SIZE, Batch, SampleBatch, Sampled
from orcd_batch.collector import relaxed_collector
from orcd_batch.engine import Engine, Request, SamplingParams

_MOST_SEQUENCES, _PROMPT, _MODEL_LEN = 2048, 100, 4096


class HostOps:
    """Every token is 7; a launched step is its number of rows."""

    def __init__(self) -> None:
        self._sizes = step_sizes(_MOST_SEQUENCES)
        self._shared_splits = SharedSplitFinder()

    def allocate_kv_cache(self, *_: int) -> list[Any]:
        return []

    def launch(self, _: Any, batch: Batch, sampling: SampleBatch | None) -> int:
        if sampling is not None and is_decode(batch, sampling):
            most_blocks = _MODEL_LEN // BLOCK_SIZE
            batch, sampling = pad_step(batch, sampling, self._sizes, most_blocks)
        self._shared_splits.find(batch)
        return len(sampling.position) if sampling is not None else 0

    def collect(self, num_rows: int) -> Sampled | None:
        if not num_rows:
            return None
        zeros = np.zeros(num_rows, np.float32)
        tokens, hashes = np.full(num_rows, 7, np.int32), np.full(num_rows, 1 << 60, np.int64)
        return Sampled(tokens, zeros, zeros, hashes, np.ones(num_rows, np.bool_))


def measure(num_seqs: int, num_steps: int) -> float:
    """Seconds a step, once all sequences decode."""
    engine = Engine(
        replace(CONFIG, vocab_size=32_000, context_length=_MODEL_LEN),
        WEIGHTS,
        HostOps(),  # type: ignore[arg-type]
        max_num_seqs=_MOST_SEQUENCES,
        max_num_batched_tokens=8192,
        num_blocks=64 * num_seqs,
        max_model_len=_MODEL_LEN,
        run_ahead=True,
    )
    rng = np.random.default_rng(0)
    for index in range(num_seqs):
        prompt = tuple(rng.integers(5, 31_999, _PROMPT).tolist())
        engine.add(Request(index, prompt, SamplingParams(max_tokens=2000), stream=index))
    while engine.num_waiting or not all(s.is_decoding for s in engine.scheduler.running):
        engine.step()
    with relaxed_collector():  # as in a job
        started = time.perf_counter()
        for _ in range(num_steps):
            engine.step()
        return (time.perf_counter() - started) / num_steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, nargs="+", default=[256, 512, 2000])
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    for num_seqs in options.sequences:
        print(f"{num_seqs:5} sequences: {measure(num_seqs, options.steps) * 1e3:.2f} ms a step")


if __name__ == "__main__":
    main()
