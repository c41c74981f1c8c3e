"""Which tokens of which sequences the next step computes.

Running sequences come first (one token each when decoding, a chunk when their prompt is not done),
then waiting ones as far as tokens, places and blocks allow. A sequence is admitted only when all
the blocks it can ever need are free, so none is preempted. The one that may generate most comes
first, so that no long one is left over when the others are done; among equals the first come. A
prompt whose blocks another sequence is computing right now waits for them, and lets others pass.
"""

from bisect import insort
from dataclasses import dataclass

from orcd_batch.backend.ops import BLOCK_SIZE
from orcd_batch.engine.block_manager import BlockManager
from orcd_batch.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
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
        self._block_manager = block_manager
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence before those that may generate less."""
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
            if not sequence.needs_steps:
                continue
            if sequence.num_uncomputed_tokens == 1:
                chunks.append(Chunk(sequence, 1, True))
            else:
                prompts.append(sequence)
        budget -= len(chunks)
        for sequence in prompts:
            budget -= self._add(chunks, sequence, budget)
        while budget > 0 and (admitted := self._admit_next()) is not None:
            budget -= self._add(chunks, admitted, budget)
        return chunks

    def advance(self, chunk: Chunk) -> None:
        """The chunk's tokens are in the cache once the step just launched has run."""
        sequence = chunk.sequence
        sequence.num_computed_tokens += chunk.num_tokens
        if sequence.num_computed_tokens <= len(sequence.request.prompt_token_ids):
            self._block_manager.mark_computed(sequence.block_table, sequence.num_computed_tokens)

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
            self._block_manager.free(sequence.block_table)
        self.running.clear()
        self._leaving.clear()
        self.waiting.clear()

    @staticmethod
    def _add(chunks: list[Chunk], sequence: Sequence, budget: int) -> int:
        num_uncomputed = sequence.num_uncomputed_tokens
        num_tokens = min(num_uncomputed, budget)
        if num_tokens > 0:
            chunks.append(Chunk(sequence, num_tokens, num_tokens == num_uncomputed))
        return num_tokens

    def _admit_next(self) -> Sequence | None:
        """Moves the first sequence that need not wait for a neighbour's prompt to running."""
        if len(self.running) >= self._max_num_seqs:
            return None
        for index in range(min(len(self.waiting), 4 * self._max_num_seqs)):
            sequence = self.waiting[index]
            prompt = sequence.request.prompt_token_ids
            if self._block_manager.is_prefix_pending(prompt):
                continue
            allocation = self._block_manager.allocate(prompt, sequence.num_cache_positions)
            if allocation is None:
                return None
            del self.waiting[index]
            sequence.block_table = allocation.block_table
            # The last prompt token is computed again even when shared: its logits are needed, and
            # its keys and values are rewritten with the bits they have.
            shared = min(allocation.num_shared * BLOCK_SIZE, len(prompt) - 1)
            sequence.num_computed_tokens = shared
            self.num_shared_tokens += shared
            self.running.append(sequence)
            return sequence
        return None
