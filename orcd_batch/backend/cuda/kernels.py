"""The forward pass and sampling on the GPU: which kernel runs, with which macros and grid.

Shapes are the model's; grids follow the step. Nothing here synchronizes or allocates once the work
space is frozen.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orcd_batch.backend.cuda.array import FP16, FP32, DeviceArray
from orcd_batch.backend.cuda.attention import (
    RUN_SPLITS,
    SPLIT_TILES,
    AttentionShape,
    best_prefill_shape,
    decode_shape,
    has_wgmma,
    merge_shape,
    reach,
    score_scale,
    shared_shape,
)
from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.cuda.placed_batch import PlacedBatch
from orcd_batch.backend.cuda.plan import FP16_BYTES, FP32_BYTES, ModelShape
from orcd_batch.backend.cuda.program import Kernels, int32
from orcd_batch.backend.cuda.sampling import Sampling
from orcd_batch.backend.cuda.tensor_map import tile_map
from orcd_batch.backend.cuda.workspace import Workspace
from orcd_batch.backend.ops import Batch, KVCache, SampleBatch, Sampled
from orcd_batch.errors import DeviceError

# A row's norm is one block; more threads than this would hold less than a vector each.
MAX_NORM_THREADS = 256
ELEMENTWISE_THREADS = 256
# What a model's sizes must be multiples of: 16-byte vectors of fp16.
VECTOR = 8


class ForwardKernels:
    """The ops of `backend.ops.Ops` from `embedding` to `sample`, but for the matrix products.

    Results are views of work buffers: valid until the same op runs again. The residual stream is
    one buffer, which `linear_add` updates in place.
    """

    device: Device
    kernels: Kernels
    workspace: Workspace
    sampling: Sampling

    def reserve_buffers(
        self, shape: ModelShape, max_tokens: int, max_seqs: int
    ) -> Mapping[str, int]:
        """Work buffers and their bytes at the largest step."""
        heads = shape.num_heads * shape.head_dim
        decode = decode_shape(
            self.device, shape.num_heads, shape.num_kv_heads, shape.head_dim, max_seqs
        )
        max_blocks = decode.max_blocks(shape.max_model_len)
        return {
            "residual": max_tokens * shape.hidden_size * FP32_BYTES,
            "norm": max_tokens * shape.hidden_size * FP16_BYTES,
            "q": max_tokens * heads * FP16_BYTES,
            "attention": max_tokens * heads * FP16_BYTES,
            "attention_partials": decode.partial_floats(max_seqs, max_blocks) * FP32_BYTES,
            _rows_buffer(FP32): max_seqs * shape.hidden_size * FP32_BYTES,
            _rows_buffer(FP16): max_seqs * max(heads, shape.hidden_size) * FP16_BYTES,
            **Sampling.buffers(shape.vocab_size, shape.max_model_len, max_seqs),
        }

    def embedding(self, token_ids: DeviceArray, token_embd: DeviceArray) -> DeviceArray:
        """(T,), (V, C) fp16 -> (T, C) fp32."""
        (num_tokens,), hidden = token_ids.shape, _vectorized("hidden size", token_embd.shape[1])
        x = self.workspace.take("residual", (num_tokens, hidden), FP32)
        threads = _warps(hidden // VECTOR, ELEMENTWISE_THREADS)
        defines = {"HIDDEN": hidden, "THREADS": threads}
        self._run("embedding", defines, num_tokens, threads, (token_ids, token_embd, x))
        return x

    def rms_norm(self, x: DeviceArray, weight: DeviceArray, eps: float) -> DeviceArray:
        """(T, C) fp32 -> (T, C) fp16."""
        y, threads, defines = self._norm(x)
        args = (x, weight, y, np.float32(eps))
        self._run("rms_norm", defines, x.shape[0], threads, args)
        return y

    def rope_and_cache(
        self,
        qkv: DeviceArray,
        bias: DeviceArray | None,
        rope_table: DeviceArray,
        cache: KVCache,
        batch: Batch,
    ) -> DeviceArray:
        """(T, (H + 2 Hkv) D) fp16 -> rotated queries (T, H, D) fp16; K and V go to their slots.

        A negative slot writes no cache: a padding token. A V that fp16 cannot hold is cached as 0
        and its K as NaN, so that it reaches those who see it and nobody else.
        """
        num_tokens, width = qkv.shape
        _, num_kv_heads, _, head_dim = cache.keys.shape
        num_heads = width // _vectorized("head dim", head_dim) - 2 * num_kv_heads
        q = self.workspace.take("q", (num_tokens, num_heads, head_dim), FP16)
        units = (num_heads + num_kv_heads) * head_dim // VECTOR
        threads = _warps(units, ELEMENTWISE_THREADS)
        defines = {
            "NUM_HEADS": num_heads,
            "NUM_KV_HEADS": num_kv_heads,
            "HEAD_DIM": head_dim,
            "THREADS": threads,
        }
        grid = (num_tokens, -(-units // threads))
        places = (batch.positions, batch.slot_mapping)
        args = (qkv, bias or 0, rope_table, *places, q, cache.keys, cache.values)
        self._run("rope_and_cache", defines, grid, threads, args)
        return q

    def attention(
        self, q: DeviceArray, cache: KVCache, batch: Batch, sliding_window: int
    ) -> DeviceArray:
        """(T, H, D) fp16 -> (T, H * D) fp16. Every sequence of the batch has at least one token."""
        assert isinstance(batch, PlacedBatch), "attention needs a batch from place()"
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads = cache.keys.shape[1]
        num_seqs, max_blocks = batch.block_tables.shape
        out = self.workspace.take("attention", (num_tokens, num_heads * head_dim), FP16)
        heads = (num_heads, num_kv_heads, head_dim)
        sequences = (batch.query_start, batch.context_lens)
        sizes = (
            *(int32(num_seqs), int32(max_blocks), reach(sliding_window)),
            score_scale(head_dim),
        )
        args = (q, cache.keys, cache.values, *sequences, batch.block_tables, out, *sizes)
        decode = decode_shape(self.device, *heads, num_seqs)
        num_floats = decode.partial_floats(num_seqs, max_blocks)
        partials = self.workspace.take("attention_partials", (num_floats,), FP32)
        shared = batch.shared
        assert shared is not None, "attention needs sequences"
        chunks = (shared.num_chunks, shared.members, shared.chunk_start, shared.chunk_split)
        chunks_done = batch.has_chunks and has_wgmma(self.device)
        if chunks_done:
            kernel = shared_shape(self.device, *heads)
            maps = (tile_map(cache.keys), tile_map(cache.values))
            leading = (*maps, q, *sequences, batch.block_tables, out, *sizes[1:])
            self._attend(kernel, self.device.sm_count, (*leading, partials, *chunks))
        runs = (shared.num_shared, int32(decode.whole_runs))
        tail = (partials, *runs, int32(chunks_done), *chunks)
        self._attend(decode, self.device.sm_count, (*args, *tail))
        most_splits = RUN_SPLITS if decode.whole_runs and not batch.has_chunks else 1
        if max_blocks > most_splits * SPLIT_TILES:
            merge = merge_shape(*heads)
            num_warp_groups = merge.num_merge_blocks(num_seqs, self.device.sm_count)
            self._attend(merge, num_warp_groups, (partials, *sequences, out, *sizes, *runs))
        if num_tokens > num_seqs:
            prefill = best_prefill_shape(self.device, *heads)
            num_long = num_seqs - batch.num_leading
            row_blocks = prefill.num_row_blocks(num_tokens - batch.num_leading, num_long)
            longer = (*batch.long_sequences, out, int32(num_long), *sizes[1:])
            if prefill.loader_warps:
                maps = (tile_map(cache.keys), tile_map(cache.values))
                num_blocks = min(row_blocks * num_kv_heads, self.device.sm_count)
                caches = (*maps, q, cache.values)
                self._attend(prefill, num_blocks, (*caches, *longer, int32(row_blocks)))
            else:
                grid = (row_blocks, num_kv_heads)
                self._attend(prefill, grid, (q, cache.keys, cache.values, *longer))
        return out

    def load_decode_kernels(self, shape: ModelShape, max_seqs: int) -> None:
        """Every build that attention of up to max_seqs single queries can need, so that none is
        compiled between steps."""
        heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
        found = [decode_shape(self.device, *heads, n) for n in range(1, max_seqs + 1)]
        found.append(merge_shape(*heads))
        if has_wgmma(self.device):
            found.append(shared_shape(self.device, *heads))
        builds = {(build.kernel, *build.defines.items()): build for build in found}
        for build in builds.values():
            self.kernels.get(build.kernel, build.defines, build.arch)

    def take_rows(self, x: DeviceArray, rows: DeviceArray) -> DeviceArray:
        """(T, C), (R,) -> (R, C), of any type whose rows are whole 16-byte vectors."""
        (num_rows,), width = rows.shape, x.shape[1]
        y = self.workspace.take(_rows_buffer(x.dtype), (num_rows, width), x.dtype)
        vectors = width * x.dtype.itemsize // 16
        threads = _warps(vectors, ELEMENTWISE_THREADS)
        defines = {"ROW_VECTORS": vectors, "THREADS": threads}
        self._run("take_rows", defines, num_rows, threads, (x, rows, y))
        return y

    def sample(self, logits: DeviceArray, batch: SampleBatch) -> Sampled:
        """Chooses one token per row of (R, V) fp32 logits, as `numpy_sampler` specifies.

        batch: placed by `sampling.place`; the results stay on the GPU.
        """
        return self.sampling.choose(logits, batch)

    def _norm(self, x: DeviceArray) -> tuple[DeviceArray, int, dict[str, int]]:
        hidden = _vectorized("hidden size", x.shape[1])
        y = self.workspace.take("norm", x.shape, FP16)
        threads = norm_threads(hidden)
        return y, threads, {"HIDDEN": hidden, "THREADS": threads}

    def _attend(
        self, shape: AttentionShape, grid: int | tuple[int, ...], args: Sequence[Any]
    ) -> None:
        kernel, threads, shared_bytes = shape.kernel, shape.threads, shape.shared_bytes
        self._run(kernel, shape.defines, grid, threads, args, shared_bytes, shape.arch)

    def _run(
        self,
        name: str,
        defines: Mapping[str, int],
        grid: int | tuple[int, ...],
        block: int,
        args: Sequence[Any],
        shared_bytes: int = 0,
        arch: str | None = None,
    ) -> None:
        if grid == 0 or (isinstance(grid, tuple) and 0 in grid):
            return
        self.kernels.launch(self.kernels.get(name, defines, arch), grid, block, args, shared_bytes)


def norm_threads(hidden_size: int) -> int:
    """Threads of a row's norm, which fix the order of its sum."""
    vectors = hidden_size // 4
    return _warps(-(-vectors // -(-vectors // MAX_NORM_THREADS)), MAX_NORM_THREADS)


def _rows_buffer(dtype: np.dtype[Any]) -> str:
    """Each type has its own: a step takes rows of the residual stream and of attention."""
    return f"rows_{dtype}"


def _vectorized(what: str, size: int) -> int:
    if size % VECTOR:
        raise DeviceError(
            f"This model's {what} is {size} and the GPU kernels need a multiple of {VECTOR}; "
            "use engine=numpy."
        )
    return size


def _warps(items: int, most: int) -> int:
    """Threads for so many items: whole warps, at most `most`."""
    return min(-(-items // 32) * 32, most)
