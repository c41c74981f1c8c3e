"""Closing after a fault: everything is tried, and the first failure is the one that is told."""

from types import SimpleNamespace
from typing import Any

import pytest

from orcd_batch.backend.cuda.closing import close_all
from orcd_batch.backend.cuda.driver import gpu_failure
from orcd_batch.engine_factory import BuiltEngine, EngineChoice
from orcd_batch.errors import DeviceError, RowError


class Closings:
    """Things to close that note their turn; those in `failing` then fail."""

    def __init__(self, *failing: int) -> None:
        self.failing = failing
        self.closed: list[int] = []

    def __getitem__(self, number: int) -> Any:
        def close() -> None:
            self.closed.append(number)
            if number in self.failing:
                raise DeviceError(f"number {number}")

        return close


def test_everything_is_closed_in_order_and_the_first_failure_is_raised() -> None:
    closings = Closings(2, 3)
    with pytest.raises(DeviceError, match="number 2"):
        close_all(*(closings[number] for number in range(1, 6)))
    assert closings.closed == [1, 2, 3, 4, 5]


def test_an_interrupt_while_closing_does_not_leave_the_rest_open() -> None:
    closings = Closings()

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        close_all(interrupted, closings[1])
    assert closings.closed == [1]


def built(closings: Closings) -> BuiltEngine:
    engine: Any = SimpleNamespace(close=closings[1])
    ops: Any = SimpleNamespace(op_times=lambda: None)
    return BuiltEngine(engine, None, ops, EngineChoice("numpy", "cpu", ""), 0, 0)  # type: ignore[arg-type]


def test_a_run_that_failed_keeps_its_error_when_closing_its_engine_fails_too() -> None:
    closings = Closings(1)
    with pytest.raises(RowError, match="the first error"), built(closings):
        raise RowError("the first error")
    assert closings.closed == [1]


def test_a_run_that_went_well_tells_when_closing_its_engine_fails() -> None:
    with pytest.raises(DeviceError, match="number 1"), built(Closings(1)):
        pass


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        ("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access.", "Run the same command again"),
        ("CUDA_ERROR_OUT_OF_MEMORY: out of memory", "lower engine.gpu_memory_utilization"),
    ],
)
def test_a_gpu_failure_is_a_sentence_with_a_next_step(status: str, advice: str) -> None:
    told = str(gpu_failure(RuntimeError(status)))
    assert told.startswith(f"The GPU reported {status.rstrip('.')}.")
    assert advice in told
