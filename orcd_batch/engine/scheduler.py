"""Which tokens of which sequences the next step computes.

Running sequences come first (one token each when decoding, a chunk when their prompt is not done),
then waiting ones as far as tokens, places and blocks allow. A sequence is admitted only when all
the blocks it can ever need are free, so none is preempted. The one that may generate most comes
first, so that no long one is left over when the others are done; among equals the first come. One
that too many later ones have passed comes before all others. A prompt whose blocks another sequence
is computing right now waits for them, and lets others pass. Once all places or blocks are taken,
the next prompts wait until several can be computed in one step, because a step with prompts in it
costs more than their tokens.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from orcd_batch.engine.block_manager import BlockManager
from orcd_batch.engine.sequence import Sequence

# How many times max_num_seqs sequences may be admitted before one that was waiting already.
MAX_TURNS_PASSED = 4
# Steps to the next new prompts after one that filled all places or blocks, unless one in
# MOST_PLACES_LEFT of its sequences has finished. Chosen on a model of the step's cost that meets
# the measured w3 (docs/log.md).
STEPS_BETWEEN_PROMPTS = 8
MOST_PLACES_LEFT = 16
# How many times max_num_seqs waiting sequences are looked at in one step.
_MAX_TURNS_LOOKED_AT = 4


@dataclass(slots=True)
class Chunk:
    """The next num_tokens uncomputed tokens of a sequence.

    gives_logits: whether it ends with the sequence's last token, so that a token is sampled.
    """

    sequence: Sequence
    num_tokens: int
    gives_logits: bool


class Scheduler:
    """The waiting and the running sequences.

    max_num_seqs: running at once. max_num_batched_tokens: tokens of one step, at least one for
    each running sequence.
    """

    def __init__(
        self, block_manager: BlockManager, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._leaving: list[Sequence] = []
        self.num_shared_tokens = 0
        self._num_admitted = 0
        self._by_arrival: deque[Sequence] = deque()
        self._num_held_steps = self._num_when_full = 0
        self._block_manager = block_manager
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence before those that may generate less."""
        sequence.num_admitted_before = self._num_admitted
        self._by_arrival.append(sequence)
        insort(self.waiting, sequence, key=lambda s: len(s.token_ids) - s.max_tokens)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks; empty only when nothing is left to do but to read results.

        Calling it again without `advance` gives the same tokens again: nothing is lost with a
        step that failed.
        """
        budget = self._max_num_batched_tokens
        chunks: list[Chunk] = []
        prompts: list[Sequence] = []
        for sequence in self.running:
            num_tokens = len(sequence.token_ids) + sequence.num_pending  # here for speed
            if num_tokens >= sequence.max_tokens:  # those read and those pending
                continue
            if num_tokens - sequence.num_computed_tokens == 1:
                chunks.append(Chunk(sequence, 1, True))
            else:
                prompts.append(sequence)
        budget -= len(chunks)
        for sequence in prompts:
            budget -= self._add(chunks, sequence, budget)
        self._admit(chunks, budget)
        return chunks

    def advance(self, chunks: Iterable[Chunk]) -> None:
        """The chunks' tokens are in the cache once the step just launched has run."""
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.copy is not None:
                self._end_copy(sequence)
            num_computed = sequence.num_computed_tokens + chunk.num_tokens
            sequence.num_computed_tokens = num_computed
            if num_computed <= len(sequence.request.prompt_token_ids):
                self._block_manager.mark_computed(sequence.block_table, num_computed)

    def finish(self, sequence: Sequence) -> None:
        """A running sequence leaves; its blocks stay held while a launched step writes to them."""
        self.running.remove(sequence)
        self._leaving.append(sequence)
        self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        """Lets go of a finished sequence's blocks, once no launched step computes it."""
        if sequence.num_pending == 0:
            self._leaving.remove(sequence)
            self._block_manager.free(sequence.block_table)

    def reset(self) -> None:
        """Drops every sequence; no block stays held."""
        for sequence in (*self.running, *self._leaving):
            self._end_copy(sequence)
            self._block_manager.free(sequence.block_table)
        self.running.clear()
        self._leaving.clear()
        self.waiting.clear()
        self._by_arrival.clear()
        self._num_held_steps = 0

    @staticmethod
    def _add(chunks: list[Chunk], sequence: Sequence, budget: int) -> int:
        num_uncomputed = sequence.num_uncomputed_tokens
        num_tokens = min(num_uncomputed, budget)
        if num_tokens > 0:
            chunks.append(Chunk(sequence, num_tokens, num_tokens == num_uncomputed))
        return num_tokens

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        """Moves sequences from waiting to running while there are tokens, places and blocks."""
        if self._is_held():
            return
        before = self._num_admitted
        is_full = self._admit_waiting(chunks, budget)
        if is_full and self._num_admitted > before:
            self._num_held_steps = STEPS_BETWEEN_PROMPTS - 1
            self._num_when_full = len(self.running)

    def _is_held(self) -> bool:
        """Whether prompts wait for others to be computed with."""
        num_finished = self._num_when_full - len(self.running)
        if self._num_held_steps == 0 or MOST_PLACES_LEFT * num_finished >= self._num_when_full:
            return False
        self._num_held_steps -= 1
        return True

    def _admit_waiting(self, chunks: list[Chunk], budget: int) -> bool:
        """As `_admit`; True where it ended for want of places or blocks."""
        overdue = self._overdue()
        if overdue is not None and budget > 0 and len(self.running) < self._max_num_seqs:
            if not self._start(overdue):
                return True
            self.waiting.remove(overdue)
            budget -= self._add(chunks, overdue, budget)
        index = 0
        pending: set[int] = set()  # prompts, which stay so during this call
        last = _MAX_TURNS_LOOKED_AT * self._max_num_seqs
        while budget > 0 and len(self.running) < self._max_num_seqs:
            if index >= min(len(self.waiting), last):
                return False
            sequence = self.waiting[index]
            prompt = sequence.request.prompt_token_ids
            if id(prompt) in pending or self._block_manager.is_prefix_pending(prompt):
                pending.add(id(prompt))
                index += 1
                continue
            if not self._start(sequence):
                return True
            del self.waiting[index]
            budget -= self._add(chunks, sequence, budget)
        return budget > 0

    def _overdue(self) -> Sequence | None:
        """The one that has waited longest, when it has been passed too often and can start."""
        while self._by_arrival and self._by_arrival[0].is_admitted:
            self._by_arrival.popleft()
        if not self._by_arrival:
            return None
        oldest = self._by_arrival[0]
        passed = self._num_admitted - oldest.num_admitted_before
        if passed < MAX_TURNS_PASSED * self._max_num_seqs:
            return None
        prompt = oldest.request.prompt_token_ids
        return None if self._block_manager.is_prefix_pending(prompt) else oldest

    def _start(self, sequence: Sequence) -> bool:
        """Gives a sequence its blocks and a place among the running; False without room."""
        prompt = sequence.request.prompt_token_ids
        allocation = self._block_manager.allocate(prompt, sequence.num_cache_positions)
        if allocation is None:
            return False
        sequence.block_table, sequence.copy = allocation.block_table, allocation.copy
        # The last prompt token is computed again even when shared: its logits are needed, and its
        # keys and values are rewritten with the bits they have.
        sequence.num_computed_tokens = min(allocation.num_positions, len(prompt) - 1)
        self.num_shared_tokens += sequence.num_computed_tokens
        sequence.is_admitted = True
        self._num_admitted += 1
        self.running.append(sequence)
        return True

    def _end_copy(self, sequence: Sequence) -> None:
        if sequence.copy is not None:
            self._block_manager.end_copy(sequence.copy)
            sequence.copy = None
