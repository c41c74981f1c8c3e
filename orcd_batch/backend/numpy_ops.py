"""The ops on numpy in fp32: slow, obvious, and the specification of every other backend."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from orcd_batch.backend.blas_limit import BlasLimit
from orcd_batch.backend.numpy_arena import Arena
from orcd_batch.backend.numpy_attention import Group, attention, choose_tile_tokens, plan_groups
from orcd_batch.backend.numpy_dequantize import dequantize_rows, dequantize_vector, row_chunks
from orcd_batch.backend.numpy_linear import PanelWeight, Plan, choose_plan, linear
from orcd_batch.backend.numpy_sampler import MAX_VOCAB_SIZE, RowResult, sample_row
from orcd_batch.backend.numpy_threads import Task, Workers
from orcd_batch.backend.op_times import HostOpTimes, OpTable
from orcd_batch.backend.ops import (
    BLOCK_SIZE,
    Batch,
    Compute,
    KVCache,
    SampleBatch,
    Sampled,
    TensorPart,
)
from orcd_batch.errors import CheckpointError, ClosedError

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PlacedBatch(Batch):
    """A batch with what every layer needs of it, made once per step.

    blocks, offsets: (T,), where each token's keys and values go. begun: the blocks among them
    whose first position is written. groups: attention groups by (sliding window, query shape).
    """

    blocks: Ints
    offsets: Ints
    begun: Ints
    groups: dict[tuple[int, ...], list[Group]] = field(default_factory=dict)


class NumpyOps:
    """Implements `ops.Ops` with numpy.ndarray as `Array`; a linear weight is a `PanelWeight`.

    num_threads: 0 uses every CPU this process may run on; the count never changes a bit. time_ops:
    keep the wall time of every op, for the manifest. While it lives, BLAS is limited to one thread
    per call, process-wide. Not for use from several threads.
    """

    def __init__(self, num_threads: int = 0, *, time_ops: bool = False) -> None:
        self._workers = Workers(num_threads)
        self._blas_limit = BlasLimit()
        self.blas_kernel = self._blas_limit.kernel
        self._arena = Arena()
        self._plans: dict[int, Plan] = {}
        self._tile_tokens: dict[tuple[int, int], tuple[int, int]] = {}
        self._closed = False
        self._op_times = HostOpTimes() if time_ops else None
        if self._op_times is not None:
            self._op_times.watch(self)

    @property
    def num_threads(self) -> int:
        return self._workers.num_threads

    def manifest(self) -> dict[str, object]:
        """Which product shapes proved to give the same bits, by inner size."""
        linear_plans = {
            f"linear K={k}": f"{plan.tile}, bulk {plan.bulk}"
            for k, plan in sorted(self._plans.items())
        }
        tiles = {
            f"attention G={g} D={d}": f"{base} token(s), bulk {bulk}"
            for (g, d), (base, bulk) in sorted(self._tile_tokens.items())
        }
        times = {"op_times": self.op_times()} if self._op_times is not None else {}
        return {"blas_kernel": self.blas_kernel, **linear_plans, **tiles, **times}

    def op_times(self) -> OpTable | None:
        """Wall time per op so far, under time_ops alone."""
        return self._op_times.summary() if self._op_times else None

    def load_linear(self, parts: Sequence[TensorPart]) -> PanelWeight:
        row_length = parts[0].shape[1]
        for part in parts:
            if part.shape[1] != row_length:
                raise CheckpointError(
                    f"Tensor {part.name!r} has rows of {part.shape[1]} values where "
                    f"{parts[0].name!r} has {row_length}; they cannot form one weight."
                )
        num_rows = sum(part.shape[0] for part in parts)
        plan = self._plan(row_length)
        padding = -num_rows % plan.tile.panel_rows
        rows = self._arena.empty(num_rows + padding, row_length)
        rows[num_rows:] = 0.0
        tasks: list[Task] = []
        offset = 0
        for part in parts:
            target = rows[offset : offset + part.shape[0]]
            tasks.extend(_load_task(part, target, a, b) for a, b in row_chunks(part))
            offset += part.shape[0]
        self._workers.run(tasks)
        return PanelWeight(rows, num_rows, plan)

    def load_vector(self, parts: Sequence[TensorPart]) -> Floats:
        return np.concatenate([dequantize_vector(part) for part in parts])

    def load_rope_table(self, table: Floats) -> Floats:
        return np.ascontiguousarray(table, np.float32)

    def allocate_kv_cache(
        self, num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int
    ) -> list[KVCache]:
        # One block's keys and values of all layers lie together, so that memory is touched, and
        # taken from the system, a block at a time.
        shape = (num_blocks, num_layers, 2, num_kv_heads, BLOCK_SIZE, head_dim)
        blocks = np.zeros(shape, np.float32)
        return [KVCache(blocks[:, i, 0], blocks[:, i, 1]) for i in range(num_layers)]

    def place(self, batch: Batch) -> PlacedBatch:
        if self._closed:
            raise ClosedError("This model was closed; load it again to use it.")
        blocks, offsets = np.divmod(batch.slot_mapping, BLOCK_SIZE)
        arrays = {name: getattr(batch, name) for name in Batch.__slots__}
        return PlacedBatch(**arrays, blocks=blocks, offsets=offsets, begun=blocks[offsets == 0])

    def embedding(self, token_ids: Ints, token_embd: PanelWeight) -> Floats:
        return token_embd.rows[token_ids]

    def rms_norm(self, x: Floats, weight: Floats, eps: float) -> Floats:
        with np.errstate(all="ignore"):
            root: Floats = np.add.reduce(x * x, axis=1, keepdims=True)
            root /= np.float32(x.shape[1])
            root += np.float32(eps)
            np.sqrt(root, out=root)
            root[np.isinf(root)] = np.nan  # an overflow must show in the logits, not become zeros
            out = x / root
            out *= weight
        return out

    def linear(self, x: Floats, weight: PanelWeight) -> Floats:
        return linear(x, weight, self._workers)

    def linear_add(self, x: Floats, weight: PanelWeight, residual: Floats) -> None:
        residual += linear(x, weight, self._workers)

    def rope_and_cache(
        self, qkv: Floats, bias: Floats, rope_table: Floats, cache: KVCache, batch: Batch
    ) -> Floats:
        assert isinstance(batch, PlacedBatch), "rope_and_cache needs a batch from place()"
        _, num_kv_heads, _, head_dim = cache.keys.shape
        heads = (qkv + bias).reshape(len(qkv), -1, head_dim)
        num_rotated = heads.shape[1] - num_kv_heads
        rotated = _rotate_halves(heads[:, :num_rotated], rope_table[batch.positions])
        if batch.begun.size:
            cache.keys[batch.begun] = 0.0
            cache.values[batch.begun] = 0.0
        num_heads = num_rotated - num_kv_heads
        cache.keys[batch.blocks, :, batch.offsets] = rotated[:, num_heads:]
        cache.values[batch.blocks, :, batch.offsets] = heads[:, num_rotated:]
        return np.ascontiguousarray(rotated[:, :num_heads])

    def attention(self, q: Floats, cache: KVCache, batch: Batch, sliding_window: int) -> Floats:
        assert isinstance(batch, PlacedBatch), "attention needs a batch from place()"
        _, num_heads, head_dim = q.shape
        num_kv_heads = cache.keys.shape[1]
        key = (sliding_window, num_heads, num_kv_heads, head_dim)
        if key not in batch.groups:
            batch.groups[key] = plan_groups(
                batch.positions.astype(np.int64),
                batch.query_start,
                batch.block_tables,
                sliding_window,
                self._attention_tiles(num_heads // num_kv_heads, head_dim),
                num_heads * BLOCK_SIZE,
                self.num_threads,
            )
        return attention(q, cache, batch.groups[key], self._workers)

    def gated_linear(self, x: Floats, weight: PanelWeight) -> Floats:
        return swiglu(linear(x, weight, self._workers))

    def take_rows(self, x: Floats, rows: Ints) -> Floats:
        return x[rows]

    def logits(self, x: Floats, weight: PanelWeight) -> Floats:
        return linear(x, weight, self._workers)

    def sample(self, logits: Floats, batch: SampleBatch) -> Sampled:
        num_rows, vocab_size = logits.shape
        assert vocab_size <= MAX_VOCAB_SIZE, f"vocabulary of {vocab_size} > {MAX_VOCAB_SIZE}"
        results: list[RowResult | None] = [None] * num_rows

        def task(row: int) -> Task:
            def sample() -> None:
                results[row] = sample_row(logits[row], batch, row)

            return sample

        self._workers.run([task(row) for row in range(num_rows)])
        columns = list(zip(*(result for result in results if result), strict=True)) or [()] * 5
        return Sampled(
            np.array(columns[0], np.int32),
            np.array(columns[1], np.float32),
            np.array(columns[2], np.float32),
            np.array(columns[3], np.int64),
            np.array(columns[4], np.bool_),
        )

    def copy_blocks(self, caches: Sequence[KVCache], copies: Ints) -> None:
        for cache in caches:
            for blocks in (cache.keys, cache.values):
                for source, target, count in copies.tolist():
                    blocks[target, :, :count] = blocks[source, :, :count]
                    blocks[target, :, count:] = 0.0  # as a block whose first position is written

    def launch(
        self, compute: Compute, batch: Batch, sampling: SampleBatch | None
    ) -> Sampled | None:
        return compute(self.place(batch), sampling)

    def collect(self, launched: Sampled | None) -> Sampled | None:
        return launched

    def to_host(self, x: Floats) -> Floats:
        return np.asarray(x, np.float32)

    def close(self) -> None:
        """Ends the threads and gives BLAS its own back; closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self._workers.close()
        self._blas_limit.release()

    def _plan(self, k: int) -> Plan:
        if k not in self._plans:
            self._plans[k] = choose_plan(k, self.blas_kernel)
        return self._plans[k]

    def _attention_tiles(self, group_size: int, head_dim: int) -> tuple[int, int]:
        key = (group_size, head_dim)
        if key not in self._tile_tokens:
            self._tile_tokens[key] = choose_tile_tokens(group_size, head_dim)
        return self._tile_tokens[key]


def swiglu(gate_up: Floats) -> Floats:
    """(T, 2F), gate first -> (T, F): silu(gate) * up."""
    size = gate_up.shape[1] // 2
    gate, up = gate_up[:, :size], gate_up[:, size:]
    with np.errstate(all="ignore"):
        out = np.exp(-gate)
        out += np.float32(1.0)
        np.divide(gate, out, out=out)
        out *= up
    return out


def _load_task(part: TensorPart, target: Floats, first: int, last: int) -> Task:
    def load() -> None:
        target[first:last] = dequantize_rows(part, first, last)

    return load


def _rotate_halves(heads: Floats, angles: Floats) -> Floats:
    """(T, heads, D) rotated by angles (T, 2, D/2): cos and sin of each pair (i, i + D/2)."""
    half = heads.shape[2] // 2
    cos, sin = angles[:, 0, None, :], angles[:, 1, None, :]
    first, second = heads[..., :half], heads[..., half:]
    out = np.empty_like(heads)
    out[..., :half] = first * cos - second * sin
    out[..., half:] = second * cos + first * sin
    return out
