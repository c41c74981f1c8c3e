"""Which rows go to which worker, in plain Python: balanced by work, none lost, a guilty one found.

Rows wait in a pool that is read ahead of the workers, most work first, so that what is dealt last
is small. A worker holds a batch that runs and up to two that wait; toward the end of the input the
waiting ones shrink, so that no worker sits on rows that another could run. After a worker's death
its rows are dealt again. Those that see a second death are suspects: they are tried in ever
smaller groups on a worker that has nothing else, until one is left that kills its workers alone.
"""

import heapq
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Self

from orcd_batch.data import InputRow

# A prompt token costs about a fifth of a generated one (docs/log.md: w5 against w2).
_PROMPT_TOKEN_WORK = 0.2
_CHARACTERS_PER_TOKEN = 4
# Characters of prompts that fill the pool, or one worker's hand, whatever the number of rows.
_MAX_CHARACTERS = 32 * 2**20
_WAITING_BATCHES = 2
_POOL_BATCHES = 8
_NUM_GROUPS = 8
_DEATHS_ALONE = 2


@dataclass(slots=True, eq=False)
class DealtRow:
    """A row and the jobs that wait for it.

    num_sequences: samples of all its jobs. work: estimated, in generated tokens. num_deaths:
    workers that died holding it; num_deaths_alone: those of them that held nothing else.
    """

    row: InputRow
    jobs: set[int]
    num_sequences: int
    num_characters: int
    work: float
    num_deaths: int = 0
    num_deaths_alone: int = 0

    @property
    def is_guilty(self) -> bool:
        """Whether it killed two workers while nothing else was there."""
        return self.num_deaths_alone >= _DEATHS_ALONE

    @classmethod
    def of(cls, row: InputRow, jobs: Collection[int], num_sequences: int, num_tokens: int) -> Self:
        """num_tokens: what all its sequences may generate together."""
        num_characters = _num_characters(row)
        prompt_work = _PROMPT_TOKEN_WORK * num_characters / _CHARACTERS_PER_TOKEN
        return cls(row, set(jobs), num_sequences, num_characters, num_tokens + prompt_work)


@dataclass(slots=True)
class _Hand:
    """What one worker holds. batch: sequences that it runs at once."""

    batch: int
    rows: dict[int, DealtRow] = field(default_factory=dict)
    num_sequences: int = 0
    num_characters: int = 0
    work: float = 0.0
    on_trial: bool = False

    def take(self, dealt: DealtRow) -> None:
        self.rows[dealt.row.index] = dealt
        self._count(dealt, 1)

    def give(self, index: int) -> DealtRow:
        dealt = self.rows.pop(index)
        self._count(dealt, -1)
        return dealt

    def _count(self, dealt: DealtRow, sign: int) -> None:
        self.num_sequences += sign * dealt.num_sequences
        self.num_characters += sign * dealt.num_characters
        self.work += sign * dealt.work


class Dealer:
    """The rows between the input and the workers.

    num_unread: how many rows of the input will be given to `add`, at most. num_workers: how many
    are there or will join, so that the first does not take what the others could do.
    """

    def __init__(self, num_unread: int, num_workers: int = 1) -> None:
        self._num_unread, self.num_workers = num_unread, num_workers
        self._pool: list[tuple[bool, float, int, DealtRow]] = []
        self._suspects: deque[list[DealtRow]] = deque()
        self._hands: dict[int, _Hand] = {}
        self._dropped: set[int] = set()
        self._num_characters = 0
        self._pool_work = self._work_read = 0.0
        self._pool_sequences = self._sequences_read = self._num_read = 0

    def add(self, dealt: DealtRow) -> None:
        """Puts a row of the input into the pool."""
        self._num_unread = max(self._num_unread - 1, 0)
        self._num_read += 1
        self._work_read += dealt.work
        self._sequences_read += dealt.num_sequences
        self._push(dealt)

    @property
    def has_room(self) -> bool:
        """Whether the pool is less than what the workers take at a time."""
        wanted = _POOL_BATCHES * sum(hand.batch for hand in self._hands.values())
        return self._pool_sequences < (wanted or 1) and self._num_characters < _MAX_CHARACTERS

    @property
    def has_unfinished(self) -> bool:
        return bool(self._pool or self._suspects or any(h.rows for h in self._hands.values()))

    def join(self, worker: int, batch: int) -> None:
        """A worker that runs `batch` sequences at once is ready for rows."""
        assert worker not in self._hands, f"worker {worker} is there already"
        self._hands[worker] = _Hand(batch)

    def deal(self) -> list[tuple[int, list[DealtRow]]]:
        """(worker, rows) for every worker that should get rows now, the least busy first."""
        workers = sorted(self._hands, key=lambda worker: self._hands[worker].work)
        dealt = ((worker, self._rows_for(self._hands[worker])) for worker in workers)
        return [(worker, rows) for worker, rows in dealt if rows]

    def finish(self, worker: int, job: int, indexes: Sequence[int]) -> bool:
        """The worker has given back rows for one of their jobs; an index may stand there again.

        Returns False when the job was dropped meanwhile, so that nobody waits for them.
        """
        if job in self._dropped:
            return False
        hand = self._hands[worker]
        for index in dict.fromkeys(indexes):
            dealt = hand.rows[index]
            dealt.jobs.remove(job)
            if not dealt.jobs:
                hand.give(index)
        return True

    def leave(self, worker: int) -> list[DealtRow]:
        """The worker is gone; its rows are dealt again.

        Returns those that are not, because they are guilty.
        """
        hand = self._hands.pop(worker, None)
        rows = list(hand.rows.values()) if hand else []
        for dealt in rows:
            dealt.num_deaths += 1
            dealt.num_deaths_alone += len(rows) == 1
        for dealt in rows:
            if dealt.num_deaths == 1:
                self._push(dealt)
        again = [dealt for dealt in rows if dealt.num_deaths > 1]
        self._suspects.extend(_groups([dealt for dealt in again if not dealt.is_guilty]))
        return [dealt for dealt in again if dealt.is_guilty]

    def drop(self, job: int) -> None:
        """The job needs no row any more."""
        self._dropped.add(job)
        for _, _, _, dealt in self._pool:
            dealt.jobs.discard(job)
        for group in self._suspects:
            for dealt in group:
                dealt.jobs.discard(job)
        for hand in self._hands.values():
            for index in list(hand.rows):
                hand.rows[index].jobs.discard(job)
                if not hand.rows[index].jobs:
                    hand.give(index)
        self._suspects = deque([d for d in g if d.jobs] for g in self._suspects)
        self._suspects = deque(group for group in self._suspects if group)
        kept = [dealt for _, _, _, dealt in self._pool if dealt.jobs]
        self._pool, self._num_characters = [], 0
        self._pool_work, self._pool_sequences = 0.0, 0
        for dealt in kept:
            self._push(dealt)

    def _push(self, dealt: DealtRow) -> None:
        """A row that has been dealt before goes first."""
        heapq.heappush(self._pool, (dealt.num_deaths == 0, -dealt.work, dealt.row.index, dealt))
        self._count_pooled(dealt, 1)

    def _pop(self) -> DealtRow:
        dealt = heapq.heappop(self._pool)[-1]
        self._count_pooled(dealt, -1)
        return dealt

    def _count_pooled(self, dealt: DealtRow, sign: int) -> None:
        self._num_characters += sign * dealt.num_characters
        self._pool_sequences += sign * dealt.num_sequences
        self._pool_work += sign * dealt.work

    def _rows_for(self, hand: _Hand) -> list[DealtRow]:
        if not hand.rows:
            hand.on_trial = bool(self._suspects)
            if hand.on_trial:
                return self._given(hand, self._suspects.popleft())
        if hand.on_trial:
            return []
        rows = []
        wanted, fair_work = self._wanted_sequences(hand), self._fair_work()
        while self._pool and hand.num_sequences < wanted and hand.num_characters < _MAX_CHARACTERS:
            if hand.rows and hand.work > fair_work:
                break
            rows.append(self._pop())
            hand.take(rows[-1])
        return rows

    @property
    def _num_shares(self) -> int:
        return max(self.num_workers, len(self._hands))

    @staticmethod
    def _given(hand: _Hand, rows: list[DealtRow]) -> list[DealtRow]:
        for dealt in rows:
            hand.take(dealt)
        return rows

    def _wanted_sequences(self, hand: _Hand) -> float:
        """A running batch, and of the waiting ones no more than a fair share of what is left."""
        mean = self._sequences_read / max(self._num_read, 1)
        left = self._pool_sequences + mean * self._num_unread
        return hand.batch + min(_WAITING_BATCHES * hand.batch, left / self._num_shares)

    def _fair_work(self) -> float:
        """Each worker's equal part of all work that is not finished."""
        mean = self._work_read / max(self._num_read, 1)
        held = sum(hand.work for hand in self._hands.values())
        return (held + self._pool_work + mean * self._num_unread) / self._num_shares


def _num_characters(row: InputRow) -> int:
    if row.token_ids is not None:
        return _CHARACTERS_PER_TOKEN * len(row.token_ids)
    if row.messages is not None:
        return sum(len(str(message.get("content"))) for message in row.messages)
    return len(row.prompt or "")


def _groups(rows: Sequence[DealtRow]) -> list[list[DealtRow]]:
    """The rows in up to _NUM_GROUPS groups of nearly one size."""
    size = -(-len(rows) // _NUM_GROUPS) or 1
    return [list(rows[first : first + size]) for first in range(0, len(rows), size)]
