"""The ops protocol: the table of contents of every backend, in the order of the forward pass.

Shape letters used everywhere: T tokens of this step, B sequences, R rows that need logits,
H query heads, Hkv KV heads, D head dim, C hidden, F ffn, V vocab, L layers, K/N in/out of a
linear. `Array` is the backend's own array type (numpy.ndarray, or a view of device memory).

Every op's result for one row depends on that row alone (and, for attention, on its own sequence):
reductions run in an order fixed by the model's shape. Numpy computes in fp32; the GPU keeps fp16
weights, KV cache, activations and matrix inputs, and fp32 accumulation, residual stream and logits.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import FileIO
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from orcd_batch.errors import CheckpointError

Array = Any

# Positions per KV block; also the KV tile of attention, so that tile borders are absolute.
BLOCK_SIZE = 64


@dataclass(frozen=True, slots=True)
class TensorPart:
    """Rows of one tensor of the file, on their way into a weight.

    name: the tensor in the file, for messages. data: its raw bytes (uint8, a view of the mapped
    file) for exactly `shape[0]` rows of `shape[1]` values (a vector has shape (n, 1) with
    data laid out as stored). ggml_type: the GGML type name, such as "Q4_1" or "F16".
    rope_head_dim: 0, or the head dim D when rows pair as neighbours and must be put in halves
    order: within each head, row 2i goes to i and row 2i + 1 to i + D/2. file: where the same bytes
    can be read without the mapping, from `offset` on; None where there is no file.
    """

    name: str
    data: NDArray[np.uint8]
    ggml_type: str
    shape: tuple[int, int]
    rope_head_dim: int = 0
    file: FileIO | None = None
    offset: int = 0

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes start … stop of `data`, (stop - start,); see `read_into`."""
        if self.file is None:
            return self.data.reshape(-1)[start:stop]
        target = np.empty(stop - start, np.uint8)
        self.read_into(target, start)
        return target

    def read_into(self, target: NDArray[np.uint8], start: int) -> None:
        """Fills the target with the bytes from `start` on.

        Raises CheckpointError where the file ends before them: it was cut short after it was
        opened, and touching the mapping there would end the process.
        """
        if self.file is None:
            target[:] = self.data.reshape(-1)[start : start + target.nbytes]
            return
        position = self.offset + start
        view = target.data
        while view.nbytes:
            count = os.preadv(self.file.fileno(), [view], position)
            if count == 0:
                raise CheckpointError(
                    f"{self.file.name!s} ends at byte {position:,}, inside tensor "
                    f"{self.name!r}: it was cut short while it was read; fetch it again."
                )
            view, position = view[count:], position + count


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's tokens, packed without padding, sequence after sequence.

    token_ids, positions, slot_mapping: (T,) int32; slot = block * BLOCK_SIZE + offset. For `launch`
    only, a token id of -1 - r stands for the one sampled in row r of the step launched before.
    query_start: (B + 1,) int32, where each sequence's tokens begin in T.
    context_lens: (B,) int32, tokens of the sequence in the cache once this step has run.
    block_tables: (B, max_blocks) int32, padded with 0. logits_rows: (R,) int32, rows of T.
    """

    token_ids: Array
    positions: Array
    slot_mapping: Array
    query_start: Array
    context_lens: Array
    block_tables: Array
    logits_rows: Array


@dataclass(frozen=True, slots=True)
class SampleBatch:
    """Sampling parameters of R rows, one entry each.

    temperature, top_p, min_p, repetition_penalty: (R,) float32 (temperature 0 is greedy).
    top_k: (R,) int32, 0 is off. seed, stream: (R,) uint64. position: (R,) uint32, the index in
    its sequence of the token being sampled. seen_ids: (S,) int32 and seen_start: (R + 1,) int32:
    the distinct prompt and completion ids of each row (empty where the penalty is 1; for `launch`
    negative ids stand for sampled ones as in Batch, and may repeat another).
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition_penalty: Array
    seed: Array
    stream: Array
    position: Array
    seen_ids: Array
    seen_start: Array


@dataclass(frozen=True, slots=True)
class Sampled:
    """What sampling R rows gave; on the host once it comes out of `collect`.

    token_ids: (R,) int32. logprobs: (R,) float32, of the chosen token under the raw logits.
    margins: (R,) float32, best minus second-best raw logit. fingerprints: (R,) int64.
    finite: (R,) bool, False where the logits row holds an infinity or NaN (the rest of that
    row's entries are then meaningless).
    """

    token_ids: Array
    logprobs: Array
    margins: Array
    fingerprints: Array
    finite: Array


@dataclass(frozen=True, slots=True)
class KVCache:
    """One layer's paged cache: keys and values are (num_blocks, Hkv, BLOCK_SIZE, D)."""

    keys: Array
    values: Array


# A step's kernels on placed arrays; the sampling is None where no row needs a token.
Compute = Callable[[Batch, SampleBatch | None], Sampled | None]


class Ops(Protocol):
    """What a backend must offer. Results may live in work buffers that a later call reuses."""

    # Getting weights and memory in place.
    def load_linear(self, parts: Sequence[TensorPart]) -> Array:
        """A linear weight (N, K): the parts' rows, dequantized, one part under the other."""
        ...

    def load_vector(self, parts: Sequence[TensorPart]) -> Array:
        """An fp32 vector (n,): the parts one after another (norm weights, biases)."""
        ...

    def load_rope_table(self, table: NDArray[np.float32]) -> Array:
        """cos and sin by position: (positions, 2, D/2) fp32."""
        ...

    def allocate_kv_cache(
        self, num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int
    ) -> list[KVCache]: ...

    def place(self, batch: Batch) -> Batch:
        """The same batch with its arrays where the ops can read them."""
        ...

    # The forward pass.
    def embedding(self, token_ids: Array, token_embd: Array) -> Array:
        """(T,), (V, C) -> residual stream (T, C) fp32."""
        ...

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """(T, C) -> (T, C): x / sqrt(mean(x²) + eps) * weight."""
        ...

    def linear(self, x: Array, weight: Array) -> Array:
        """(T, K), (N, K) -> (T, N) = x @ weight.T."""
        ...

    def linear_add(self, x: Array, weight: Array, residual: Array) -> None:
        """Adds x @ weight.T into residual (T, N) in place."""
        ...

    def rope_and_cache(
        self, qkv: Array, bias: Array, rope_table: Array, cache: KVCache, batch: Batch
    ) -> Array:
        """(T, (H + 2 Hkv) D) + bias -> rotated queries (T, H, D); K (rotated) and V go to slots."""
        ...

    def attention(self, q: Array, cache: KVCache, batch: Batch, sliding_window: int) -> Array:
        """(T, H, D) -> (T, H * D): causal softmax(q k / sqrt(D)) v over the paged cache."""
        ...

    def gated_linear(self, x: Array, weight: Array) -> Array:
        """(T, K), (2F, K), gate rows first -> (T, F): silu(x @ gate.T) * (x @ up.T)."""
        ...

    def take_rows(self, x: Array, rows: Array) -> Array:
        """(T, C), (R,) -> (R, C)."""
        ...

    def logits(self, x: Array, weight: Array) -> Array:
        """(R, C), (V, C) -> (R, V) fp32 = x @ weight.T."""
        ...

    # After the forward pass.
    def sample(self, logits: Array, batch: SampleBatch) -> Sampled:
        """Chooses one token per row of (R, V) fp32 logits and hashes the row's bits."""
        ...

    # Whole steps.
    def copy_blocks(self, caches: Sequence[KVCache], copies: NDArray[np.int32]) -> None:
        """For each (source, target, n) of copies (m, 3): the first n positions of block `source` go
        to block `target` in every layer, before anything that is launched later writes to either.
        No target is another copy's source."""
        ...

    def launch(self, compute: Compute, batch: Batch, sampling: SampleBatch | None) -> Any:
        """Starts `compute` on the batch and its sampling, placed; returns what `collect` takes.

        It need not wait for the result. Where every sequence has one token, a backend may add
        sequences that nobody sees, and replay what it recorded of an earlier step of that shape.
        """
        ...

    def collect(self, launched: Any) -> Sampled | None:
        """The results of a launched step, on the host; at most one later step was launched."""
        ...

    def to_host(self, x: Array) -> NDArray[np.float32]: ...

    def close(self) -> None: ...
