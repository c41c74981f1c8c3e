"""x @ weight.T through BLAS calls of one fixed shape, so that a row's bits are its own.

BLAS sums in an order that depends on the shape of the call. Here the weight is cut into panels of
a fixed number of rows and x into tiles of TILE_ROWS rows (the last one padded), and every call
multiplies one tile with one panel on one thread: batch size and thread count choose how many such
calls there are, never their shape. That still leaves a row's bits to its place within the tile,
and small tiles are slow for long prompts; `choose_plan` therefore proves, on the BLAS at hand, that
every place gives the same bits, and accepts a larger tile only when it gives those same bits too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from orcd_batch.backend.numpy_threads import Task, Workers

Floats = NDArray[np.float32]
# "rows": tile (t, K) @ panel.T (K, P); "transposed": the same with the tile stored as (K, t).
# "columns": panel (P, K) @ tile.T (K, t).
Order = Literal["rows", "transposed", "columns"]

TILE_ROWS = 16
# OpenBLAS multiplies matrices of up to this many multiply-adds without packing them first, on
# CPUs with AVX-512 only; there that is the fastest way to use a weight once.
_UNPACKED_LIMIT = 1_000_000
_UNPACKED_KERNELS = ("SkylakeX", "Cooperlake", "SapphireRapids")
# There a transposed tile is the faster one from about this inner size on.
_TRANSPOSED_FROM = 768
# Tiles of one group share one pass over the weight; this bounds the group's work arrays.
_MAX_GROUP_ROWS = 256
_TASKS_PER_THREAD = 2
# Multiply-adds that take about as long as waking another thread.
_SMALL_PRODUCT = 1 << 21


@dataclass(frozen=True, slots=True)
class TileShape:
    """One BLAS call: `panel_rows` rows of the weight times `tile_rows` rows of x."""

    order: Order
    panel_rows: int
    tile_rows: int

    def __str__(self) -> str:
        return f"{self.order} {self.panel_rows}x{self.tile_rows}"


@dataclass(frozen=True, slots=True)
class Plan:
    """How products over one K are cut: `tile` always works, `bulk` has the same bits or is None."""

    tile: TileShape
    bulk: TileShape | None


@dataclass(frozen=True, slots=True)
class PanelWeight:
    """A linear weight (N, K): rows (N + padding, K) fp32, padded with zeros to whole panels."""

    rows: Floats
    num_rows: int
    plan: Plan

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes


def candidate_shapes(k: int, blas_kernel: str) -> tuple[Sequence[TileShape], Sequence[TileShape]]:
    """(base shapes, bulk shapes) for inner size k, best first; a rule, never a timing."""
    if blas_kernel in _UNPACKED_KERNELS and 32 * TILE_ROWS * k <= _UNPACKED_LIMIT:
        order: Order = "transposed" if k >= _TRANSPOSED_FROM else "rows"
        base = TileShape(order, 32, TILE_ROWS)
        bulk = [TileShape(order, 16, 64), TileShape(order, 16, 32)]
    else:
        base = TileShape("columns", 256, TILE_ROWS)
        bulk = [
            TileShape("columns", 256, 128),
            TileShape("rows", 256, 128),
            TileShape("columns", 256, 64),
            TileShape("rows", 256, 64),
        ]
    return [base, TileShape("columns", base.panel_rows, 1)], bulk


def choose_plan(k: int, blas_kernel: str) -> Plan:
    """The first base shape in which a row's bits do not depend on its place, and bulk to match.

    Tried on random data: every row of a base tile in every place of it, and every place of a bulk
    tile with four different rows. A one-row tile, the last resort, needs no proof.
    """
    bases, bulks = candidate_shapes(k, blas_kernel)
    generator = np.random.default_rng(k)
    x = generator.standard_normal((bulks[0].tile_rows, k), np.float32)
    panel = generator.standard_normal((bases[0].panel_rows, k), np.float32)
    for base in bases:
        few = x[: base.tile_rows]
        if not _gives(multiply(few, panel, base), few, panel, base, base.tile_rows):
            continue
        expected = multiply(x, panel, base)
        matching = (b for b in bulks if base.tile_rows > 1 and _gives(expected, x, panel, b, 4))
        return Plan(base, next(matching, None))
    raise AssertionError("a one-row tile has one place only")


def _gives(expected: Floats, x: Floats, panel: Floats, shape: TileShape, num_turns: int) -> bool:
    """Whether `shape` gives each row of x its expected bits, at `num_turns` turns of the rows."""
    steps = range(0, shape.tile_rows, shape.tile_rows // num_turns)
    return all(
        np.array_equal(
            multiply(np.roll(x, turn, axis=0), panel, shape), np.roll(expected, turn, axis=0)
        )
        for turn in steps
    )


def multiply(x: Floats, rows: Floats, shape: TileShape) -> Floats:
    """(t * n, K), (P * m, K) -> (t * n, P * m), in calls of exactly `shape` on this thread."""
    out = np.empty((len(x), len(rows)), np.float32)
    _multiply_into(out, _tiles(x, shape), rows, shape)
    return out


def linear(x: Floats, weight: PanelWeight, workers: Workers) -> Floats:
    """(T, K), (N, K) -> (T, N), fp32, contiguous."""
    num_tokens = len(x)
    out = np.empty((num_tokens, weight.num_rows), np.float32)
    start = 0
    while start < num_tokens:
        shape, count = _next_group(weight.plan, num_tokens - start)
        stop = min(num_tokens, start + count)
        _linear_group(x[start:stop], out[start:stop], weight, shape, workers)
        start = stop
    return out


def _next_group(plan: Plan, remaining: int) -> tuple[TileShape, int]:
    """The tile shape for the next rows of x, and for how many rows."""
    if plan.bulk is None or remaining <= plan.bulk.tile_rows // 2:
        return plan.tile, min(remaining, _MAX_GROUP_ROWS)
    size = plan.bulk.tile_rows
    if remaining < size:
        return plan.bulk, remaining
    return plan.bulk, min(remaining, _MAX_GROUP_ROWS) // size * size


def _linear_group(
    x: Floats, out: Floats, weight: PanelWeight, shape: TileShape, workers: Workers
) -> None:
    num_rows = len(x)
    padding = -num_rows % shape.tile_rows
    if padding:
        x = np.concatenate([x, np.zeros((padding, x.shape[1]), np.float32)])
    tiles = _tiles(x, shape)
    target = out
    if padding or len(weight.rows) != weight.num_rows:
        target = np.empty((len(x), len(weight.rows)), np.float32)
    num_panels = len(weight.rows) // shape.panel_rows
    workers.run(_shares(target, tiles, weight.rows, shape, num_panels, workers.num_threads))
    if target is not out:
        out[:] = target[:num_rows, : weight.num_rows]


def _shares(
    out: Floats, tiles: Floats, rows: Floats, shape: TileShape, num_panels: int, num_threads: int
) -> list[Task]:
    """A few tasks per thread, each with a run of neighbouring panels; one where it is small."""
    is_small = out.size * rows.shape[1] < _SMALL_PRODUCT
    num_shares = 1 if is_small or num_threads == 1 else _TASKS_PER_THREAD * num_threads
    num_shares = min(num_shares, num_panels)
    borders = [num_panels * i // num_shares * shape.panel_rows for i in range(num_shares + 1)]

    def share(first: int, last: int) -> Task:
        return lambda: _multiply_into(out[:, first:last], tiles, rows[first:last], shape)

    return [share(a, b) for a, b in pairwise(borders)]


def _tiles(x: Floats, shape: TileShape) -> Floats:
    """x cut into tiles (n, t, K), stored as (n, K, t) unless the order is "rows"."""
    tiles = x.reshape(-1, shape.tile_rows, x.shape[1])
    if shape.order == "rows":
        return tiles
    return np.ascontiguousarray(tiles.transpose(0, 2, 1)).transpose(0, 2, 1)


def _multiply_into(out: Floats, tiles: Floats, rows: Floats, shape: TileShape) -> None:
    """out (n * t, P * m) = every tile times every panel of rows (P * m, K)."""
    panels = rows.reshape(-1, 1, shape.panel_rows, rows.shape[1])
    num_panels, num_tiles = len(panels), len(tiles)
    target = np.lib.stride_tricks.as_strided(
        out,
        (num_panels, num_tiles, shape.tile_rows, shape.panel_rows),
        (
            shape.panel_rows * out.strides[1],
            shape.tile_rows * out.strides[0],
            out.strides[0],
            out.strides[1],
        ),
    )
    if shape.order == "columns":
        target[...] = np.matmul(panels, tiles.transpose(0, 2, 1)).transpose(0, 1, 3, 2)
    else:
        np.matmul(tiles, panels.transpose(0, 1, 3, 2), out=target)
