"""Blocks that meet through packets alone lose none: a real program, played by slow blocks."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.step_program import record

from orcd_batch.backend.cuda.plan import ModelShape
from orcd_batch.backend.cuda.step_program import Op

# Products of 24, 8, 32, 8 and 5 tiles, by fewer blocks and by more: some own no share of some.
SHAPE = ModelShape(3, 64, 256, 4, 4, 16, 40, 1024)
SPLITS, STEPS = 2, 3
PARTIALS = 1
Memory = dict[tuple[int, int], int]
Program = np.ndarray[Any, Any]


class Overtaken(Exception):
    """A packet was written again before someone had read it."""


def share(num_units: int, block: int, num_blocks: int) -> range:
    """As `Share` of kernels/few_rows_step.cu."""
    return range(block * num_units // num_blocks, (block + 1) * num_units // num_blocks)


def item_reads(item: int, num_tiles: int) -> list[int]:
    """The tiles of qkv that hold an item's query, and of the last split also its key and value."""
    head, split = item % SHAPE.num_kv_heads, item // SHAPE.num_kv_heads
    tiles_of_head = SHAPE.head_dim // 8
    parts = range(3) if split == SPLITS - 1 else range(1)
    starts = [(part * SHAPE.num_heads + head) * tiles_of_head for part in parts]
    tiles = [tile for start in starts for tile in range(start, start + tiles_of_head)]
    assert max(tiles) < num_tiles
    return tiles


def read(memory: Memory, y: int, units: list[int], tag: int) -> Iterator[None]:
    """Waits for packets, in any order."""
    for unit in units:
        while (found := memory.get((y, unit), 0)) != tag:
            if found > tag:
                raise Overtaken(f"{unit} of {y:#x} is {found}, {tag} was wanted")
            yield


def play(
    program: Program,
    block: int,
    num_blocks: int,
    memory: Memory,
    first_tag: int,
    rng: Any,
    rule: bool,
) -> Iterator[None]:
    """One block's step. rule: who owns no share does not read."""
    num_items = SPLITS * SHAPE.num_kv_heads
    for i, now in enumerate(program):
        before, tag = program[i - 1], first_tag + i
        if now["op"] == Op.ATTEND:
            for item in range(block, num_items, num_blocks):
                tiles = item_reads(item, int(before["num_units"]))
                yield from read(memory, int(now["x"]), rng.sample(tiles, len(tiles)), tag - 1)
                yield
                memory[PARTIALS, item] = tag
            for head in range(num_blocks - 1 - block, SHAPE.num_heads, num_blocks):
                splits = [split * SHAPE.num_kv_heads + head for split in range(SPLITS)]
                yield from read(memory, PARTIALS, splits, tag)
                yield
                memory[int(now["y"]), head] = tag
            continue
        units = share(int(now["num_units"]), block, num_blocks)
        if rule and not units:
            continue
        if now["op"] != Op.FIRST_NORM:
            heads = now["op"] == Op.ATTENTION
            count = SHAPE.num_heads if heads else int(before["num_units"])
            yield from read(memory, int(now["x"]), rng.sample(range(count), count), tag - 1)
        for unit in units:
            yield
            memory[int(now["y"]), unit] = tag


def run_steps(program: Program, num_blocks: int, seed: int, rule: bool = True) -> None:
    """Some steps over the same packets; at any time some blocks stand still for long."""
    rng = random.Random(seed)
    memory: Memory = {}
    for step in range(1, STEPS + 1):
        first_tag = step * (len(program) | 1)
        common = (num_blocks, memory, first_tag, rng, rule)
        running = {block: play(program, block, *common) for block in range(num_blocks)}
        turns = 0
        while running:
            awake = rng.sample(sorted(running), rng.randint(1, len(running)))
            for _ in range(rng.choice((1, 10, 200))):
                block = rng.choice(awake)
                if block in running and next(running[block], running) is running:
                    del running[block]
            turns += 1
            assert turns < 100_000, "the blocks wait for each other"


@pytest.mark.parametrize("num_blocks", [3, 7, 20, 40])
def test_no_packet_is_written_again_before_all_its_readers_have_it(num_blocks: int) -> None:
    program, *_ = record(SHAPE, SHAPE.num_layers)
    for seed in range(30):
        run_steps(program, num_blocks, seed)


def is_overtaken(program: Program, seed: int) -> bool:
    try:
        run_steps(program, 40, seed, rule=False)
    except Overtaken:
        return True
    return False


def test_blocks_that_read_what_they_do_not_need_would_be_overtaken() -> None:
    program, *_ = record(SHAPE, SHAPE.num_layers)
    assert any(is_overtaken(program, seed) for seed in range(20))
