"""Dealing rows to workers: none lost, none twice, the guilty one found, the end shared out."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orcd_batch.data import InputRow
from orcd_batch.scale_out.dealing import Dealer
from orcd_batch.scale_out.hands import DealtRow


def dealt_row(index: int, num_tokens: int = 10, jobs: tuple[int, ...] = (0,)) -> DealtRow:
    row = InputRow(index, index, prompt="some words")
    return DealtRow.of(row, jobs, len(jobs), num_tokens * len(jobs))


def filled(num_rows: int, tokens: dict[int, int] | None = None) -> Dealer:
    dealer = Dealer(num_rows)
    for index in range(num_rows):
        dealer.add(dealt_row(index, (tokens or {}).get(index, 10)))
    return dealer


class Job:
    """Workers without an engine, which finish and die as a seed says."""

    def __init__(self, num_rows: int, num_workers: int, batch: int, seed: int) -> None:
        self.dealer, self.chance = filled(num_rows), random.Random(seed)
        self.hands: dict[int, list[int]] = {}
        self.finished: list[int] = []
        self.guilty: list[int] = []
        self.num_deaths, self.batch = 0, batch
        for worker in range(num_workers):
            self.join(worker)

    def join(self, worker: int) -> None:
        self.dealer.join(worker, self.batch)
        self.hands[worker] = []

    def die(self, worker: int) -> None:
        self.num_deaths += 1
        self.guilty += [dealt.row.index for dealt in self.dealer.leave(worker)]
        self.join(worker)

    def run(
        self,
        poison: frozenset[int] = frozenset(),
        death_rate: float = 0.0,
        broken: int | None = None,
    ) -> None:
        for _ in range(100_000):
            for worker, rows in self.dealer.deal():
                self.hands[worker] += [dealt.row.index for dealt in rows]
            if not self.dealer.has_unfinished:
                return
            worker = self.chance.choice([w for w, hand in self.hands.items() if hand])
            deadly = worker == broken or poison.intersection(self.hands[worker])
            if deadly or self.chance.random() < death_rate:
                self.die(worker)
                continue
            index = self.hands[worker].pop(self.chance.randrange(len(self.hands[worker])))
            assert self.dealer.finish(worker, 0, [index])
            self.finished.append(index)
        pytest.fail("the job does not end")


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(0, 120),
    num_workers=st.integers(1, 5),
    batch=st.integers(1, 20),
    seed=st.integers(0, 2**20),
)
def test_workers_that_die_at_random_lose_and_double_no_row(num_rows, num_workers, batch, seed):
    job = Job(num_rows, num_workers, batch, seed)
    job.run(death_rate=0.1)
    assert sorted(job.finished + job.guilty) == list(range(num_rows))


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 200),
    num_workers=st.integers(1, 4),
    batch=st.integers(1, 32),
    seed=st.integers(0, 2**20),
)
def test_the_row_that_kills_its_workers_is_found_and_its_neighbours_are_not_blamed(
    num_rows, num_workers, batch, seed
):
    poison = seed % num_rows
    job = Job(num_rows, num_workers, batch, seed)
    job.run(poison=frozenset([poison]))
    assert job.guilty == [poison]
    assert len(job.finished) == num_rows - 1
    assert job.num_deaths <= 7  # in company twice, three sizes of groups, alone twice


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 60),
    num_workers=st.integers(2, 4),
    batch=st.integers(1, 16),
    seed=st.integers(0, 2**20),
)
def test_a_worker_that_dies_of_every_row_makes_no_row_guilty(num_rows, num_workers, batch, seed):
    job = Job(num_rows, num_workers, batch, seed)
    job.run(broken=0)
    assert job.guilty == []
    assert sorted(job.finished) == list(range(num_rows))


def test_a_row_alone_is_given_up_after_two_deaths():
    job = Job(1, 1, 8, seed=0)
    job.run(poison=frozenset([0]))
    assert (job.guilty, job.num_deaths) == ([0], 2)


def test_the_longest_rows_are_dealt_first():
    dealer = filled(6, tokens={3: 90, 5: 50})
    dealer.join(0, 1)
    ((_, rows),) = dealer.deal()
    assert [dealt.row.index for dealt in rows][:2] == [3, 5]


def test_workers_get_the_same_mix_of_long_and_short_rows():
    dealer = filled(80, tokens=dict.fromkeys(range(8), 500))
    dealer.join(0, 100)
    dealer.join(1, 100)
    hands = {worker: [dealt.row.index for dealt in rows] for worker, rows in dealer.deal()}
    assert [sum(index < 8 for index in hand) for hand in hands.values()] == [4, 4]
    assert [len(hand) for hand in hands.values()] == [40, 40]


def test_a_worker_holds_two_batches_more_than_it_runs_and_fewer_toward_the_end():
    dealer = Dealer(1000)
    for index in range(200):
        dealer.add(dealt_row(index))
    dealer.join(0, 8)
    dealer.join(1, 8)
    assert [len(rows) for _, rows in dealer.deal()] == [24, 24]
    ending = filled(24)
    ending.join(0, 8)
    ending.join(1, 8)
    shares = [len(rows) for _, rows in ending.deal()]
    assert sum(shares) == 24
    assert max(shares) <= 13


def test_a_worker_with_much_work_left_gets_no_more_of_the_last_rows():
    dealer = filled(12, tokens={0: 1000})
    dealer.join(0, 4)
    dealer.join(1, 4)
    hands = {worker: [dealt.row.index for dealt in rows] for worker, rows in dealer.deal()}
    assert hands[0] == [0]
    assert 0 not in hands[1]


def test_the_first_worker_leaves_a_share_to_those_that_are_still_starting():
    dealer = Dealer(8, num_workers=2)
    for index in range(8):
        dealer.add(dealt_row(index))
    dealer.join(0, 16)
    ((_, rows),) = dealer.deal()
    assert 4 <= len(rows) <= 5


def test_a_dropped_job_is_waited_for_no_more():
    dealer = Dealer(4)
    for index in range(4):
        dealer.add(dealt_row(index, jobs=(0, 1)))
    dealer.join(0, 2)
    dealer.deal()
    assert dealer.finish(0, 0, [0])
    dealer.drop(0)
    assert not dealer.finish(0, 0, [1])
    assert dealer.has_unfinished
    dealer.drop(1)
    assert not dealer.has_unfinished


def test_long_prompts_fill_the_pool_by_their_characters():
    dealer = Dealer(10)
    dealer.join(0, 256)
    row = InputRow(0, 0, prompt="x" * 40_000_000)
    assert dealer.has_room
    dealer.add(DealtRow.of(row, (0,), 1, 10))
    assert not dealer.has_room
