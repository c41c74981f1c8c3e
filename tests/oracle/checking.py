"""Compares what the project computes with a stored sequence, within the promised limits."""

import numpy as np
from numpy.typing import NDArray

from oracle.answer import Sequence
from orcd_batch.engine.request import Completion

# Logits may differ by this much in fp32; a token may differ where the oracle's margin is smaller.
LOGIT_LIMIT = 1e-3
MARGIN_LIMIT = 0.02


def log_normalizer(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """(R, V) -> (R,): log of the sum of exp of each row, in float64."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=-1)
    return np.asarray(top + np.log(np.exp(wide - top[:, None]).sum(axis=-1)))


def worst_logit_error(sequence: Sequence, logits: NDArray[np.float32]) -> float:
    """The largest error of (T, V) logits of `teacher_forced_ids` at the stored rows and columns.

    The normalizer counts as one more column: it depends on the whole row.
    """
    rows = np.asarray(logits)[sequence.first_row :]
    assert len(rows) == len(sequence.logits), "one row of logits for every stored row"
    errors = np.abs(rows[:, sequence.columns] - sequence.logits)
    normalizer_errors = np.abs(log_normalizer(rows) - sequence.log_normalizer)
    return max(float(errors.max()), float(normalizer_errors.max()))


def check_completion(sequence: Sequence, completion: Completion) -> None:
    """Asserts greedy tokens, and margins and logprobs up to the first legitimate difference."""
    assert completion.error is None
    wrong = sequence.first_wrong_token(completion.token_ids, MARGIN_LIMIT)
    assert wrong is None, (
        f"token {wrong} is {completion.token_ids[wrong : wrong + 1]}, the oracle says "
        f"{sequence.tokens[wrong]} with a margin of {sequence.margins[wrong]:.4f}"
    )
    assert len(completion.token_ids) == len(sequence.tokens)
    same = np.asarray(completion.token_ids) == sequence.tokens
    num_comparable = len(same) if same.all() else int(same.argmin())
    for computed, expected in (
        (completion.margins, sequence.margins),
        (completion.logprobs, sequence.logprobs),
    ):
        np.testing.assert_allclose(
            computed[:num_comparable], expected[:num_comparable], atol=2 * LOGIT_LIMIT, rtol=0
        )
