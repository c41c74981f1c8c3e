"""What the energy benchmark makes of the counter's steps."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from cuda_energy import mean_watts

# 100 W until second 2, then 600 W; a step each tenth of a second, as the counter shows it.
STEPS = [(i / 10, 10.0 * i if i <= 20 else 200.0 + 60.0 * (i - 20)) for i in range(50)]


@pytest.mark.parametrize(
    ("start", "end", "watts"), [(0.0, 1.95, 100.0), (2.0, 4.5, 600.0), (1.0, 3.0, 350.0)]
)
def test_the_watts_are_those_of_the_time_between(start: float, end: float, watts: float) -> None:
    assert mean_watts(STEPS, start, end) == pytest.approx(watts)


def test_the_ends_are_those_of_steps_not_of_the_time() -> None:
    assert mean_watts(STEPS, 2.01, 4.49) == pytest.approx(600.0)


def test_too_short_a_time_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"moved 1 times in 0\.15 s"):
        mean_watts(STEPS, 2.05, 2.2 - 1e-9)
