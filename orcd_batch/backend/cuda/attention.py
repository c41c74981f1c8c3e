"""How attention is laid out on a card: warps, stages, shared memory. None of it changes a bit."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from orcd_batch.backend.cuda.device import Device, runs_sm90a
from orcd_batch.backend.cuda.program import int32
from orcd_batch.backend.ops import BLOCK_SIZE
from orcd_batch.errors import DeviceError

# As in kernels/attention.cuh, where they fix the arithmetic: tiles of BLOCK_SIZE keys, so many to a
# split, rows in mma tiles of 16.
SPLIT_TILES = 4
MMA_ROWS = 16
# As in kernels/attention_decode.cu: sequences of one chunk.
CHUNK_MEMBERS = 32

MAX_HEAD_DIM = 128

# Tiles that a decode warp keeps in shared memory (each loaded again, keys and values apart, as soon
# as it has been used), and the most warps of a block: that many, or as registers allow, which go by
# the head dim. Measured on an H200 in kernels/README.md, as are the prefill's.
DECODE_STAGES = 1
MAX_DECODE_WARPS = 12
# Up to so many sequences times KV heads a warp has little to do: more of its tiles are under way.
FEW_DECODE_ITEMS = 128
FEW_DECODE_STAGES = 2
_DECODE_WARPS_TIMES_HEAD_DIM = 768
# With at least so many sequences times KV heads for every warp, one takes all splits of a sequence,
# up to RUN_SPLITS of them; that saves writing and merging them.
WHOLE_RUNS = True
RUNS_PER_WARP = 2
RUN_SPLITS = 8
PREFILL_STAGES = 2
PREFILL_WARPS = 4
PREFILL_ROW_TILES = 1
# On Hopper a kernel with wgmma stands in for it, with the same bits; how many of its warps own rows
# depends on the head dim.
USE_WGMMA = True
WGMMA_STAGES = 4
MERGE_WARPS = 4
MERGE_BLOCKS = 16

_UNLIMITED = 2**31 - 1
_WARP = 32
_TEAM_ROWS = 64
# The decode kernel's running sum has one int a warp in static shared memory, and alignment.
_STATIC_SHARED_BYTES = 256
# At least what `struct Shared` of kernels/attention_prefill_sm90a.cu takes.
_WGMMA_BARRIER_BYTES = 512
# Shared splits on Hopper: the most tiles, keys and values apart, that four warps keep, and at least
# what `struct Desk` of kernels/attention_shared_sm90a.cu takes beside them.
MAX_SHARED_STAGES = 8
_DESK_BYTES = 1024


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One variant of an attention kernel; the sizes in bytes are per block of threads.

    num_warps: those that own rows. row_tiles, num_stages: 0 where the kernel has none. arch: where
    the card's generic one will not do. whole_runs: a decode warp takes all splits of a sequence of
    up to RUN_SPLITS, and nothing is left to merge.
    """

    kernel: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_warps: int
    row_tiles: int
    num_stages: int
    min_blocks: int
    shared_bytes: int
    loader_warps: int = 0
    arch: str | None = None
    whole_runs: bool = False

    @property
    def defines(self) -> dict[str, int]:
        macros = {
            "NUM_HEADS": self.num_heads,
            "NUM_KV_HEADS": self.num_kv_heads,
            "HEAD_DIM": self.head_dim,
            "WARPS": self.num_warps,
            "ROW_TILES": self.row_tiles,
            "STAGES": self.num_stages,
            "MIN_BLOCKS": self.min_blocks,
        }
        return {name: value for name, value in macros.items() if value}

    @property
    def threads(self) -> int:
        return (self.num_warps + self.loader_warps) * _WARP

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    def max_blocks(self, max_model_len: int) -> int:
        """Cache blocks of the longest sequence."""
        return -(-max_model_len // BLOCK_SIZE)

    def num_row_blocks(self, num_tokens: int, num_seqs: int) -> int:
        """Prefill: an upper bound on the blocks of rows, whatever the sequences' lengths."""
        rows = self.num_warps * max(self.row_tiles, 1) * MMA_ROWS
        return num_tokens * self.group // rows + num_seqs

    def partial_floats(self, num_seqs: int, max_blocks: int) -> int:
        """Room for every split's output, maximum and sum."""
        splits = num_seqs * -(-max_blocks // SPLIT_TILES)
        units = num_units(self.num_heads, self.num_kv_heads)
        return splits * units * item_floats(self.group, self.head_dim)

    def num_merge_blocks(self, num_seqs: int, sm_count: int) -> int:
        """Merge: a warp for each sequence and head, as long as the card holds them all at once."""
        wanted = -(-num_seqs * self.num_heads // self.num_warps)
        return min(wanted, sm_count * MERGE_BLOCKS)


@lru_cache(maxsize=64)
def _check_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    if head_dim % 16 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise DeviceError(
            f"This model's head dim is {head_dim} and the GPU's attention needs a multiple of 16 "
            f"up to {MAX_HEAD_DIM}; use engine=numpy."
        )
    if num_heads % num_kv_heads:
        raise DeviceError(
            f"This model has {num_heads} query heads for {num_kv_heads} KV heads and the GPU's "
            "attention needs a whole number of them each; use engine=numpy."
        )


def decode_shape(
    device: Device, num_heads: int, num_kv_heads: int, head_dim: int, num_seqs: int
) -> AttentionShape:
    """One query per sequence: as many warps, each with its own stages, as shared memory holds."""
    _check_heads(num_heads, num_kv_heads, head_dim)
    group = num_heads // num_kv_heads
    lists = 4 * (3 * num_seqs + 1) + 2 * num_seqs
    is_small = num_seqs * num_kv_heads <= FEW_DECODE_ITEMS
    num_stages = FEW_DECODE_STAGES if is_small else DECODE_STAGES
    query_bytes = min(group, MMA_ROWS) * head_dim * 2
    warp_bytes = num_stages * (_stage_bytes(head_dim) + query_bytes)
    room = device.max_shared_memory - _STATIC_SHARED_BYTES - lists
    if room < warp_bytes:
        raise DeviceError(
            f"Attention over {num_seqs} sequences needs {warp_bytes + lists:,} bytes of shared "
            f"memory and {device.name} has {device.max_shared_memory:,}; lower "
            "engine.max_num_seqs."
        )
    most_warps = min(MAX_DECODE_WARPS, _DECODE_WARPS_TIMES_HEAD_DIM // head_dim)
    num_warps = min(room // warp_bytes, most_warps)
    item_bytes = 4 * item_floats(group, head_dim)
    units = num_units(num_heads, num_kv_heads)
    whole_runs = WHOLE_RUNS and num_seqs * units >= RUNS_PER_WARP * device.sm_count * num_warps
    if whole_runs:
        num_warps = min(num_warps, max(room // (warp_bytes + item_bytes), 1))
        whole_runs = room >= warp_bytes + item_bytes
    kept_bytes = item_bytes if whole_runs else 0
    shared_bytes = num_warps * (warp_bytes + kept_bytes) + lists
    heads = (num_heads, num_kv_heads, head_dim)
    shape = (num_warps, 0, num_stages, 1, shared_bytes)
    return AttentionShape("attention_decode", *heads, *shape, whole_runs=whole_runs)


def merge_shape(num_heads: int, num_kv_heads: int, head_dim: int) -> AttentionShape:
    """Puts a decode query's splits together."""
    heads = (num_heads, num_kv_heads, head_dim)
    return AttentionShape("attention_merge", *heads, MERGE_WARPS, 0, 0, 1, 0)


def prefill_shape(num_heads: int, num_kv_heads: int, head_dim: int) -> AttentionShape:
    """Several queries per sequence; registers for as many blocks per SM as go without spills."""
    _check_heads(num_heads, num_kv_heads, head_dim)
    parked = PREFILL_WARPS * PREFILL_ROW_TILES * (head_dim // 8 + 1) * _WARP * 16
    shared_bytes = PREFILL_STAGES * _stage_bytes(head_dim) + parked
    min_blocks = 3 if head_dim <= 64 else 2
    shape = (PREFILL_WARPS, PREFILL_ROW_TILES, PREFILL_STAGES, min_blocks, shared_bytes)
    return AttentionShape("attention_prefill", num_heads, num_kv_heads, head_dim, *shape)


def wgmma_prefill_shape(num_heads: int, num_kv_heads: int, head_dim: int) -> AttentionShape:
    """The same on sm_90: one block per SM, as many rows as registers hold, and a warp that loads.

    Registers are moved between groups of four warps, so the loading warp comes with three idle.
    """
    _check_heads(num_heads, num_kv_heads, head_dim)
    num_warps = _wgmma_warps(head_dim)
    parked = num_warps * (head_dim // 8 + 1) * _WARP * 16
    shared_bytes = WGMMA_STAGES * _stage_bytes(head_dim) + parked + _WGMMA_BARRIER_BYTES
    heads = (num_heads, num_kv_heads, head_dim)
    shape = (num_warps, 0, WGMMA_STAGES, 1, shared_bytes)
    return AttentionShape("attention_prefill_sm90a", *heads, *shape, 4, "sm_90a")


def shared_shape(
    device: Device, num_heads: int, num_kv_heads: int, head_dim: int
) -> AttentionShape:
    """Splits that decoding sequences share, on sm_90: teams of four warps, 64 rows each.

    Registers are moved between groups of four warps: one more is made up of those that load.
    """
    _check_heads(num_heads, num_kv_heads, head_dim)
    num_warps = _wgmma_warps(head_dim)
    rows = min(CHUNK_MEMBERS * (num_heads // num_kv_heads), _TEAM_ROWS)
    room = device.max_shared_memory // (num_warps // 4) - rows * head_dim * 2 - _DESK_BYTES
    tile_bytes = _stage_bytes(head_dim) // 2
    num_stages = min(room // tile_bytes, MAX_SHARED_STAGES)
    team_bytes = num_stages * tile_bytes + rows * head_dim * 2 + _DESK_BYTES
    heads = (num_heads, num_kv_heads, head_dim)
    shape = (num_warps, 0, num_stages, 1, num_warps // 4 * team_bytes)
    return AttentionShape("attention_shared_sm90a", *heads, *shape, 4, "sm_90a")


def has_wgmma(device: Device) -> bool:
    """Whether kernels with wgmma stand in for the generic ones."""
    return USE_WGMMA and runs_sm90a(device)


def best_prefill_shape(
    device: Device, num_heads: int, num_kv_heads: int, head_dim: int
) -> AttentionShape:
    """The fastest kernel that this card has for several queries per sequence; bits are the same."""
    shape = wgmma_prefill_shape if has_wgmma(device) else prefill_shape
    return shape(num_heads, num_kv_heads, head_dim)


def _wgmma_warps(head_dim: int) -> int:
    """That own rows: as many as registers allow."""
    return 12 if head_dim <= 96 else 8


def num_units(num_heads: int, num_kv_heads: int) -> int:
    """Items of a decode query's split: a row tile of a KV head each."""
    return num_kv_heads * -(-(num_heads // num_kv_heads) // MMA_ROWS)


def item_floats(group: int, head_dim: int) -> int:
    """What is left of one split of a KV head's rows: see kernels/attention_partials.cuh."""
    return -(-min(group, MMA_ROWS) * (head_dim + 2) // 4) * 4


def score_scale(head_dim: int) -> np.float32:
    """What scores are multiplied by, the weights being powers of two."""
    return np.float32(math.log2(math.e) / math.sqrt(head_dim))


def reach(sliding_window: int) -> np.int32:
    """How many positions a query sees, its own the last of them; sliding_window 0 is all."""
    return int32(sliding_window or _UNLIMITED)


def _stage_bytes(head_dim: int) -> int:
    """One tile of keys and one of values, fp16."""
    return 2 * BLOCK_SIZE * head_dim * 2
