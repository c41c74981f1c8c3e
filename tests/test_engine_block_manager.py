"""Blocks: each in exactly one state, shared by content only, never lost."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orcd_batch.backend.ops import BLOCK_SIZE
from orcd_batch.engine.block_manager import Allocation, BlockCopy, BlockManager


def prompt_of(*contents: int, extra: int = 0) -> list[int]:
    """A prompt of one full block per content, and a few tokens more."""
    return [content for content in contents for _ in range(BLOCK_SIZE)] + [1] * extra


def finish_prefill(manager: BlockManager, allocation: Allocation, prompt: list[int]) -> None:
    manager.mark_computed(allocation.block_table, len(prompt))


def allocate(manager: BlockManager, prompt: list[int], num_positions: int = 0) -> Allocation:
    allocation = manager.allocate(prompt, num_positions or len(prompt))
    assert allocation is not None
    return allocation


def test_a_computed_prompt_block_is_shared_and_a_different_one_is_not() -> None:
    manager = BlockManager(10)
    prompt = prompt_of(5, 6, extra=3)
    first = allocate(manager, prompt)
    assert first.num_shared == 0
    finish_prefill(manager, first, prompt)
    same = allocate(manager, prompt_of(5, 6, extra=9))
    assert same.num_shared == 2
    assert np.array_equal(same.block_table[:2], first.block_table[:2])
    assert same.block_table[2] != first.block_table[2]
    assert allocate(manager, prompt_of(5, 7)).num_shared == 1
    assert allocate(manager, prompt_of(6)).num_shared == 0


def test_a_block_is_shared_only_behind_the_same_beginning() -> None:
    manager = BlockManager(10)
    prompt = prompt_of(1, 2)
    finish_prefill(manager, allocate(manager, prompt), prompt)
    other = prompt_of(3, 2)
    finish_prefill(manager, allocate(manager, other), other)
    assert allocate(manager, prompt_of(3, 2)).num_shared == 2
    assert allocate(manager, prompt_of(2, 2)).num_shared == 0


def test_a_prompt_waits_for_a_block_that_is_being_computed() -> None:
    manager = BlockManager(10)
    prompt = prompt_of(4, 5)
    leader = allocate(manager, prompt)
    assert manager.is_prefix_pending(prompt)
    manager.mark_computed(leader.block_table, BLOCK_SIZE)
    assert manager.is_prefix_pending(prompt)
    assert not manager.is_prefix_pending(prompt_of(4, 9))
    finish_prefill(manager, leader, prompt)
    assert not manager.is_prefix_pending(prompt)


def test_a_prompt_given_up_before_it_was_computed_leaves_nothing_to_share() -> None:
    manager = BlockManager(4)
    manager.free(allocate(manager, prompt_of(4, 5)).block_table)
    assert not manager.is_prefix_pending(prompt_of(4, 5))
    assert allocate(manager, prompt_of(4, 5)).num_shared == 0


def test_finished_prompts_stay_until_their_blocks_are_needed_oldest_first() -> None:
    manager = BlockManager(4)
    for content in (1, 2):
        prompt = prompt_of(content, content)
        held = allocate(manager, prompt)
        finish_prefill(manager, held, prompt)
        manager.free(held.block_table)
    assert manager.num_available == 4
    manager.free(allocate(manager, [0] * 10, num_positions=BLOCK_SIZE).block_table)
    assert allocate(manager, prompt_of(1, 1)).num_shared == 1
    assert allocate(manager, prompt_of(2, 2)).num_shared == 2


def test_without_room_nothing_changes() -> None:
    manager = BlockManager(3)
    held = allocate(manager, prompt_of(1, 2))
    assert manager.allocate(prompt_of(3), 2 * BLOCK_SIZE) is None
    assert manager.num_available == 1
    manager.free(held.block_table)
    assert manager.num_available == 3


def test_reviving_a_reusable_block_does_not_count_it_as_free_as_well() -> None:
    manager = BlockManager(2)
    prompt = prompt_of(1)
    held = allocate(manager, prompt)
    finish_prefill(manager, held, prompt)
    manager.free(held.block_table)
    assert manager.allocate(prompt, 3 * BLOCK_SIZE) is None
    assert manager.allocate(prompt, 2 * BLOCK_SIZE) is not None


def test_without_prefix_caching_nothing_is_shared() -> None:
    manager = BlockManager(8, prefix_caching=False)
    prompt = prompt_of(1, 2)
    finish_prefill(manager, allocate(manager, prompt), prompt)
    assert not manager.is_prefix_pending(prompt)
    assert allocate(manager, prompt).num_shared == 0


def test_the_computed_end_of_a_prompt_is_copied_and_its_source_held_meanwhile() -> None:
    manager = BlockManager(4)
    prompt = prompt_of(5, extra=3)
    leader = allocate(manager, prompt)
    assert manager.is_prefix_pending(prompt)
    manager.mark_computed(leader.block_table, len(prompt) - 1)
    assert manager.is_prefix_pending(prompt), "its last token is not in place yet"
    finish_prefill(manager, leader, prompt)
    twin = allocate(manager, prompt)
    assert twin.copy == BlockCopy(int(leader.block_table[1]), int(twin.block_table[1]), 3)
    assert (twin.num_shared, twin.num_positions) == (1, BLOCK_SIZE + 3)
    manager.free(leader.block_table)
    assert manager.num_available == 1, "the source is held until it has been copied"
    manager.end_copy(twin.copy)
    assert manager.num_available == 2
    assert allocate(manager, prompt_of(5, extra=4)).copy is None


def test_a_copy_is_given_up_where_its_source_is_the_last_block_left() -> None:
    manager = BlockManager(2)
    prompt = prompt_of(5, extra=3)
    held = allocate(manager, prompt)
    finish_prefill(manager, held, prompt)
    manager.free(held.block_table)
    again = allocate(manager, prompt)
    assert (again.num_shared, again.copy) == (1, None)
    assert manager.num_available == 0


def test_an_end_of_one_token_is_computed_and_never_waited_for() -> None:
    manager = BlockManager(4)
    finish_prefill(manager, allocate(manager, prompt_of(5)), prompt_of(5))
    allocate(manager, prompt_of(5, extra=1))
    assert not manager.is_prefix_pending(prompt_of(5, extra=1))
    assert allocate(manager, prompt_of(5, extra=1)).copy is None


class BlockMachine(RuleBasedStateMachine):
    """Random allocations, progress and releases over a handful of prompts."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(9)
        self.held: list[tuple[Allocation, list[int], int]] = []
        self.copies: list[tuple[BlockCopy, list[int]]] = []

    @rule(
        contents=st.lists(st.integers(1, 2), max_size=3),
        extra=st.integers(1, 70),
        growth=st.integers(0, 130),
    )
    def allocate(self, contents: list[int], extra: int, growth: int) -> None:
        prompt = prompt_of(*contents, extra=extra)
        if self.manager.is_prefix_pending(prompt):
            return
        before = self.manager.num_available
        allocation = self.manager.allocate(prompt, len(prompt) + growth)
        if allocation is None:
            assert self.manager.num_available == before
        else:
            self.held.append((allocation, prompt, allocation.num_positions))
            if allocation.copy is not None:
                assert allocation.copy.target in allocation.block_table
                assert allocation.copy.source not in allocation.block_table
                self.copies.append((allocation.copy, prompt))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), tokens=st.integers(1, 100))
    def compute(self, data: st.DataObject, tokens: int) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        allocation, prompt, computed = self.held[index]
        computed = min(len(prompt), computed + tokens)
        self.manager.mark_computed(allocation.block_table, computed)
        self.held[index] = (allocation, prompt, computed)

    @precondition(lambda self: self.copies)
    @rule()
    def end_copy(self) -> None:
        self.manager.end_copy(self.copies.pop(0)[0])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        allocation = self.held.pop(index)[0]
        for pending in [pair for pair in self.copies if pair[0] is allocation.copy]:
            self.manager.end_copy(pending[0])
            self.copies.remove(pending)
        self.manager.free(allocation.block_table)

    @invariant()
    def every_block_is_held_or_available(self) -> None:
        held = {int(b) for allocation, _, _ in self.held for b in allocation.block_table}
        held |= {copy.source for copy, _ in self.copies}
        assert len(held) + self.manager.num_available == 9

    @invariant()
    def blocks_in_two_tables_hold_the_same_beginning_of_a_prompt(self) -> None:
        content: dict[int, tuple[int, list[int]]] = {}
        for allocation, prompt, _ in self.held:
            for index, block in enumerate(allocation.block_table.tolist()):
                beginning = prompt[: (index + 1) * BLOCK_SIZE]
                full = len(beginning) == (index + 1) * BLOCK_SIZE
                if block in content:
                    assert full
                    assert content[block] == (index, beginning)
                content[block] = (index, beginning)

    @invariant()
    def the_source_of_a_copy_holds_the_same_end_of_a_prompt(self) -> None:
        for copy, prompt in self.copies:
            known = self.manager._prefix_of_block[copy.source]
            assert known.computed
            assert known.end == len(prompt)
            assert list(known.key[1]) == prompt[-copy.num_positions :]

    def teardown(self) -> None:
        for copy, _ in self.copies:
            self.manager.end_copy(copy)
        for allocation, _, _ in self.held:
            self.manager.free(allocation.block_table)
        assert self.manager.num_available == 9


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
