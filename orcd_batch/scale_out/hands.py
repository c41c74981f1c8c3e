"""A row on its way to a worker, and what one worker holds."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Self

from orcd_batch.data import InputRow

# Characters of prompts that fill the pool, or one worker's hand, whatever the number of rows.
MAX_CHARACTERS = 32 * 2**20
# A prompt token costs about a fifth of a generated one (docs/log.md: w5 against w2).
_PROMPT_TOKEN_WORK = 0.2
_CHARACTERS_PER_TOKEN = 4
_DEATHS_ALONE = 2


@dataclass(slots=True, eq=False)
class DealtRow:
    """A row and the jobs that wait for it.

    num_sequences: samples of all its jobs. work: estimated, in generated tokens. num_deaths:
    workers that died holding it; num_deaths_alone: those of them that held nothing else. killed:
    which workers they were.
    """

    row: InputRow
    jobs: frozenset[int]
    num_sequences: int
    num_characters: int
    work: float
    num_deaths: int = 0
    num_deaths_alone: int = 0
    killed: frozenset[int] = frozenset()

    def is_guilty(self, num_workers: int) -> bool:
        """Whether it killed twice while nothing else was there, and two of several workers."""
        enough = min(_DEATHS_ALONE, num_workers)
        return self.num_deaths_alone >= _DEATHS_ALONE and len(self.killed) >= enough

    @classmethod
    def of(cls, row: InputRow, jobs: Collection[int], num_sequences: int, num_tokens: int) -> Self:
        """num_tokens: what all its sequences may generate together."""
        num_characters = _num_characters(row)
        prompt_work = _PROMPT_TOKEN_WORK * num_characters / _CHARACTERS_PER_TOKEN
        return cls(row, frozenset(jobs), num_sequences, num_characters, num_tokens + prompt_work)


@dataclass(slots=True)
class Hand:
    """What one worker holds. batch: sequences that it runs at once."""

    batch: int
    rows: dict[int, DealtRow] = field(default_factory=dict)
    num_sequences: int = 0
    num_characters: int = 0
    work: float = 0.0
    on_trial: bool = False

    def take(self, dealt: DealtRow) -> None:
        self.rows[dealt.row.index] = dealt
        self.num_sequences += dealt.num_sequences
        self.num_characters += dealt.num_characters
        self.work += dealt.work

    def give(self, index: int) -> DealtRow:
        dealt = self.rows.pop(index)
        self.num_sequences -= dealt.num_sequences
        self.num_characters -= dealt.num_characters
        self.work -= dealt.work
        return dealt

    def is_full(self, num_sequences: float, fair_work: float) -> bool:
        """Whether it should get no more now; what it should hold: num_sequences, fair_work."""
        if self.num_sequences >= num_sequences or self.num_characters >= MAX_CHARACTERS:
            return True
        return bool(self.rows) and self.work > fair_work


def _num_characters(row: InputRow) -> int:
    if row.prompt is not None:
        return len(row.prompt)
    if row.token_ids is not None:
        return _CHARACTERS_PER_TOKEN * len(row.token_ids)
    if row.messages is not None:
        return sum(len(str(message.get("content"))) for message in row.messages)
    return 0
