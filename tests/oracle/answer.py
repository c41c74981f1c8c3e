"""Stored answers of an oracle: greedy tokens, margins, and samples of the logits behind them."""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ANSWERS_DIR = Path(__file__).parent / "answers"


@dataclass(frozen=True)
class Sequence:
    """One prompt and its greedy continuation of N tokens, with the logits at some positions.

    tokens, margins, logprobs: (N,); margins are best minus second-best logit, logprobs the
    natural log of the token's probability. logits: (R, K), the logits of the vocabulary ids
    `columns` (K,) at positions first_row … first_row + R - 1 of prompt + tokens[:-1];
    log_normalizer: (R,), log of the sum of exp over the whole row.
    """

    prompt: list[int]
    tokens: NDArray[np.int32]
    margins: NDArray[np.float32]
    logprobs: NDArray[np.float32]
    first_row: int
    columns: NDArray[np.int32]
    logits: NDArray[np.float32]
    log_normalizer: NDArray[np.float32]

    @property
    def teacher_forced_ids(self) -> list[int]:
        """The ids to feed in order to compute every stored row."""
        return self.prompt + [int(token) for token in self.tokens[:-1]]

    def first_wrong_token(self, tokens: list[int], margin_limit: float) -> int | None:
        """Index of the first token that differs where it must not; None when all is well.

        A difference is legitimate where the oracle's margin is at most margin_limit, and nothing
        after a legitimate difference can be compared. Too few tokens count as wrong.
        """
        for index, (expected, margin) in enumerate(zip(self.tokens, self.margins, strict=True)):
            if index >= len(tokens) or (tokens[index] != expected and margin > margin_limit):
                return index
            if tokens[index] != expected:
                return None
        return None


@dataclass(frozen=True)
class Answer:
    """All sequences of one model, as they lie in `answers/<name>.npz`.

    model_digest: SHA-256 that tells whether a test runs the same weights. feature_off_logits:
    (P, K), the logits at each prompt's last position when the case's feature is left out
    (empty where the case has none). made_with: versions, as JSON.
    """

    prompt_ids: NDArray[np.int32]
    prompt_lengths: NDArray[np.int32]
    tokens: NDArray[np.int32]
    margins: NDArray[np.float32]
    logprobs: NDArray[np.float32]
    first_rows: NDArray[np.int32]
    columns: NDArray[np.int32]
    logits: NDArray[np.float32]
    log_normalizer: NDArray[np.float32]
    feature_off_logits: NDArray[np.float32]
    model_digest: str
    made_with: str

    @property
    def sequences(self) -> list[Sequence]:
        ends = np.cumsum(self.prompt_lengths)
        num_rows = self.prompt_lengths + self.tokens.shape[1] - 1 - self.first_rows
        row_ends = np.cumsum(num_rows)
        return [
            Sequence(
                prompt=self.prompt_ids[end - length : end].tolist(),
                tokens=self.tokens[index],
                margins=self.margins[index],
                logprobs=self.logprobs[index],
                first_row=int(self.first_rows[index]),
                columns=self.columns,
                logits=self.logits[row_end - rows : row_end],
                log_normalizer=self.log_normalizer[row_end - rows : row_end],
            )
            for index, (end, length, row_end, rows) in enumerate(
                zip(ends, self.prompt_lengths, row_ends, num_rows, strict=True)
            )
        ]

    def save(self, name: str) -> Path:
        ANSWERS_DIR.mkdir(exist_ok=True)
        path = ANSWERS_DIR / f"{name}.npz"
        arrays = {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
        return path


def load_answer(name: str) -> Answer:
    """Reads `answers/<name>.npz`."""
    with np.load(ANSWERS_DIR / f"{name}.npz") as stored:
        arrays = {field.name: stored[field.name] for field in fields(Answer)}
    for name_of_text in ("model_digest", "made_with"):
        arrays[name_of_text] = str(arrays[name_of_text])
    return Answer(**arrays)
