"""The scheduled chunks as the arrays that the ops take."""

from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from orcd_batch.backend.ops import BLOCK_SIZE, Batch, SampleBatch
from orcd_batch.engine.scheduler import Chunk
from orcd_batch.engine.sequence import Sequence

_INT32_MAX = 2**31 - 1
_NO_IDS = np.zeros(0, np.int32)


class StepArrays:
    """Makes the arrays of one step after the other; what the same sequences as in the step before
    bring along unchanged is not made again."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self._block_tables = np.zeros((0, 0), np.int32)
        self._sampling: list[Sequence] = []
        self._sample_batch: SampleBatch | None = None

    def batch(self, chunks: Items[Chunk]) -> Batch:
        """See `make_batch`."""
        sequences = [chunk.sequence for chunk in chunks]
        if sequences != self._sequences:  # a sequence is equal to itself alone
            self._sequences, self._block_tables = sequences, _block_tables(sequences)
        return _make_batch(chunks, self._block_tables)

    def sample_batch(self, sequences: list[Sequence]) -> SampleBatch:
        """See `make_sample_batch`."""
        known = self._sample_batch
        if known is None or sequences != self._sampling:
            self._sampling = sequences
            self._sample_batch = known = make_sample_batch(sequences)
            return known
        return replace(known, position=_positions(sequences), **_seen(sequences))


def make_batch(chunks: Items[Chunk]) -> Batch:
    """One step's tokens; logits_rows names the last token of every chunk that gives logits.

    When none does, the last token of the step is named, so that R is never 0. A token that is
    still on the device is named by its row, as `Batch` says.
    """
    return _make_batch(chunks, _block_tables([chunk.sequence for chunk in chunks]))


def _make_batch(chunks: Items[Chunk], block_tables: NDArray[np.int32]) -> Batch:
    lengths = np.array([chunk.num_tokens for chunk in chunks], np.int32)
    query_start = np.zeros(len(chunks) + 1, np.int32)
    np.cumsum(lengths, out=query_start[1:])
    token_ids: list[int] = []
    for chunk in chunks:
        sequence = chunk.sequence
        first = sequence.num_computed_tokens
        if first == len(sequence.token_ids):
            token_ids.append(_pending(sequence))
        else:
            token_ids.extend(sequence.token_ids[first : first + chunk.num_tokens])
    starts = np.array([chunk.sequence.num_computed_tokens for chunk in chunks], np.int32)
    positions = np.arange(query_start[-1], dtype=np.int32)
    positions += np.repeat(starts - query_start[:-1], lengths)
    rows = np.repeat(np.arange(len(chunks)), lengths)
    slots = block_tables[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    gives = np.array([chunk.gives_logits for chunk in chunks])
    logits_rows = query_start[1:][gives] - 1 if gives.any() else query_start[-1:] - 1
    return Batch(
        token_ids=np.array(token_ids, np.int32),
        positions=positions,
        slot_mapping=slots,
        query_start=query_start,
        context_lens=starts + lengths,
        block_tables=block_tables,
        logits_rows=logits_rows.astype(np.int32),
    )


def make_copies(chunks: Items[Chunk]) -> NDArray[np.int32] | None:
    """(source, target, positions) of the block copies that come before the step, if any."""
    copies = [chunk.sequence.copy for chunk in chunks if chunk.sequence.copy is not None]
    if not copies:
        return None
    return np.array([(c.source, c.target, c.num_positions) for c in copies], np.int32)


def _pending(sequence: Sequence) -> int:
    return -1 - sequence.pending_row


def _seen_ids(sequence: Sequence) -> NDArray[np.int32]:
    if sequence.seen_ids is None:
        return _NO_IDS
    pending = [_pending(sequence)] if sequence.num_pending else []
    return np.array([*sequence.seen_ids, *pending], np.int32)


def _block_tables(sequences: Items[Sequence]) -> NDArray[np.int32]:
    tables = [sequence.block_table for sequence in sequences]
    padded = np.zeros((len(tables), max(map(len, tables))), np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded


def make_sample_batch(sequences: Items[Sequence]) -> SampleBatch:
    """The sampling parameters of the sequences that get a token now, one row each."""
    requests = [sequence.request for sequence in sequences]
    params = [request.params for request in requests]
    return SampleBatch(
        temperature=np.array([p.temperature for p in params], np.float32),
        top_k=np.array([min(p.top_k, _INT32_MAX) for p in params], np.int32),
        top_p=np.array([p.top_p for p in params], np.float32),
        min_p=np.array([p.min_p for p in params], np.float32),
        repetition_penalty=np.array([p.repetition_penalty for p in params], np.float32),
        seed=np.array([p.seed for p in params], np.uint64),
        stream=np.array([request.stream for request in requests], np.uint64),
        position=_positions(sequences),
        **_seen(sequences),
    )


def _positions(sequences: Items[Sequence]) -> NDArray[np.uint32]:
    counts = [len(sequence.token_ids) + sequence.num_pending for sequence in sequences]
    return np.array(counts, np.uint32)


def _seen(sequences: Items[Sequence]) -> dict[str, NDArray[np.int32]]:
    """What repetition penalties ask for: token ids, row after row, and where each row's begin."""
    seen_start = np.zeros(len(sequences) + 1, np.int32)
    if all(sequence.seen_ids is None for sequence in sequences):
        return {"seen_ids": _NO_IDS, "seen_start": seen_start}
    seen = [_seen_ids(sequence) for sequence in sequences]
    np.cumsum([len(ids) for ids in seen], out=seen_start[1:])
    return {"seen_ids": np.concatenate(seen), "seen_start": seen_start}
