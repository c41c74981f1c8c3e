"""What nvidia-smi says of a card, in three figures."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from card_state import card_state, summary

# As one H200 said it during w5.
LINES = [
    "1980 MHz, 129.90 W, 0x0000000000000000",
    "1365 MHz, 693.17 W, 0x0000000000000004",
    "1368 MHz, 694.02 W, 0x0000000000000004",
    "1371 MHz, 692.40 W, 0x0000000000000024",
    "1375 MHz, 69",  # ended while it wrote
]


def test_clock_power_and_the_share_under_the_power_limit_are_told() -> None:
    assert summary(LINES) == {"sm_mhz": 1369.5, "watts": 692.785, "power_capped_share": 0.75}


def test_nothing_said_is_nothing_told() -> None:
    assert summary([]) == {}


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is an NVIDIA GPU")
def test_without_nvidia_smi_nothing_is_told() -> None:
    with card_state() as state:
        pass
    assert state == {}
