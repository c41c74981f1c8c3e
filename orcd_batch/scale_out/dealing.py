"""Which rows go to which worker, in plain Python: balanced by work, none lost, a guilty one found.

Rows wait in a pool that is read ahead of the workers, most work first, so that what is dealt last
is small. A worker holds a batch that runs and up to two that wait; toward the end of the input the
waiting ones shrink, so that no worker sits on rows that another could run. After a worker's death
its rows are dealt again. Those that see a second death are suspects: they are tried in ever
smaller groups on a worker that has nothing else, until one is left that kills its workers alone;
each time on a worker that they have not killed yet, where there is one, for it may be at fault.
"""

import heapq
from collections import deque
from collections.abc import Sequence

from orcd_batch.scale_out.hands import MAX_CHARACTERS, DealtRow, Hand

_WAITING_BATCHES = 2
_POOL_BATCHES = 8
_NUM_GROUPS = 8


class Dealer:
    """The rows between the input and the workers.

    num_unread: how many rows of the input will be given to `add`, at most. num_workers: how many
    are there or will join, so that the first does not take what the others could do.
    """

    def __init__(self, num_unread: int, num_workers: int = 1) -> None:
        self._num_unread, self.num_workers = num_unread, num_workers
        self._pool: list[tuple[bool, float, int, DealtRow]] = []
        self._suspects: deque[list[DealtRow]] = deque()
        self._hands: dict[int, Hand] = {}
        self._dropped: set[int] = set()
        self._wanted, self._num_characters = 1, 0
        self._pool_work = self._work_read = 0.0
        self._pool_sequences = self._sequences_read = self._num_read = 0

    def add(self, dealt: DealtRow) -> None:
        """Puts a row of the input into the pool."""
        if self._num_unread:
            self._num_unread -= 1
        self._num_read += 1
        self._work_read += dealt.work
        self._sequences_read += dealt.num_sequences
        self._push(dealt)

    @property
    def has_room(self) -> bool:
        """Whether the pool is less than what the workers take at a time."""
        return self._pool_sequences < self._wanted and self._num_characters < MAX_CHARACTERS

    @property
    def has_unfinished(self) -> bool:
        return bool(self._pool or self._suspects or any(h.rows for h in self._hands.values()))

    def join(self, worker: int, batch: int) -> None:
        """A worker that runs `batch` sequences at once is ready for rows."""
        assert worker not in self._hands, f"worker {worker} is there already"
        self._hands[worker] = Hand(batch)
        self._want()

    def deal(self) -> list[tuple[int, list[DealtRow]]]:
        """(worker, rows) for every worker that should get rows now.

        Row by row to the least busy one, so that all get rows of the same mix of lengths.
        """
        given = {worker: self._suspects_for(worker) for worker in self._hands}
        fair_work, wanted = self._fair_work(), self._wanted_sequences()
        least_busy = [(h.work, worker) for worker, h in self._hands.items() if not h.on_trial]
        heapq.heapify(least_busy)
        while self._pool and least_busy:
            worker = least_busy[0][1]
            hand = self._hands[worker]
            if hand.is_full(wanted[worker], fair_work):
                heapq.heappop(least_busy)
                continue
            dealt = self._pop()
            given[worker].append(dealt)
            hand.take(dealt)
            heapq.heapreplace(least_busy, (hand.work, worker))
        return [(worker, rows) for worker, rows in given.items() if rows]

    def finish(self, worker: int, job: int, indexes: Sequence[int]) -> bool:
        """The worker has given back rows for one of their jobs; an index may stand there again.

        Returns False when the job was dropped meanwhile, so that nobody waits for them.
        """
        if job in self._dropped:
            return False
        hand, this_job = self._hands[worker], {job}
        for index in dict.fromkeys(indexes):
            dealt = hand.rows[index]
            assert job in dealt.jobs, f"row {index} is finished twice for job {job}"
            dealt.jobs -= this_job
            if not dealt.jobs:
                hand.give(index)
        return True

    def leave(self, worker: int) -> list[DealtRow]:
        """The worker is gone; its rows are dealt again.

        Returns those that are not, because they are guilty.
        """
        num_workers = self._num_shares
        hand = self._hands.pop(worker, None)
        self._want()
        rows = list(hand.rows.values()) if hand else []
        for dealt in rows:
            dealt.num_deaths += 1
            dealt.killed |= {worker}
            dealt.num_deaths_alone += len(rows) == 1
        for dealt in rows:
            if dealt.num_deaths == 1:
                self._push(dealt)
        again = [dealt for dealt in rows if dealt.num_deaths > 1]
        guilty = [dealt for dealt in again if dealt.is_guilty(num_workers)]
        self._suspects.extend(_groups([dealt for dealt in again if dealt not in guilty]))
        return guilty

    def drop(self, job: int) -> None:
        """The job needs no row any more."""
        self._dropped.add(job)
        for _, _, _, dealt in self._pool:
            dealt.jobs -= {job}
        for group in self._suspects:
            for dealt in group:
                dealt.jobs -= {job}
        for hand in self._hands.values():
            for index in list(hand.rows):
                hand.rows[index].jobs -= {job}
                if not hand.rows[index].jobs:
                    hand.give(index)
        self._suspects = deque([d for d in g if d.jobs] for g in self._suspects)
        self._suspects = deque(group for group in self._suspects if group)
        kept = [dealt for _, _, _, dealt in self._pool if dealt.jobs]
        self._pool, self._num_characters = [], 0
        self._pool_work, self._pool_sequences = 0.0, 0
        for dealt in kept:
            self._push(dealt)

    def _want(self) -> None:
        wanted = _POOL_BATCHES * sum(hand.batch for hand in self._hands.values())
        self._wanted = max(wanted, 1)

    def _push(self, dealt: DealtRow) -> None:
        """A row that has been dealt before goes first."""
        heapq.heappush(self._pool, (dealt.num_deaths == 0, -dealt.work, dealt.row.index, dealt))
        self._num_characters += dealt.num_characters
        self._pool_sequences += dealt.num_sequences
        self._pool_work += dealt.work

    def _pop(self) -> DealtRow:
        dealt = heapq.heappop(self._pool)[-1]
        self._num_characters -= dealt.num_characters
        self._pool_sequences -= dealt.num_sequences
        self._pool_work -= dealt.work
        return dealt

    def _suspects_for(self, worker: int) -> list[DealtRow]:
        """For a worker that holds nothing: the first group that has not killed it, or that has
        killed as many as there are."""
        hand = self._hands[worker]
        if hand.rows:
            return []
        hand.on_trial = False
        for group in self._suspects:
            killed = set[int]().union(*(dealt.killed for dealt in group))
            if worker not in killed or len(killed) >= self._num_shares:
                self._suspects.remove(group)
                hand.on_trial = True
                for dealt in group:
                    hand.take(dealt)
                return group
        return []

    @property
    def _num_shares(self) -> int:
        return max(self.num_workers, len(self._hands))

    def _wanted_sequences(self) -> dict[int, float]:
        """Of each worker: a running batch, and of the waiting ones no more than a fair share of
        what is left."""
        mean = self._sequences_read / max(self._num_read, 1)
        share = (self._pool_sequences + mean * self._num_unread) / self._num_shares
        batches = {worker: hand.batch for worker, hand in self._hands.items()}
        return {w: batch + min(_WAITING_BATCHES * batch, share) for w, batch in batches.items()}

    def _fair_work(self) -> float:
        """Each worker's equal part of all work that is not finished."""
        mean = self._work_read / max(self._num_read, 1)
        held = sum(hand.work for hand in self._hands.values())
        return (held + self._pool_work + mean * self._num_unread) / self._num_shares


def _groups(rows: Sequence[DealtRow]) -> list[list[DealtRow]]:
    """The rows in up to _NUM_GROUPS groups of nearly one size."""
    size = -(-len(rows) // _NUM_GROUPS) or 1
    return [list(rows[first : first + size]) for first in range(0, len(rows), size)]
