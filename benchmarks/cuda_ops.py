"""The kernels of the forward pass and the sampler, one by one, against the card's limits.

Run on a GPU machine: `python benchmarks/cuda_ops.py [--only attention]`. Times are GPU times of
graph replays over inputs taken in turn, so that none is in the L2 cache. Shapes: Phi-3-mini's,
unless the row says otherwise.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from orcd_batch.backend.cuda.array import FP16, FP32, DeviceArray
from orcd_batch.backend.cuda.gated_linear import swiglu
from orcd_batch.backend.cuda.graph import time_launches
from orcd_batch.backend.cuda.ops import CudaOps
from orcd_batch.backend.cuda.placed_batch import PlacedBatch
from orcd_batch.backend.cuda.sampling import Sampling
from orcd_batch.backend.cuda.shared_splits import (
    SPLIT_POSITIONS,
    SharedSplits,
    find_shared_splits,
)
from orcd_batch.backend.ops import BLOCK_SIZE, Batch, KVCache, SampleBatch

READ_BYTES_PER_S = 4.66e12
FLOPS = 780e12
HIDDEN, FFN, VOCAB = 3072, 8192, 32064
PHI3, QWEN, LLAMA = (32, 32, 96), (14, 2, 64), (32, 8, 128)
# Beyond the L2 cache (60 MB) by enough.
ROTATION_BYTES = 400 << 20


@dataclass(frozen=True)
class Case:
    """One measurement: run(i) queues the op on the i-th of `count` inputs."""

    name: str
    num_bytes: int
    run: Callable[[int], object]
    count: int = 1
    flops: int = 0


class Bench:
    def __init__(self) -> None:
        self.ops = CudaOps()
        rng = np.random.default_rng(0)
        self._random = {
            FP16: rng.standard_normal(8 << 20, np.float32).astype(FP16),
            FP32: rng.standard_normal(8 << 20, np.float32),
        }
        self._num_placed = 0

    def normal(self, *shape: int, dtype: Any = FP32) -> DeviceArray:
        """Random values on the GPU (repeating after 8 million)."""
        from cuda.bindings import driver

        from orcd_batch.backend.cuda.driver import call

        source = self._random[dtype]
        size = int(np.prod(shape)) * dtype.itemsize
        buffer = self.ops.device.allocate(size, "staging")
        for offset in range(0, size, source.nbytes):
            count = min(source.nbytes, size - offset)
            call(driver.cuMemcpyHtoD(buffer.ptr + offset, source.ctypes.data, count))
        return DeviceArray(buffer.ptr, shape, dtype)

    def put(self, array: Any) -> DeviceArray:
        self._num_placed += 1
        return self.ops.staging.place(f"bench_{self._num_placed}", [array])[0]

    def free(self) -> None:
        self.ops.device.synchronize()
        self.ops.device.free_use("staging")

    def measure(self, case: Case) -> dict[str, Any]:
        repeats = max(case.count, 2)
        case.run(0)

        def record() -> None:
            for i in range(repeats):
                case.run(i % case.count)

        seconds = time_launches(self.ops.device, record) / repeats
        limit = max(case.num_bytes / READ_BYTES_PER_S, case.flops / FLOPS)
        row = {
            "op": case.name,
            "us": round(seconds * 1e6, 2),
            "gb_per_s": round(case.num_bytes / seconds / 1e9),
            "tflops": round(case.flops / seconds / 1e12, 1),
            "share_of_limit": round(limit / seconds, 3),
        }
        print(" ".join(f"{key}={value}" for key, value in row.items()), file=sys.stderr, flush=True)
        return row

    def elementwise(self, num_tokens: int) -> Iterator[Case]:
        ops, t = self.ops, num_tokens
        count = min(64, max(2, ROTATION_BYTES // (t * HIDDEN * 4)))
        xs = [self.normal(t, HIDDEN) for _ in range(count)]
        weight = self.normal(HIDDEN)
        yield Case(
            f"rms_norm T={t}", t * HIDDEN * 6, lambda i: ops.rms_norm(xs[i], weight, 1e-5), count
        )
        self.free()
        table = self.normal(VOCAB, HIDDEN, dtype=FP16)
        rng = np.random.default_rng(1)
        ids = [self.put(rng.integers(0, VOCAB, t).astype(np.int32)) for _ in range(8)]
        yield Case(f"embedding T={t}", t * HIDDEN * 6, lambda i: ops.embedding(ids[i], table), 8)
        self.free()
        count = min(64, max(2, ROTATION_BYTES // (t * FFN * 4)))
        gates = [self.normal(t, 2 * FFN, dtype=FP16) for _ in range(count)]
        y = self.normal(t, FFN, dtype=FP16)
        run = partial(swiglu, ops.kernels)
        yield Case(f"swiglu T={t}", t * FFN * 6, lambda i: run(gates[i], y), count)
        self.free()

    def rope(self, num_tokens: int) -> Iterator[Case]:
        t, (heads, kv_heads, dim) = num_tokens, PHI3
        width = (heads + 2 * kv_heads) * dim
        count = min(64, max(2, ROTATION_BYTES // (t * width * 2)))
        qkvs = [self.normal(t, width, dtype=FP16) for _ in range(count)]
        bias, table = self.normal(width), self.normal(4096, 2, dim // 2)
        cache, batch = self.cache(PHI3, [(t, t)])
        yield Case(
            f"rope_and_cache T={t}",
            t * width * 4,
            lambda i: self.ops.rope_and_cache(qkvs[i], bias, table, cache, batch),
            count,
        )
        self.free()

    def cache(
        self,
        heads: tuple[int, int, int],
        sequences: list[tuple[int, int]],
        samples: int = 1,
        num_shared: int = 0,
    ) -> tuple[KVCache, Batch]:
        """A cache just large enough for (context, queries) sequences, and their batch; `samples`
        neighbours have their first num_shared blocks in common."""
        counts = [-(-context // BLOCK_SIZE) for context, _ in sequences]
        blocks = np.random.default_rng(2).permutation(sum(counts)).astype(np.int32)
        tables = np.zeros((len(sequences), max(counts)), np.int32)
        offset = 0
        for s, count in enumerate(counts):
            tables[s, :count] = blocks[offset : offset + count]
            offset += count
        firsts = np.arange(len(sequences)) // samples * samples
        tables[:, :num_shared] = tables[firsts, :num_shared]
        whole = np.array([c // SPLIT_POSITIONS if n == 1 else 0 for c, n in sequences])
        found = find_shared_splits(tables, whole)
        shared = SharedSplits(*(self.put(getattr(found, name)) for name in SharedSplits.__slots__))
        shape = (sum(counts), heads[1], BLOCK_SIZE, heads[2])
        cache = KVCache(self.normal(*shape, dtype=FP16), self.normal(*shape, dtype=FP16))
        new = [np.arange(context - queries, context) for context, queries in sequences]
        slots = [
            tables[s][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for s, p in enumerate(new)
        ]
        starts = np.cumsum([0, *(queries for _, queries in sequences)])
        num_tokens = int(starts[-1])
        return cache, PlacedBatch(
            token_ids=self.put(np.zeros(num_tokens, np.int32)),
            positions=self.put(np.concatenate(new).astype(np.int32)),
            slot_mapping=self.put(np.concatenate(slots).astype(np.int32)),
            query_start=self.put(starts.astype(np.int32)),
            context_lens=self.put(np.array([c for c, _ in sequences], np.int32)),
            block_tables=self.put(tables),
            logits_rows=self.put(np.zeros(1, np.int32)),
            num_leading=next((i for i, (_, n) in enumerate(sequences) if n > 1), len(sequences)),
            shared=shared,
            has_chunks=not found.is_empty,
        )

    def attention(
        self,
        name: str,
        heads: tuple[int, int, int],
        sequences: list[tuple[int, int]],
        samples: int = 1,
        num_shared: int = 0,
    ) -> Iterator[Case]:
        num_heads, num_kv_heads, dim = heads
        num_keys = sum(context for context, _ in sequences)
        num_keys -= num_shared * BLOCK_SIZE * (len(sequences) - -(-len(sequences) // samples))
        read = num_keys * num_kv_heads * dim * 4
        num_tokens = sum(queries for _, queries in sequences)
        q = self.normal(num_tokens, num_heads, dim, dtype=FP16)
        count = max(2, min(64, ROTATION_BYTES // read)) if read < ROTATION_BYTES else 1
        caches = [self.cache(heads, sequences, samples, num_shared) for _ in range(count)]
        pairs = sum(
            sum(range(context - queries + 1, context + 1)) for context, queries in sequences
        )
        yield Case(
            name,
            read + 2 * q.nbytes,
            lambda i: self.ops.attention(q, *caches[i], 0),
            count,
            4 * pairs * num_heads * dim,
        )
        self.free()

    def sample(self, num_rows: int, vocab_size: int) -> Iterator[Case]:
        count = max(2, min(16, ROTATION_BYTES // (num_rows * vocab_size * 4)))
        logits = [self.normal(num_rows, vocab_size) for _ in range(count)]
        sampling = Sampling(self.ops.device, self.ops.kernels, self.ops.workspace, self.ops.staging)
        for name, temperature, top_k, top_p in (
            ("greedy", 0.0, 0, 1.0),
            ("temperature", 1.0, 0, 1.0),
            ("top_p", 1.0, 0, 0.9),
            ("top_k+top_p", 1.0, 50, 0.9),
        ):
            batch = sampling.place(sample_batch(num_rows, temperature, top_k, top_p))
            yield Case(
                f"sample {name} R={num_rows} V={vocab_size}",
                num_rows * vocab_size * 4,
                lambda i, batch=batch: sampling.choose(logits[i], batch),
                count,
            )
        self.free()


def sample_batch(num_rows: int, temperature: float, top_k: int, top_p: float) -> SampleBatch:
    rng = np.random.default_rng(3)
    return SampleBatch(
        temperature=np.full(num_rows, temperature, np.float32),
        top_k=np.full(num_rows, top_k, np.int32),
        top_p=np.full(num_rows, top_p, np.float32),
        min_p=np.zeros(num_rows, np.float32),
        repetition_penalty=np.ones(num_rows, np.float32),
        seed=rng.integers(0, 2**64, num_rows, np.uint64),
        stream=rng.integers(0, 2**64, num_rows, np.uint64),
        position=rng.integers(0, 2**32, num_rows, np.uint32),
        seen_ids=np.zeros(1, np.int32),
        seen_start=np.zeros(num_rows + 1, np.int32),
    )


def cases(bench: Bench) -> Iterator[Case]:
    for num_tokens in (1, 256, 4096):
        yield from bench.elementwise(num_tokens)
        yield from bench.rope(num_tokens)
    decodes = [
        ("phi3", PHI3, 1, 640),
        ("phi3", PHI3, 8, 640),
        ("phi3", PHI3, 256, 512),
        ("phi3", PHI3, 32, 4000),
        ("qwen2.5-0.5b", QWEN, 256, 1024),
        ("qwen2.5-0.5b", QWEN, 2048, 1024),
        ("qwen2.5-0.5b", QWEN, 1, 32000),
        ("llama-3-8b", LLAMA, 128, 1024),
        ("llama-3-8b", LLAMA, 512, 1024),
    ]
    for model, heads, num_seqs, context in decodes:
        name = f"attention decode {model} B={num_seqs} context={context}"
        yield from bench.attention(name, heads, [(context, 1)] * num_seqs)
    own = np.random.default_rng(4).integers(1, 128, 1020).tolist()
    yield from bench.attention(
        "attention decode phi3 B=1020 context=1..127", PHI3, [(n, 1) for n in own]
    )
    sweeps = [
        ("phi3", PHI3, 34, 30),
        ("phi3", PHI3, 128, 8),
        ("qwen2.5-0.5b", QWEN, 34, 30),
        ("llama-3-8b", LLAMA, 34, 30),
    ]
    for model, heads, prompts, samples in sweeps:
        name = f"attention decode {model} B={prompts}x{samples} context=512 shared + 1..127"
        sequences = [(512 + n, 1) for n in (own + own)[: prompts * samples]]
        yield from bench.attention(name, heads, sequences, samples, 8)
    prefills = [
        ("phi3", PHI3, 4, 1024, 1024),
        ("phi3", PHI3, 1, 4096, 4096),
        ("phi3", PHI3, 8, 4096, 512),
        ("qwen2.5-0.5b", QWEN, 4, 1024, 1024),
        ("llama-3-8b", LLAMA, 4, 1024, 1024),
    ]
    for model, heads, num_seqs, context, queries in prefills:
        name = f"attention prefill {model} B={num_seqs} context={context} queries={queries}"
        yield from bench.attention(name, heads, [(context, queries)] * num_seqs)
    for num_rows, vocab_size in ((1, VOCAB), (256, VOCAB), (1, 151936), (256, 151936)):
        yield from bench.sample(num_rows, vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="ops whose name begins so")
    only = parser.parse_args().only
    bench = Bench()
    print(bench.ops.device.name, file=sys.stderr)
    rows = [bench.measure(case) for case in cases(bench) if case.name.startswith(only)]
    bench.ops.close()
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
