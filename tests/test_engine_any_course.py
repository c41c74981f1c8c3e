"""Whatever course a run takes, every sample ends with the bits it has alone: drawn at random."""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.gguf_factory import write_model
from support.numpy_model import load_numpy_model

from orcd_batch import SamplingParams
from orcd_batch.backend.numpy_ops import NumpyOps
from orcd_batch.backend.ops import BLOCK_SIZE, Batch, Compute, KVCache, SampleBatch, Sampled
from orcd_batch.engine import Completion, Engine, Request

MAX_MODEL_LEN = 256
NUM_COURSES = 25
LENGTHS = (1, 2, 30, 63, 64, 65, 100, 127, 128, 129, 150)
Lists = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...], tuple[float, ...], str]


class LateOps(NumpyOps):
    """As a GPU: work is queued, in order, and runs when its results are asked for."""

    def __init__(self) -> None:
        super().__init__(1)
        self._queue: deque[Callable[[], None]] = deque()
        self._sampled = np.zeros(0, np.int32)

    def copy_blocks(self, caches: Sequence[KVCache], copies: NDArray[np.int32]) -> None:
        run = super().copy_blocks
        self._queue.append(lambda: run(caches, copies))

    def launch(self, compute: Compute, batch: Batch, sampling: SampleBatch | None) -> Any:
        results: list[Sampled | None] = []

        def run() -> None:
            placed = self.place(replace(batch, token_ids=self._fed_back(batch.token_ids)))
            seen = sampling and replace(sampling, seen_ids=self._fed_back(sampling.seen_ids))
            results.append(compute(placed, seen))
            sampled = results[0]
            self._sampled = np.zeros(0, np.int32) if sampled is None else sampled.token_ids

        self._queue.append(run)
        return results

    def collect(self, launched: Any) -> Sampled | None:
        while not launched:
            self._queue.popleft()()
        found: Sampled | None = launched[0]
        return found

    def _fed_back(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        whole = ids.copy()
        whole[ids < 0] = self._sampled[-1 - ids[ids < 0]]
        return whole


class StopAtSum:
    """Ends a sample at the first token that makes the sum of all a multiple of 7."""

    def __call__(self, token_ids: Sequence[int]) -> bool:
        return sum(token_ids) % 7 == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path: Path = tmp_path_factory.mktemp("course") / "model.gguf"
    write_model(path, hidden_size=64, num_heads=2, num_kv_heads=1, intermediate_size=64)
    return load_numpy_model(path)


def requests() -> list[Request]:
    """Prompts that begin alike, some but for their last token, each with several samples."""
    draw = random.Random(1)
    stems = [[draw.randrange(250) for _ in range(200)] for _ in range(2)]
    found: list[Request] = []
    for length in LENGTHS:
        for stem, is_changed in ((0, False), (0, True), (1, False)):
            ids = stems[stem][:length]
            if is_changed:
                ids = [*ids[:-1], (ids[-1] + 1) % 250]
            prompt = tuple(ids)
            for sample in range(draw.choice([1, 2, 4])):
                key = len(found)
                params = SamplingParams(
                    temperature=(0.0, 1.0, 1.3)[key % 3],
                    top_k=(0, 30)[key % 2],
                    repetition_penalty=(1.0, 1.3, 1.0)[sample % 3],
                    seed=sample % 2,
                    max_tokens=draw.choice([1, 2, 5, 14]),
                )
                found.append(
                    Request(
                        key,
                        prompt if sample % 2 else tuple(ids),
                        params,
                        stream=key,
                        stop_token_ids=frozenset(draw.sample(range(250), 6)),
                        make_stop_check=StopAtSum if key % 5 == 0 else None,
                    )
                )
    return found


def lists(done: Completion) -> Lists:
    ids, prints = tuple(done.token_ids), tuple(done.fingerprints)
    return ids, prints, tuple(done.logprobs), tuple(done.margins), done.finish_reason


@pytest.fixture(scope="module")
def alone(model: Any) -> dict[object, Lists]:
    config, weights = model
    engine = Engine(
        config,
        weights,
        NumpyOps(1),
        max_num_seqs=1,
        max_num_batched_tokens=MAX_MODEL_LEN,
        num_blocks=MAX_MODEL_LEN // BLOCK_SIZE,
        max_model_len=MAX_MODEL_LEN,
        prefix_caching=False,
    )
    found = {}
    for request in requests():
        engine.add(request)
        while engine.has_unfinished:
            found.update({done.key: lists(done) for done in engine.step()})
    engine.close()
    return found


@dataclass(frozen=True)
class Course:
    """Limits, and the steps after which everything is dropped and what is left is added again."""

    limits: dict[str, Any]
    drops: frozenset[int]
    todo: list[Request]

    @classmethod
    def drawn(cls, seed: int) -> "Course":
        draw = random.Random(seed)
        num_seqs = draw.choice([1, 2, 3, 5, 9, 17])
        limits = {
            "max_num_seqs": num_seqs,
            "max_num_batched_tokens": num_seqs + draw.choice([0, 1, 7, 64, 150, 600]),
            "num_blocks": draw.choice([4, 5, 6, 9, 14, 30]),
            "prefix_caching": draw.random() < 0.9,
            "run_ahead": draw.random() < 0.7,
        }
        drops = [draw.randrange(1, 60) for _ in range(draw.choice([0, 0, 1, 3]))]
        todo = draw.sample(requests(), draw.choice([5, 12, 25]))
        if draw.random() < 0.5:
            todo.sort(key=lambda request: int(str(request.key)))
        return cls(limits, frozenset(drops), todo)

    def run(self, model: Any) -> dict[object, Lists]:
        config, weights = model
        engine = Engine(config, weights, LateOps(), max_model_len=MAX_MODEL_LEN, **self.limits)
        found: dict[object, Lists] = {}
        for request in self.todo:
            engine.add(request)
        num_steps = 0
        while engine.has_unfinished:
            for done in engine.step():
                assert done.key not in found, "a request finished twice"
                found[done.key] = lists(done)
            num_steps += 1
            if num_steps in self.drops:
                engine.reset()
                for request in self.todo:
                    if request.key not in found:
                        engine.add(request)
        assert engine.block_manager.num_available == self.limits["num_blocks"]
        engine.close()
        return found


def test_every_sample_has_the_bits_it_has_alone(model: Any, alone: dict[object, Lists]) -> None:
    for seed in range(NUM_COURSES):
        course = Course.drawn(seed)
        expected = {request.key: alone[request.key] for request in course.todo}
        assert course.run(model) == expected, f"seed {seed}: {course.limits}"
