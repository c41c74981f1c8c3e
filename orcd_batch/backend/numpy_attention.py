"""Causal attention over the paged cache, in products of fixed shapes.

A query tile is a few consecutive tokens of one sequence; for each KV head its (tokens * G, D)
queries meet the 64 keys of one block at a time, so every BLAS call has one of two shapes: the
base (one token) and, where `choose_tile_tokens` proves the same bits, a larger one for prefill.
For one token: the maximum over all its scores (exact in any order), exp(score - max), sums over
each block of 64 and p @ v of each block, then the blocks added one after another from the first
visible one on. Blocks outside causality or window add exact zeros, so leaving them out or
computing them with a longer neighbour changes nothing. Keys are masked by replacing their score;
values need no mask because a block is cleared when its first position is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from orcd_batch.backend.numpy_threads import Task, Workers
from orcd_batch.backend.ops import BLOCK_SIZE, KVCache

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
MAX_TILE_ROWS = 16
_PREFILL_CHUNK_TOKENS = 64
_MAX_SCORES = 1 << 20
# Scores of a decode step up to which one thread is done before another has woken up.
_SMALL_SCORES = 1 << 16


@dataclass(frozen=True, slots=True)
class Run:
    """Query tiles [first, last) of a group meet cache blocks [block, block + count).

    The scores go to the group's block columns from `column` on.
    """

    first: int
    last: int
    column: int
    block: int
    count: int


@dataclass(frozen=True, slots=True)
class Group:
    """Query tiles handled together: tokens (n, t) are rows of the packed batch.

    hidden: (n, columns, 1, t, 1, 64), True where the token must not see the key.
    """

    tokens: Ints
    hidden: NDArray[np.bool_]
    runs: tuple[Run, ...]

    @property
    def num_columns(self) -> int:
        return int(self.hidden.shape[1])


def choose_tile_tokens(group_size: int, head_dim: int) -> tuple[int, int]:
    """(base, bulk) tokens per query tile for G query heads per KV head; the same bits for both.

    The base holds at least two rows, since BLAS treats a single row differently. bulk is the
    largest count, up to MAX_TILE_ROWS rows, in which every row keeps its bits on random data.
    """
    base = 1 if group_size > 1 else 2
    generator = np.random.default_rng(head_dim)
    keys = generator.standard_normal((BLOCK_SIZE, head_dim), np.float32)
    for tokens in range(max(base, MAX_TILE_ROWS // group_size), base, -1):
        q = generator.standard_normal((tokens * base * group_size, head_dim), np.float32)
        p = generator.random((len(q), BLOCK_SIZE), np.float32)
        if all(
            np.array_equal(_by_tiles(x, y, tokens), _by_tiles(x, y, base))
            for x, y in ((_split(q, group_size), keys.T), (_split(p, group_size), keys))
        ):
            return base, tokens
    return base, base


def _split(rows: Floats, group_size: int) -> Floats:
    return rows.reshape(-1, group_size, rows.shape[1])


def _by_tiles(x: Floats, y: Floats, tokens: int) -> Floats:
    """(tokens in all, G, K) @ y, `tokens` tokens to a product."""
    tiles = x.reshape(-1, tokens * x.shape[1], x.shape[2])
    products: Floats = np.matmul(tiles, y).reshape(x.shape[0], x.shape[1], -1)
    return products


def plan_groups(
    positions: Ints,
    query_start: Ints,
    block_tables: Ints,
    sliding_window: int,
    tile_tokens: tuple[int, int],
    scores_per_token: int,
    num_threads: int,
) -> list[Group]:
    """Cuts one step's tokens into groups; how they are cut never changes a result.

    positions: (T,). query_start: (B + 1,). block_tables: (B, max_blocks). scores_per_token: H * 64,
    the scores of one token against one block, which bounds a group's memory.
    """
    base, bulk = tile_tokens
    groups: list[Group] = []
    decoding: list[tuple[int, int, int]] = []
    for sequence, (start, stop) in enumerate(
        zip(query_start[:-1].tolist(), query_start[1:].tolist(), strict=True)
    ):
        if stop - start == 1:
            decoding.append((_num_blocks(int(positions[start])), start, sequence))
            continue
        for first in range(start, stop, _PREFILL_CHUNK_TOKENS):
            last = min(stop, first + _PREFILL_CHUNK_TOKENS)
            tokens = _padded_tiles(first, last, bulk)
            groups.append(
                _group(tokens, [sequence] * len(tokens), positions, block_tables, sliding_window)
            )
    decoding.sort()
    limit = max(1, _MAX_SCORES // scores_per_token)
    is_small = sum(blocks for blocks, _, _ in decoding) * scores_per_token < _SMALL_SCORES
    for part in _decode_parts(decoding, limit, 1 if is_small else num_threads):
        tokens = np.array([[start] * base for _, start, _ in part], np.int64)
        groups.append(
            _group(tokens, [s for _, _, s in part], positions, block_tables, sliding_window)
        )
    return groups


def _num_blocks(position: int) -> int:
    return position // BLOCK_SIZE + 1


def _padded_tiles(first: int, last: int, tile_tokens: int) -> Ints:
    """Tokens first … last in rows of tile_tokens, the last token repeated to fill the last row."""
    count = -(-(last - first) // tile_tokens) * tile_tokens
    return np.minimum(np.arange(first, first + count), last - 1).reshape(-1, tile_tokens)


def _decode_parts(
    rows: Sequence[tuple[int, int, int]], limit: int, num_parts: int
) -> list[Sequence[tuple[int, int, int]]]:
    """Rows sorted by blocks, cut where memory, one thread's share or padding would be exceeded."""
    share = -(-len(rows) // num_parts)
    parts = []
    first = 0
    for i in range(1, len(rows) + 1):
        size = i - first
        if (
            i == len(rows)
            or size >= share
            or (size + 1) * rows[i][0] > limit
            or rows[i][0] > 2 * rows[first][0] + 2
        ):
            parts.append(rows[first:i])
            first = i
    return parts


def _group(
    tokens: Ints,
    sequences: Sequence[int],
    positions: Ints,
    block_tables: Ints,
    sliding_window: int,
) -> Group:
    query = positions[tokens]
    last_block = query.max(axis=1) // BLOCK_SIZE
    first_block = np.zeros_like(last_block)
    if sliding_window:
        first_block = np.maximum(query.min(axis=1) - sliding_window + 1, 0) // BLOCK_SIZE
    num_columns = int((last_block - first_block).max()) + 1
    key = (first_block[:, None, None] + np.arange(num_columns)[:, None]) * BLOCK_SIZE + np.arange(
        BLOCK_SIZE
    )
    key, query = key[:, :, None, :], query[:, None, :, None]
    hidden = key > query
    if sliding_window:
        hidden |= key <= query - sliding_window
    runs = _runs(sequences, first_block.tolist(), last_block.tolist(), block_tables)
    return Group(tokens, hidden[:, :, None, :, None, :], tuple(runs))


def _runs(
    sequences: Sequence[int], first_block: list[int], last_block: list[int], block_tables: Ints
) -> list[Run]:
    """Neighbouring blocks of one sequence become one run; tiles of one sequence share its runs."""
    runs: list[Run] = []
    keys = list(zip(sequences, first_block, strict=True))
    i = 0
    while i < len(keys):
        j = i + 1
        while j < len(keys) and keys[j] == keys[i]:
            j += 1
        sequence, first = keys[i]
        table = block_tables[sequence, first : max(last_block[i:j]) + 1]
        breaks = np.flatnonzero(np.diff(table) != 1) + 1
        borders = [0, *breaks.tolist(), len(table)]
        runs.extend(Run(i, j, a, int(table[a]), b - a) for a, b in pairwise(borders))
        i = j
    return runs


def attention(q: Floats, cache: KVCache, groups: Sequence[Group], workers: Workers) -> Floats:
    """(T, H, D), one layer's cache -> (T, H * D)."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = cache.keys.shape[1]
    grouped = (q * np.float32(head_dim**-0.5)).reshape(num_tokens, num_kv_heads, -1, head_dim)
    out = np.empty_like(grouped)

    def task(group: Group) -> Task:
        return lambda: _attend(grouped, out, cache, group)

    workers.run([task(group) for group in groups])
    return out.reshape(num_tokens, num_heads * head_dim)


def _attend(q: Floats, out: Floats, cache: KVCache, group: Group) -> None:
    """One group: q and out are (T, Hkv, G, D), q already scaled by 1 / sqrt(D)."""
    _, num_kv_heads, group_size, head_dim = q.shape
    n, t = group.tokens.shape
    rows = t * group_size
    queries = np.ascontiguousarray(q[group.tokens].transpose(0, 2, 1, 3, 4))
    queries = queries.reshape(n, 1, num_kv_heads, rows, head_dim)
    weights = np.empty((n, group.num_columns, num_kv_heads, rows, BLOCK_SIZE), np.float32)
    partial = np.zeros((n, group.num_columns, num_kv_heads, rows, head_dim), np.float32)
    for run in group.runs:
        keys = cache.keys[run.block : run.block + run.count].transpose(0, 1, 3, 2)
        columns = slice(run.column, run.column + run.count)
        np.matmul(queries[run.first : run.last], keys, out=weights[run.first : run.last, columns])
    _softmax_numerators(weights, group.hidden, t, group_size)
    sums = np.add.reduce(weights, axis=-1)
    for run in group.runs:
        columns = slice(run.column, run.column + run.count)
        np.matmul(
            weights[run.first : run.last, columns],
            cache.values[run.block : run.block + run.count],
            out=partial[run.first : run.last, columns],
        )
    total, denominator = partial[:, 0], sums[:, 0]
    for column in range(1, group.num_columns):
        total += partial[:, column]
        denominator += sums[:, column]
    total /= denominator[..., None]
    heads = total.reshape(n, num_kv_heads, t, group_size, head_dim)
    out[group.tokens] = heads.transpose(0, 2, 1, 3, 4)


def _softmax_numerators(
    weights: Floats, hidden: NDArray[np.bool_], tokens: int, group_size: int
) -> None:
    """Scores (n, columns, Hkv, t * G, 64) become exp(score - max over visible), hidden ones 0."""
    by_token = weights.reshape(*weights.shape[:3], tokens, group_size, BLOCK_SIZE)
    np.copyto(by_token, np.float32(-np.inf), where=hidden)
    weights -= weights.max(axis=1, keepdims=True).max(axis=4, keepdims=True)
    np.exp(weights, out=weights)
