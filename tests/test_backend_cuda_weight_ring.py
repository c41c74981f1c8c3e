"""No chain takes a slot of the weight ring for landed that is not, however late copies land."""

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

# As in kernels/few_rows_step.cu.
WARPS, COPIERS, LAG = 8, 4, 8


class Misread(Exception):
    """A wait ended before what it was for."""


@dataclass
class Barrier:
    """A barrier whose phases one arrival completes; a parity is all that a wait can name."""

    completed: int = 0

    def is_over(self, turn: int) -> bool:
        if (self.completed - 1) % 2 != turn % 2:
            return False
        if self.completed - 1 != turn:
            raise Misread(f"turn {turn} was awaited, {self.completed} are over")
        return True


@dataclass
class Ring:
    num_slots: int
    in_flight: int
    lag: int
    full: list[Barrier] = field(default_factory=list)
    empty: list[Barrier] = field(default_factory=list)
    landings: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.full = [Barrier() for _ in range(self.num_slots)]
        self.empty = [Barrier() for _ in range(self.num_slots)]

    def place(self, position: int) -> tuple[int, int]:
        return position % self.num_slots, position // self.num_slots


def rounds_of(count: int) -> list[int]:
    """Chains side by side, round by round, as `Share` deals them."""
    rounds = -(-count // WARPS)
    chains = -(-count // rounds)
    return [min(chains, count - start) for start in range(0, count, chains)]


def copy(ring: Ring, copier: int, progress: list[int], total: int, now: Any, rng: Any) -> Iterator:
    for position in range(copier, total, COPIERS):
        while min(progress) < position - ring.lag:
            yield
        if position >= ring.in_flight:
            slot, turn = ring.place(position - ring.in_flight)
            while not ring.full[slot].is_over(turn):
                yield
        slot, turn = ring.place(position)
        while not ring.empty[slot].is_over(turn - 1):
            yield
        delay = rng.choice((1, 5, 50, 400)) * rng.random()
        heapq.heappush(ring.landings, (now() + delay, position))
        progress[copier] = position + COPIERS
        yield
    progress[copier] = 1 << 30


def chain(ring: Ring, positions: list[int]) -> Iterator[None]:
    """Holds a slot until the next one has landed."""
    held = None
    for position in [*positions, None]:
        if position is not None:
            slot, turn = ring.place(position)
            while not ring.full[slot].is_over(turn):
                yield
        if held is not None:
            ring.empty[held].completed += 1
        held = None if position is None else slot
        yield


def plan(products: list[tuple[int, int]]) -> tuple[list[list[list[int]]], int]:
    """Of (units, stages): each product's chains, by the positions of their slots; all slots."""
    position, chains = 0, []
    for count, stages in products:
        of: list[list[int]] = [[] for _ in range(WARPS)]
        for active in rounds_of(count):
            for _ in range(stages):
                for warp in range(active):
                    of[warp].append(position + warp)
                position += active
        chains.append(of)
    return chains, position


def play(seed: int, num_slots: int, in_flight: int, lag: int = LAG) -> None:
    """Some products; now and then a copier or a chain stands still."""
    rng = random.Random(seed)
    ring = Ring(num_slots, in_flight, lag)
    products = [(rng.randint(1, 31), rng.choice((1, 2, 4, 12))) for _ in range(4)]
    chains, total = plan(products)
    clock = 0.0
    progress = list(range(COPIERS))
    copiers = [copy(ring, c, progress, total, lambda: clock, rng) for c in range(COPIERS)]
    for product in chains:
        running = [chain(ring, positions) for positions in product]
        while running:
            awake = rng.sample(copiers + running, rng.randint(1, len(copiers) + len(running)))
            for _ in range(rng.choice((1, 20, 100))):
                clock += 1
                while ring.landings and ring.landings[0][0] <= clock:
                    ring.full[ring.place(heapq.heappop(ring.landings)[1])[0]].completed += 1
                worker = rng.choice(awake)
                if next(worker, running) is running and worker in running:
                    running.remove(worker)
            assert clock < 1e6, "the ring stands still"


@pytest.mark.parametrize(("num_slots", "in_flight"), [(28, 8), (36, 16), (32, 12)])
def test_a_wait_ends_with_what_it_was_for(num_slots: int, in_flight: int) -> None:
    for seed in range(200):
        play(seed, num_slots, in_flight)


def is_misread(seed: int) -> bool:
    try:
        play(seed, 28, 8, lag=1 << 20)
    except Misread:
        return True
    return False


def test_copiers_that_do_not_keep_in_step_would_let_a_chain_read_too_early() -> None:
    assert any(is_misread(seed) for seed in range(200))
