"""The card's clock and power while something runs: whether its power limit bounds the figure."""

import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_QUERY = "clocks.sm,power.draw,clocks_event_reasons.active"
_INTERVAL_MS = 200
# clocks_event_reasons: the clock is lowered to stay within the power limit (NVML's SwPowerCap).
_POWER_CAP = 0x4


@contextmanager
def card_state() -> Iterator[dict[str, Any]]:
    """Fills the dict at the end with `summary` of what nvidia-smi says meanwhile; without
    nvidia-smi it stays empty."""
    found: dict[str, Any] = {}
    if shutil.which("nvidia-smi") is None:
        yield found
        return
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    with tempfile.TemporaryFile("w+") as lines:
        watch = subprocess.Popen(
            [*command, "--id=0", f"--loop-ms={_INTERVAL_MS}"],
            stdout=lines,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield found
        finally:
            watch.terminate()
            watch.wait()
            lines.seek(0)
            found |= summary(lines.read().splitlines())


def summary(lines: list[str]) -> dict[str, Any]:
    """Medians of the clock in MHz and of the power in W, and the share of the samples in which the
    power limit held the clock down. lines: such as "1980 MHz, 693.90 W, 0x4"."""
    samples = [line.split(", ") for line in lines if ", 0x" in line]
    if not samples:
        return {}
    clocks, watts, reasons = zip(*samples, strict=True)
    capped = sum(bool(int(reason, 16) & _POWER_CAP) for reason in reasons)
    return {
        "sm_mhz": statistics.median(int(clock.split()[0]) for clock in clocks),
        "watts": statistics.median(float(power.split()[0]) for power in watts),
        "power_capped_share": round(capped / len(samples), 2),
    }
