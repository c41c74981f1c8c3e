"""Which matrix products may be used on this card: those with the bits of gemm_k16, timed.

Only the comparison with gemm_k16 decides what may run, never a majority; time only chooses among
what may.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orcd_batch.backend.cuda.array import FP16, FP32, DeviceArray
from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.cuda.driver import call
from orcd_batch.backend.cuda.gemm_k16 import gemm_k16
from orcd_batch.backend.cuda.graph import time_lasting, time_launches
from orcd_batch.backend.cuda.product import Output
from orcd_batch.backend.cuda.program import Kernels
from orcd_batch.errors import DeviceError

# Rows of random input; a taller input repeats them.
_PATTERN_ROWS = 512
# Outputs that a comparison covers at least, where a small product allows it.
_OUTPUTS = 1 << 17
_POISON = 0xFE
# As many of the fastest that pass are timed at length. From _MANY_ROWS on they keep the card at
# its power limit, where others are fastest than in short runs: more finalists, timed in rounds.
_MANY_ROWS = 1024
_FINALISTS, _MANY_FINALISTS = 4, 8
_ROUNDS = 3
# Of one round, and the most products in it.
_ROUND_SECONDS = 2e-3
_MOST_REPEATS = 20
# From so many rows and floating-point operations on, steps of such products keep the card at its
# power limit, and the one that needs the least energy is fastest there: those within _NEAR of the
# fastest, _MOST_LASTING of them, are timed once more, each for a while and nothing else meanwhile.
_LASTING_ROWS, _LASTING_FLOPS = 1536, 3e10
_NEAR, _MOST_LASTING = 1.12, 4
# The card adapts its clock every 0.1 s (H200).
_HEAT_S, _SETTLE_S, _LASTING_S = 0.4, 0.1, 0.15
# Up to so many rows a product is timed as in a decode step: after a small kernel of ours, beside
# whose end it may start.
_FEW_ROWS = 8

# Queues one product: (x, weight, y).
Product = Callable[[DeviceArray, DeviceArray, DeviceArray], None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to get a product. code: what it is found by again; config: what the manifest says."""

    code: str
    config: Any
    run: Product


class SelfTest:
    """Compares and times products of one (N, K) and output, of up to as many rows as `y` has.

    reference: whose bits are right; gemm_k16 for this output where none is given. y is
    overwritten; the memory of the input is given back by `close`.
    """

    def __init__(
        self,
        device: Device,
        kernels: Kernels,
        weights: Sequence[DeviceArray],
        y: DeviceArray,
        output: Output = Output.FP32,
        reference: Product | None = None,
        between: DeviceArray | None = None,
    ) -> None:
        """between: where a product in two parts leaves what is between them."""
        self._device = device
        self._kernels = kernels
        self._weights = weights
        n, k = weights[0].shape
        x_rows = y.shape[0] + _PATTERN_ROWS
        self._x = device.allocate(x_rows * k * FP16.itemsize, "staging")
        self._y = y
        self._between = between
        self._output = output
        self.reference: Product = reference or partial(gemm_k16, kernels, output=output)
        self._sum = device.allocate(8, "staging")
        added_rows = _PATTERN_ROWS if output is Output.ADD else 0
        self._added = device.allocate(added_rows * n * FP32.itemsize, "staging")
        self._row = device.allocate(k * FP16.itemsize, "staging")
        self._index = device.allocate(4, "staging")
        device.fill(self._index.ptr, 4)
        self._shape = (n, k)
        self._is_hot = False
        rng = np.random.default_rng(k)
        x_pattern = rng.standard_normal((_PATTERN_ROWS, k), np.float32).astype(FP16)
        self._fill(self._x.ptr, x_pattern, x_rows)
        if added_rows:
            added = rng.standard_normal((added_rows, n), np.float32)
            self._fill(self._added.ptr, added, added_rows)

    def choose(
        self, candidates: Sequence[Candidate], fewest_rows: int, num_rows: int
    ) -> tuple[Candidate | None, dict[str, Any]]:
        """The fastest candidate for `num_rows` whose bits equal gemm_k16's there and at
        `fewest_rows`, or None (gemm_k16 itself), and the record of the test."""
        ordered = self.by_time(candidates, num_rows)
        row_counts = sorted({fewest_rows, num_rows})
        expected = [self._bits(rows, self.reference) for rows in row_counts]
        passed: list[Candidate] = []
        dropped: list[Candidate] = []
        for candidate in ordered:
            if len(passed) == (_MANY_FINALISTS if num_rows >= _MANY_ROWS else _FINALISTS):
                break
            equal = [self._bits(rows, candidate.run) for rows in row_counts] == expected
            (passed if equal else dropped).append(candidate)
        best, seconds = self._fastest(passed, num_rows)
        record = {
            "algorithm": best.config if best else "gemm_k16",
            "microseconds": round(seconds * 1e6, 2),
            "candidates": len(ordered),
            "equal_to_gemm_k16": len(passed),
            "dropped": [candidate.config for candidate in dropped],
        }
        return best, record

    def time(self, num_rows: int, run: Product, repeats: int = _MOST_REPEATS) -> float:
        """Seconds per product on the GPU, weights taken in turn so that they are not in cache.

        Few rows: together with the small kernel before it.
        """
        return time_launches(self._device, self._products(num_rows, run, repeats)) / repeats

    def by_time(self, candidates: Sequence[Candidate], num_rows: int) -> list[Candidate]:
        """Those that run at all, fastest first after a short timing."""
        timed = []
        for candidate in candidates:
            with suppress(DeviceError):
                timed.append((self.time(num_rows, candidate.run, 3), candidate))
        return [candidate for _, candidate in sorted(timed, key=lambda pair: pair[0])]

    def times(self, candidates: Sequence[Candidate], num_rows: int) -> list[float]:
        """Seconds per product of each, timed at length and in turn: all find the card as warm."""
        once = self.time(num_rows, candidates[0].run, 2)
        repeats = max(2, min(_MOST_REPEATS, int(_ROUND_SECONDS / once)))
        rounds = [
            [self.time(num_rows, candidate.run, repeats) for candidate in candidates]
            for _ in range(1 if _FEW_ROWS < num_rows < _MANY_ROWS else _ROUNDS)
        ]
        return [median(found) for found in zip(*rounds, strict=True)]

    def lasting_times(self, candidates: Sequence[Candidate], num_rows: int) -> list[float]:
        """Seconds per product of each where it goes on, on a card that is warm already."""
        found: list[float] = []
        for candidate in candidates:
            settle_s = _SETTLE_S if self._is_hot else _HEAT_S
            self._is_hot = True
            record = self._products(num_rows, candidate.run, _MOST_REPEATS)
            seconds = time_lasting(self._device, record, settle_s, _LASTING_S)
            found.append(seconds / _MOST_REPEATS)
        return found

    def close(self) -> None:
        for buffer in (self._x, self._sum, self._added, self._row, self._index):
            self._device.free(buffer)

    def _fastest(
        self, candidates: Sequence[Candidate], num_rows: int
    ) -> tuple[Candidate | None, float]:
        if not candidates:
            return None, self.time(num_rows, self.reference, 4)
        seconds = self.times(candidates, num_rows)
        ranked = sorted(zip(seconds, candidates, strict=True), key=lambda pair: pair[0])
        flops = 2 * num_rows * self._shape[0] * self._shape[1]
        if num_rows >= _LASTING_ROWS and flops >= _LASTING_FLOPS:
            near = [one for time, one in ranked if time <= _NEAR * ranked[0][0]][:_MOST_LASTING]
            lasting = self.lasting_times(near, num_rows)
            ranked = sorted(zip(lasting, near, strict=True), key=lambda pair: pair[0])
        best_seconds, best = ranked[0]
        return best, best_seconds

    def _products(self, num_rows: int, run: Product, repeats: int) -> Callable[[], None]:
        """What queues so many products, weights taken in turn."""
        x, y = self._operands(num_rows)

        def record() -> None:
            for i in range(repeats):
                if num_rows <= _FEW_ROWS:
                    self._copy_a_row(x)
                run(x, self._weights[i % len(self._weights)], y)

        return record

    def _bits(self, num_rows: int, run: Product) -> int | None:
        """A hash of the products of several inputs; None when they cannot be run.

        What is there before is poison, or the random numbers to be added to.
        """
        from cuda.bindings import driver

        stream = self._device.stream.handle
        checksum = self._kernels.get("checksum")
        self._device.fill(self._sum.ptr, 8)
        for trial in range(self._num_trials(num_rows)):
            x, y = self._operands(num_rows, first_row=trial)
            self._prepare_output(y, trial)
            try:
                run(x, self._weights[trial % len(self._weights)], y)
            except DeviceError:
                return None
            args = [y, np.uint64(y.nbytes), self._sum.ptr]
            self._kernels.launch(checksum, 264, 256, args)
        result = np.zeros(1, np.uint64)
        call(driver.cuMemcpyDtoHAsync(result.ctypes.data, self._sum.ptr, 8, stream))
        self._device.synchronize()
        return int(result[0])

    def _num_trials(self, num_rows: int) -> int:
        """Few outputs would agree by chance: small products are compared on many inputs."""
        return max(1, min(_PATTERN_ROWS, _OUTPUTS // (num_rows * self._shape[0])))

    def _copy_a_row(self, x: DeviceArray) -> None:
        vectors = self._shape[1] * FP16.itemsize // 16
        kernel = self._kernels.get("take_rows", {"ROW_VECTORS": vectors, "THREADS": 128})
        self._kernels.launch(kernel, 1, 128, [x, self._index.ptr, self._row.ptr])

    def _operands(self, num_rows: int, first_row: int = 0) -> tuple[DeviceArray, DeviceArray]:
        k = self._shape[1]
        return (
            DeviceArray(self._x.ptr + first_row * k * FP16.itemsize, (num_rows, k), FP16),
            self._y.rows(0, num_rows),
        )

    def _prepare_output(self, y: DeviceArray, trial: int) -> None:
        if self._output is Output.ADD:
            self._repeat(y.ptr, self._added.ptr, y.shape[0], y.nbytes // y.shape[0])
        else:
            self._device.fill(y.ptr, y.nbytes, _POISON + trial % 2)
        if self._between is not None:
            between = self._between.rows(0, y.shape[0])
            self._device.fill(between.ptr, between.nbytes, _POISON + trial % 2)

    def _fill(self, target: int, pattern: NDArray[Any], num_rows: int) -> None:
        from cuda.bindings import driver

        stream = self._device.stream.handle
        call(driver.cuMemcpyHtoDAsync(target, pattern.ctypes.data, pattern.nbytes, stream))
        self._repeat(target, target, num_rows, pattern.nbytes // len(pattern))
        self._device.synchronize()

    def _repeat(self, target: int, pattern: int, num_rows: int, row_bytes: int) -> None:
        """Rows of the pattern (of _PATTERN_ROWS), over and over, to num_rows rows at target."""
        from cuda.bindings import driver

        stream, rows = self._device.stream.handle, min(num_rows, _PATTERN_ROWS)
        if target != pattern:
            call(driver.cuMemcpyDtoDAsync(target, pattern, rows * row_bytes, stream))
        while rows < num_rows:
            count = min(rows, num_rows - rows)
            call(
                driver.cuMemcpyDtoDAsync(
                    target + rows * row_bytes, target, count * row_bytes, stream
                )
            )
            rows += count
