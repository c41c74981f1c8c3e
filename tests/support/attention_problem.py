"""A step of attention made up at random: queries, a paged cache with poison in its unused slots."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orcd_batch.backend.ops import BLOCK_SIZE, Batch

Halves = NDArray[np.float16]


@dataclass(frozen=True)
class AttentionProblem:
    """q: (T, H, D). keys, values: (num_blocks, Hkv, 64, D), NaN or infinite where nothing lies."""

    q: Halves
    keys: Halves
    values: Halves
    batch: Batch

    def clean(self, cache: Halves) -> NDArray[np.float32]:
        """The cache as numpy's attention expects it: zeros in unused slots."""
        return np.nan_to_num(cache.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)

    def take(self, sequences: list[int]) -> "AttentionProblem":
        """The same step with only these sequences, in this order; the cache stays."""
        start = self.batch.query_start
        tokens = np.concatenate([np.arange(start[s], start[s + 1]) for s in sequences])
        batch = Batch(
            token_ids=self.batch.token_ids[tokens],
            positions=self.batch.positions[tokens],
            slot_mapping=self.batch.slot_mapping[tokens],
            query_start=_running(np.diff(start)[sequences]),
            context_lens=self.batch.context_lens[sequences],
            block_tables=self.batch.block_tables[sequences],
            logits_rows=np.zeros(0, np.int32),
        )
        return AttentionProblem(self.q[tokens], self.keys, self.values, batch)


def attention_problem(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    sequences: list[tuple[int, int]],
    *,
    seed: int = 0,
    scale: float = 1.0,
) -> AttentionProblem:
    """sequences: (context, queries) of each; the queries are the last ones of the context."""
    rng = np.random.default_rng(seed)
    counts = [-(-context // BLOCK_SIZE) for context, _ in sequences]
    num_blocks = sum(counts) + 3
    order = rng.permutation(num_blocks).astype(np.int32)
    tables = np.zeros((len(sequences), max(counts) + 1), np.int32)
    shape = (num_blocks, num_kv_heads, BLOCK_SIZE, head_dim)
    keys = np.full(shape, np.nan, np.float16)
    values = np.full(shape, np.inf, np.float16)
    positions, slots = [], []
    for s, (context, queries) in enumerate(sequences):
        blocks = order[sum(counts[:s]) :][: counts[s]]
        tables[s, : counts[s]] = blocks
        places = np.arange(context)
        for cache, factor in ((keys, scale), (values, 1.0)):
            cache[blocks[places // BLOCK_SIZE], :, places % BLOCK_SIZE] = factor * (
                rng.standard_normal((context, num_kv_heads, head_dim), np.float32)
            )
        new = places[context - queries :]
        positions.append(new)
        slots.append(blocks[new // BLOCK_SIZE] * BLOCK_SIZE + new % BLOCK_SIZE)
    query_counts = np.array([queries for _, queries in sequences])
    num_tokens = int(query_counts.sum())
    q = rng.standard_normal((num_tokens, num_heads, head_dim), np.float32) * scale
    batch = Batch(
        token_ids=np.zeros(num_tokens, np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        slot_mapping=np.concatenate(slots).astype(np.int32),
        query_start=_running(query_counts),
        context_lens=np.array([context for context, _ in sequences], np.int32),
        block_tables=tables,
        logits_rows=np.zeros(0, np.int32),
    )
    return AttentionProblem(q.astype(np.float16), keys, values, batch)


def shared_problem(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    groups: list[tuple[int, list[int]]],
    *,
    seed: int = 0,
) -> AttentionProblem:
    """A decode step of sequences in groups, in mixed order.

    groups: (blocks that all of a group's sequences share, their contexts); a context ends in the
    shared blocks or beyond.
    """
    contexts = [context for _, group in groups for context in group]
    problem = attention_problem(
        num_heads, num_kv_heads, head_dim, [(context, 1) for context in contexts], seed=seed
    )
    tables = problem.batch.block_tables
    first = 0
    for num_shared, group in groups:
        longest = first + int(np.argmax(group))
        rows = slice(first, first + len(group))
        tables[rows, :num_shared] = tables[longest, :num_shared]
        first += len(group)
    order = np.random.default_rng(seed).permutation(len(contexts))
    return problem.take(order.tolist())


def _running(counts: NDArray[np.int64]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
