"""Decode steps brought to fixed shapes: what was there stays, what is added shows nowhere."""

from dataclasses import fields

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orcd_batch.backend.cuda.padding import (
    is_decode,
    pad_decode,
    pad_sampling,
    step_sizes,
    table_width,
)
from orcd_batch.backend.ops import Batch, SampleBatch


def decode_batch(num_seqs: int, width: int) -> Batch:
    rng = np.random.default_rng(num_seqs)
    ids, positions, slots, lengths = rng.integers(1, 100, (4, num_seqs)).astype(np.int32)
    tables = rng.integers(1, 50, (num_seqs, width)).astype(np.int32)
    rows = np.arange(num_seqs, dtype=np.int32)
    start = np.arange(num_seqs + 1, dtype=np.int32)
    return Batch(ids, positions, slots, start, lengths, tables, rows)


def sample_batch(num_rows: int) -> SampleBatch:
    rng = np.random.default_rng(num_rows)
    types = {"top_k": np.int32, "seed": np.uint64, "stream": np.uint64, "position": np.uint32}
    columns = {
        field.name: rng.integers(1, 9, num_rows).astype(types.get(field.name, np.float32))
        for field in fields(SampleBatch)[:-2]
    }
    seen = np.arange(3 * num_rows, dtype=np.int32)
    return SampleBatch(**columns, seen_ids=seen, seen_start=np.arange(num_rows + 1) * 3)


@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 8), st.integers(0, 5))
def test_padding_keeps_the_step_and_adds_sequences_without_context(
    num_seqs: int, width: int, more_seqs: int, more_width: int
) -> None:
    batch, sampling = decode_batch(num_seqs, width), sample_batch(num_seqs)
    padded = pad_decode(batch, num_seqs + more_seqs, width + more_width)
    assert padded.block_tables.shape == (num_seqs + more_seqs, width + more_width)
    np.testing.assert_array_equal(padded.block_tables[:num_seqs, :width], batch.block_tables)
    for name in ("token_ids", "positions", "slot_mapping", "context_lens", "logits_rows"):
        np.testing.assert_array_equal(getattr(padded, name)[:num_seqs], getattr(batch, name))
        assert len(getattr(padded, name)) == num_seqs + more_seqs
    assert (padded.slot_mapping[num_seqs:] < 0).all()
    assert not padded.context_lens[num_seqs:].any()
    assert (np.diff(padded.query_start) == 1).all()
    rows = pad_sampling(sampling, num_seqs + more_seqs)
    for field in fields(SampleBatch)[:-2]:
        array, before = getattr(rows, field.name), getattr(sampling, field.name)
        np.testing.assert_array_equal(array[:num_seqs], before)
        assert array.dtype == before.dtype
    assert (rows.temperature[num_seqs:] == 0).all()
    assert (rows.repetition_penalty[num_seqs:] == 1).all()
    assert (np.diff(rows.seen_start)[num_seqs:] == 0).all()


def test_a_step_is_a_decode_step_when_every_sequence_gives_and_gets_one_token() -> None:
    batch = decode_batch(3, 2)
    assert is_decode(batch, sample_batch(3))
    assert not is_decode(batch, sample_batch(2))
    longer = Batch(*(getattr(batch, f.name) for f in fields(Batch)[:-3]), batch.context_lens[:2],
                   batch.block_tables[:2], batch.logits_rows[:2])  # fmt: skip
    assert not is_decode(longer, sample_batch(2))


@given(st.integers(1, 600), st.integers(1, 600))
def test_tables_have_few_widths_and_hold_what_they_must(width: int, max_blocks: int) -> None:
    width = min(width, max_blocks)
    padded = table_width(width, max_blocks)
    assert width <= padded <= max(max_blocks, width)
    assert padded in {4, 8, 16, 32, 64, 128, 256, 512, max_blocks}


@given(st.integers(1, 3000))
def test_every_number_of_sequences_has_a_size_that_adds_few(max_seqs: int) -> None:
    sizes = step_sizes(max_seqs)
    assert sizes[-1] == max_seqs
    assert sizes == sorted(set(sizes))
    for below, size in zip([0, *sizes], sizes, strict=False):
        assert size - below <= max(1, min(below, 64 if size <= 512 else 128))
