"""Who holds which block of the KV cache, and which prompt blocks are there to be shared.

Every block is in exactly one of three states: free; held by one or more sequences; or reusable,
held by nobody but still known by its content (a full block of some prompt, or the end of one),
until it is needed for something else, least recently used first. Content is found by its tokens
themselves and its predecessor, never by a hash alone, so two different prompts cannot be confused.
A full block is shared as it is; the block that a prompt ends in is still written to by its first
holder, so others take a copy of the prompt's part of it.
"""

import heapq
from collections import OrderedDict
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from orcd_batch.backend.ops import BLOCK_SIZE

# (serial of the block before it, 0 for none; its token ids: 64, or fewer where the prompt ends)
PrefixKey = tuple[int, tuple[int, ...]]

# Prompts whose pieces are kept at hand, for their other samples.
_MAX_CUT_PROMPTS = 256


@dataclass(slots=True)
class PrefixBlock:
    """A prompt block. serial: never given out twice, so a successor's key is unambiguous.

    end: the prompt position after its last token. computed: whether its keys and values are in
    place; before that, nobody may share it.
    """

    key: PrefixKey
    block: int
    serial: int
    end: int
    computed: bool = False


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """The first num_positions of block `source` are to be copied to block `target`."""

    source: int
    target: int
    num_positions: int


@dataclass(frozen=True, slots=True)
class Allocation:
    """Blocks for one sequence, of which the first num_shared are computed already.

    copy: what else of the prompt is there once it is done. Its source is held until `end_copy`.
    """

    block_table: NDArray[np.int32]
    num_shared: int
    copy: BlockCopy | None = None

    @property
    def num_positions(self) -> int:
        """Prompt positions that need not be computed."""
        copied = self.copy.num_positions if self.copy else 0
        return self.num_shared * BLOCK_SIZE + copied


class BlockManager:
    """Hands out blocks with reference counts; plain Python, no device memory.

    prefix_caching: False never shares a block.
    """

    def __init__(self, num_blocks: int, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self._prefix_caching = prefix_caching
        self._free = list(range(num_blocks))
        self._references = [0] * num_blocks
        self._prefixes: dict[PrefixKey, PrefixBlock] = {}
        self._prefix_of_block: dict[int, PrefixBlock] = {}
        self._reusable: OrderedDict[int, None] = OrderedDict()
        self._serials = count(1)
        self._cut_prompts: OrderedDict[int, tuple[Items[int], list[tuple[int, ...]]]] = (
            OrderedDict()
        )

    @property
    def num_available(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free) + len(self._reusable)

    def is_prefix_pending(self, prompt: Items[int]) -> bool:
        """Whether a running sequence is about to compute a block that this prompt could share."""
        shared = self._known_prefix(prompt)
        return bool(shared) and not shared[-1].computed

    def allocate(self, prompt: Items[int], num_positions: int) -> Allocation | None:
        """Blocks for num_positions positions of a sequence that begins with prompt.

        Shares every computed full block of the prompt, copies its computed end, and registers the
        others so that later prompts can. None, and nothing changed, when there are too few blocks.
        """
        shared = [known for known in self._known_prefix(prompt) if known.computed]
        end = shared.pop() if shared and shared[-1].end % BLOCK_SIZE else None
        num_blocks = max(-(-num_positions // BLOCK_SIZE), len(shared))
        if end is not None and not self._has_room([*shared, end], num_blocks - len(shared)):
            end = None
        if not self._has_room(shared, num_blocks - len(shared)):
            return None
        for known in (*shared, *([end] if end else [])):
            self._hold(known.block)
        blocks = [known.block for known in shared]
        blocks.extend(self._take() for _ in range(num_blocks - len(shared)))
        if self._prefix_caching:
            self._register(prompt, blocks, shared)
        copy = None
        if end is not None:
            copy = BlockCopy(end.block, blocks[len(shared)], end.end % BLOCK_SIZE)
        return Allocation(np.array(blocks, np.int32), len(shared), copy)

    def end_copy(self, copy: BlockCopy) -> None:
        """The copy is under way, ahead of whatever is written next: its source is let go."""
        self._let_go(copy.source)

    def grow(self, block_table: NDArray[np.int32], num_positions: int) -> NDArray[np.int32] | None:
        """The table with blocks added for num_positions positions; None when there are too few."""
        missing = -(-num_positions // BLOCK_SIZE) - len(block_table)
        if missing > self.num_available:
            return None
        added = [self._take() for _ in range(missing)]
        return np.concatenate([block_table, np.array(added, np.int32)])

    def mark_computed(self, block_table: NDArray[np.int32], num_computed_tokens: int) -> None:
        """The prompt's first num_computed_tokens are in place; their blocks may be shared."""
        for block in block_table[: -(-num_computed_tokens // BLOCK_SIZE)].tolist():
            known = self._prefix_of_block.get(block)
            if known is not None and known.end <= num_computed_tokens:
                known.computed = True

    def free(self, block_table: NDArray[np.int32]) -> None:
        """One holder lets go of the table's blocks; the computed prompt blocks stay reusable."""
        for block in reversed(block_table.tolist()):
            self._let_go(block)

    def _let_go(self, block: int) -> None:
        self._references[block] -= 1
        assert self._references[block] >= 0, f"block {block} freed more often than held"
        if self._references[block]:
            return
        known = self._prefix_of_block.get(block)
        if known is not None and known.computed:
            self._reusable[block] = None
        else:
            self._forget(block)
            heapq.heappush(self._free, block)

    def _has_room(self, shared: list[PrefixBlock], num_new: int) -> bool:
        """Whether num_new blocks are to be had beside these, which cannot be taken for them."""
        num_revived = sum(self._references[known.block] == 0 for known in shared)
        return num_new <= self.num_available - num_revived

    def _pieces(self, prompt: Items[int]) -> list[tuple[int, ...]]:
        """The prompt by blocks. An end of one token is left out: the last is always computed."""
        kept = self._cut_prompts.get(id(prompt))
        if kept is not None and kept[0] is prompt:
            return kept[1]
        ends = range(0, len(prompt), BLOCK_SIZE)
        pieces = [tuple(prompt[first : first + BLOCK_SIZE]) for first in ends]
        if pieces and len(pieces[-1]) == 1:
            pieces.pop()
        self._cut_prompts[id(prompt)] = (prompt, pieces)
        if len(self._cut_prompts) > _MAX_CUT_PROMPTS:
            self._cut_prompts.popitem(last=False)
        return pieces

    def _known_prefix(self, prompt: Items[int]) -> list[PrefixBlock]:
        """The prompt's blocks that are known, in order, up to the first not yet computed."""
        found: list[PrefixBlock] = []
        if not self._prefix_caching:
            return found
        serial = 0
        for piece in self._pieces(prompt):
            known = self._prefixes.get((serial, piece))
            if known is None:
                break
            found.append(known)
            if not known.computed:
                break
            serial = known.serial
        return found

    def _register(self, prompt: Items[int], blocks: list[int], shared: list[PrefixBlock]) -> None:
        serial = shared[-1].serial if shared else 0
        for index, piece in enumerate(self._pieces(prompt)[len(shared) :], len(shared)):
            key = (serial, piece)
            if key in self._prefixes:
                return
            end = index * BLOCK_SIZE + len(piece)
            known = PrefixBlock(key, blocks[index], next(self._serials), end)
            self._prefixes[key] = self._prefix_of_block[known.block] = known
            serial = known.serial

    def _hold(self, block: int) -> None:
        if self._references[block] == 0:
            del self._reusable[block]
        self._references[block] += 1

    def _take(self) -> int:
        if self._free:
            block = heapq.heappop(self._free)
        else:
            block, _ = self._reusable.popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        return block

    def _forget(self, block: int) -> None:
        known = self._prefix_of_block.pop(block, None)
        if known is not None:
            del self._prefixes[known.key]
