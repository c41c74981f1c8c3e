"""One sequence driven by hand, token by token: the interactive side of the engine."""

from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from orcd_batch.engine.batch_arrays import make_batch
from orcd_batch.engine.engine import Engine
from orcd_batch.engine.request import Request, SamplingParams
from orcd_batch.engine.scheduler import Chunk
from orcd_batch.engine.sequence import Sequence
from orcd_batch.errors import ContextFullError, RowError
from orcd_batch.model import hidden_states


class Context:
    """Logits of a growing sequence; it shares the engine's cache.

    Its blocks can be taken away at any time (`release`): the next call computes them again, to
    the same bits.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sequence = self._empty()

    def prefill(self, ids: Items[int]) -> NDArray[np.float32]:
        """Starts afresh with ids (T,) and returns the logits of every position (T, V).

        Raises RowError when ids is empty or holds one outside the vocabulary, ContextFullError
        when it is longer than the context.
        """
        self.release()
        self._sequence = self._empty()
        if not ids:
            raise RowError("The prompt is empty: give it at least one token.")
        return self._extend(ids)

    def decode(self, token_id: int) -> NDArray[np.float32]:
        """Appends one token and returns the logits (V,) of its position; errors as `prefill`."""
        logits: NDArray[np.float32] = self._extend([token_id])[-1]
        return logits

    def release(self) -> None:
        """Gives the cache blocks back; the tokens stay known."""
        self._engine.block_manager.free(self._sequence.block_table)
        self._sequence.block_table = np.zeros(0, np.int32)
        self._sequence.num_computed_tokens = 0

    def _empty(self) -> Sequence:
        request = Request(None, (), SamplingParams())
        return Sequence.of(request, self._engine.max_model_len)

    def _extend(self, ids: Items[int]) -> NDArray[np.float32]:
        self._check(ids)
        sequence, engine = self._sequence, self._engine
        table = engine.block_manager.grow(sequence.block_table, len(sequence.token_ids) + len(ids))
        if table is None:
            raise ContextFullError(
                f"The KV cache of {engine.block_manager.num_blocks} blocks has no room for "
                f"{len(sequence.token_ids) + len(ids)} tokens; raise kv_cache_bytes."
            )
        sequence.block_table = table
        sequence.token_ids.extend(ids)
        try:
            return self._compute(len(ids))
        except BaseException:
            del sequence.token_ids[-len(ids) :]
            sequence.num_computed_tokens = min(
                sequence.num_computed_tokens, len(sequence.token_ids)
            )
            raise

    def _compute(self, num_wanted: int) -> NDArray[np.float32]:
        """Computes what is missing; logits of the last num_wanted tokens."""
        engine, sequence = self._engine, self._sequence
        first_wanted = len(sequence.token_ids) - num_wanted
        logits = np.empty((num_wanted, engine.config.vocab_size), np.float32)
        while sequence.num_uncomputed_tokens:
            start = sequence.num_computed_tokens
            size = min(sequence.num_uncomputed_tokens, engine.max_num_batched_tokens)
            batch = make_batch([Chunk(sequence, size, size == sequence.num_uncomputed_tokens)])
            hidden = hidden_states(
                engine.ops, engine.config, engine.weights, engine.caches, engine.ops.place(batch)
            )
            for first in range(max(start, first_wanted), start + size, engine.max_num_seqs):
                last = min(start + size, first + engine.max_num_seqs)
                rows = np.arange(first - start, last - start, dtype=np.int32)
                placed = engine.ops.place(replace(batch, logits_rows=rows))
                taken = engine.ops.take_rows(hidden, placed.logits_rows)
                part = engine.ops.logits(taken, engine.weights.output)
                logits[first - first_wanted : last - first_wanted] = engine.ops.to_host(part)
            sequence.num_computed_tokens += size
        return logits

    def _check(self, ids: Items[int]) -> None:
        vocab_size, limit = self._engine.config.vocab_size, self._engine.max_model_len
        for token in ids:
            if not 0 <= token < vocab_size:
                raise RowError(
                    f"Token id {token} is outside the vocabulary of {vocab_size} tokens "
                    f"(0 … {vocab_size - 1})."
                )
        if len(self._sequence.token_ids) + len(ids) > limit:
            raise ContextFullError(
                f"{len(self._sequence.token_ids)} tokens and {len(ids)} more exceed the context "
                f"of {limit}; start afresh with prefill."
            )
