"""Who holds which block of the KV cache, and which prompt blocks are there to be shared.

Every block is in exactly one of three states: free; held by one or more sequences; or reusable,
held by nobody but still known by its content (a full block of some prompt), until it is needed
for something else, least recently used first. Content is found by its tokens themselves and its
predecessor, never by a hash alone, so two different prompts cannot be confused.
"""

import heapq
from collections import OrderedDict
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from orcd_batch.backend.ops import BLOCK_SIZE

# (serial of the block before it, 0 for none; its 64 token ids)
PrefixKey = tuple[int, tuple[int, ...]]


@dataclass(slots=True)
class PrefixBlock:
    """A full prompt block. serial: never given out twice, so a successor's key is unambiguous.

    computed: whether its keys and values are in place; before that, nobody may share it.
    """

    key: PrefixKey
    block: int
    serial: int
    computed: bool = False


@dataclass(frozen=True, slots=True)
class Allocation:
    """Blocks for one sequence, of which the first num_shared are computed already."""

    block_table: NDArray[np.int32]
    num_shared: int


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

        Shares every computed full block of the prompt, registers the others so that later prompts
        can. None, and nothing changed, when there are too few blocks.
        """
        shared = [known for known in self._known_prefix(prompt) if known.computed]
        num_blocks = max(-(-num_positions // BLOCK_SIZE), len(shared))
        num_new = num_blocks - len(shared)
        num_revived = sum(self._references[known.block] == 0 for known in shared)
        if num_new > self.num_available - num_revived:
            return None
        for known in shared:
            self._hold(known.block)
        blocks = [known.block for known in shared]
        blocks.extend(self._take() for _ in range(num_new))
        if self._prefix_caching:
            self._register(prompt, blocks, shared)
        return Allocation(np.array(blocks, np.int32), len(shared))

    def grow(self, block_table: NDArray[np.int32], num_positions: int) -> NDArray[np.int32] | None:
        """The table with blocks added for num_positions positions; None when there are too few."""
        missing = -(-num_positions // BLOCK_SIZE) - len(block_table)
        if missing > self.num_available:
            return None
        added = [self._take() for _ in range(missing)]
        return np.concatenate([block_table, np.array(added, np.int32)])

    def mark_computed(self, block_table: NDArray[np.int32], num_computed_tokens: int) -> None:
        """The table's blocks up to num_computed_tokens are in place and may be shared."""
        for block in block_table[: num_computed_tokens // BLOCK_SIZE].tolist():
            known = self._prefix_of_block.get(block)
            if known is not None:
                known.computed = True

    def free(self, block_table: NDArray[np.int32]) -> None:
        """One holder lets go of the table's blocks; the computed prompt blocks stay reusable."""
        for block in reversed(block_table.tolist()):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} freed more often than held"
            if self._references[block]:
                continue
            known = self._prefix_of_block.get(block)
            if known is not None and known.computed:
                self._reusable[block] = None
            else:
                self._forget(block)
                heapq.heappush(self._free, block)

    def _known_prefix(self, prompt: Items[int]) -> list[PrefixBlock]:
        """The prompt's full blocks that are known, in order, up to the first not yet computed."""
        found: list[PrefixBlock] = []
        if not self._prefix_caching:
            return found
        serial = 0
        for first in range(0, len(prompt) - BLOCK_SIZE + 1, BLOCK_SIZE):
            known = self._prefixes.get((serial, tuple(prompt[first : first + BLOCK_SIZE])))
            if known is None:
                break
            found.append(known)
            if not known.computed:
                break
            serial = known.serial
        return found

    def _register(self, prompt: Items[int], blocks: list[int], shared: list[PrefixBlock]) -> None:
        serial = shared[-1].serial if shared else 0
        for index in range(len(shared), len(prompt) // BLOCK_SIZE):
            first = index * BLOCK_SIZE
            key = (serial, tuple(prompt[first : first + BLOCK_SIZE]))
            if key in self._prefixes:
                return
            known = PrefixBlock(key, blocks[index], next(self._serials))
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
