"""A model of ten lines: the next token is a digest of all tokens seen through the paged cache.

It stands in for the ops, so that the real forward pass, engine, scheduler and block manager run on
it; one wrong, missing or overwritten cache slot changes the tokens.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orcd_batch.backend.ops import BLOCK_SIZE, Batch, SampleBatch, Sampled
from orcd_batch.model import ModelConfig

VOCAB_SIZE = 50
CONFIG = ModelConfig(
    architecture="llama",
    name="fake",
    num_layers=1,
    hidden_size=8,
    intermediate_size=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=VOCAB_SIZE,
    context_length=1000,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    rope_pairing="halves",
    rope_scaling_factor=1.0,
    sliding_window=0,
    has_rope_freqs=False,
    tied_output=True,
    qkv_bias=False,
)
_LAYER = SimpleNamespace(
    attn_norm=0, attn_qkv=0, attn_qkv_bias=0, attn_output=0, ffn_norm=0, ffn_gate_up=0, ffn_down=0
)
WEIGHTS: Any = SimpleNamespace(
    token_embd=0, layers=(_LAYER,), output_norm=0, output=0, rope_table=0
)


def digest(tokens: list[int]) -> int:
    value = 17
    for position, token in enumerate(tokens):
        value = (value * 1_000_003 + token * 7 + position) % 2_147_483_647
    return value


def next_token(tokens: list[int]) -> int:
    return digest(tokens) % VOCAB_SIZE


class FakeOps:
    """Counts tokens, the most in one step, and steps with prompts; `not_finite` digests give logits
    that are not."""

    def __init__(self) -> None:
        self.max_tokens = self.num_tokens = self.num_prompt_steps = 0
        self.not_finite: set[int] = set()
        self.fail_next: Exception | None = None
        self.sampled = np.zeros(0, np.int32)

    def allocate_kv_cache(self, layers: int, num_blocks: int, heads: int, dim: int) -> list[Any]:
        return [np.full(num_blocks * BLOCK_SIZE, -1, np.int64)]

    def place(self, batch: Batch) -> Batch:
        return batch

    def embedding(self, token_ids: NDArray[np.int32], weight: Any) -> NDArray[np.int64]:
        self.max_tokens = max(self.max_tokens, len(token_ids))
        self.num_tokens += len(token_ids)
        return token_ids.astype(np.int64)

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        return x

    def linear(self, x: Any, weight: Any) -> Any:
        return x

    def linear_add(self, x: Any, weight: Any, residual: Any) -> None:
        residual[:] = x

    def rope_and_cache(self, qkv: Any, bias: Any, table: Any, cache: Any, batch: Batch) -> Any:
        written: dict[int, int] = {}
        for slot, token in zip(batch.slot_mapping.tolist(), qkv.tolist(), strict=True):
            assert written.setdefault(slot, token) == token, f"two tokens go to slot {slot}"
        cache[batch.slot_mapping] = qkv
        return batch.positions

    def attention(self, q: Any, cache: Any, batch: Batch, window: int) -> NDArray[np.int64]:
        digests = []
        for row, table in enumerate(batch.block_tables):
            first, last = batch.query_start[row : row + 2]
            for position in q[first:last].tolist():
                seen = np.arange(position + 1)
                slots = table[seen // BLOCK_SIZE] * BLOCK_SIZE + seen % BLOCK_SIZE
                digests.append(digest(cache[slots].tolist()))
        return np.array(digests)

    def gated_linear(self, x: Any, weight: Any) -> Any:
        return x

    def take_rows(self, x: Any, rows: Any) -> Any:
        return x[rows]

    def logits(self, x: Any, weight: Any) -> Any:
        return x

    def sample(self, digests: NDArray[np.int64], batch: SampleBatch) -> Sampled:
        if self.fail_next is not None:
            failure, self.fail_next = self.fail_next, None
            raise failure
        assert len(digests) == len(batch.temperature)
        zeros = np.zeros(len(digests), np.float32)
        finite = np.array([value not in self.not_finite for value in digests.tolist()])
        return Sampled((digests % VOCAB_SIZE).astype(np.int32), zeros, zeros, digests, finite)

    def copy_blocks(self, caches: list[Any], copies: NDArray[np.int32]) -> None:
        for source, target, count in copies.tolist():
            from_slot, to_slot = source * BLOCK_SIZE, target * BLOCK_SIZE
            for cache in caches:
                cache[to_slot : to_slot + count] = cache[from_slot : from_slot + count]

    def launch(self, compute: Any, batch: Batch, sampling: SampleBatch | None) -> Any:
        """As ops that run ahead: ids that were sampled by the step before come from there."""
        self.num_prompt_steps += len(batch.token_ids) > len(batch.context_lens)
        ids = batch.token_ids.copy()
        ids[ids < 0] = self.sampled[-1 - ids[ids < 0]]
        result = compute(self.place(replace(batch, token_ids=ids)), sampling)
        self.sampled = np.zeros(0, np.int32) if result is None else result.token_ids
        return result

    def collect(self, launched: Any) -> Any:
        return launched

    def to_host(self, x: Any) -> Any:
        return x

    def close(self) -> None:
        pass
