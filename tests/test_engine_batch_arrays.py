"""The arrays of a step are the same whether or not the step before left some of them."""

from dataclasses import fields
from typing import Any

import numpy as np

from orcd_batch import SamplingParams
from orcd_batch.engine.batch_arrays import StepArrays, make_batch, make_sample_batch
from orcd_batch.engine.request import Request
from orcd_batch.engine.scheduler import Chunk
from orcd_batch.engine.sequence import Sequence


def decoding(index: int) -> Sequence:
    """A sequence whose prompt is in the cache and whose first token is still on the device."""
    penalty = 1.1 if index % 3 == 0 else 1.0
    params = SamplingParams(
        max_tokens=50, temperature=index / 8, seed=index, repetition_penalty=penalty
    )
    prompt = tuple(range(5, 70 + index))
    sequence = Sequence.of(Request(index, prompt, params, stream=7 * index), 200)
    sequence.block_table = np.arange(3, dtype=np.int32) + 3 * index
    sequence.num_computed_tokens = len(prompt)
    sequence.num_pending, sequence.pending_row = 1, index
    return sequence


def differing(found: Any, expected: Any) -> list[str]:
    """Names of the arrays that are not the same in type, shape and values."""
    names = [field.name for field in fields(expected)]
    pairs = [(name, getattr(found, name), getattr(expected, name)) for name in names]
    return [n for n, a, b in pairs if a.dtype != b.dtype or not np.array_equal(a, b)]


def advance(sequences: list[Sequence]) -> None:
    """What the engine does with a step: a token is read, the next one is pending."""
    for row, sequence in enumerate(sequences):
        sequence.append(100 + row, -1.0, 0.5, row)
        sequence.num_computed_tokens += 1
        sequence.pending_row = row


def test_arrays_do_not_depend_on_the_step_before() -> None:
    rng = np.random.default_rng(0)
    everyone = [decoding(index) for index in range(9)]
    arrays, running = StepArrays(), everyone[:4]
    for step in range(30):
        if step % 3 == 2:
            running = [everyone[n] for n in sorted(rng.choice(9, rng.integers(1, 10), False))]
        chunks = [Chunk(sequence, 1, True) for sequence in running]
        assert differing(arrays.batch(chunks), make_batch(chunks)) == []
        assert differing(arrays.sample_batch(list(running)), make_sample_batch(running)) == []
        advance(running)


def test_a_pending_token_is_named_by_its_row() -> None:
    sequence = decoding(4)
    assert make_batch([Chunk(sequence, 1, True)]).token_ids.tolist() == [-5]
    advance([sequence])
    sequence.num_pending = 0
    sequence.num_computed_tokens -= 1
    assert make_batch([Chunk(sequence, 1, True)]).token_ids.tolist() == [100]
