"""Which matrix products may be used on this card: those with the bits of gemm_k16, timed.

Only the comparison with gemm_k16 decides what may run, never a majority; time only chooses among
what may.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from orcd_batch.backend.cuda.array import FP16, DeviceArray
from orcd_batch.backend.cuda.cublas import Algorithm, CublasLt
from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.cuda.driver import call
from orcd_batch.backend.cuda.gemm_k16 import gemm_k16
from orcd_batch.backend.cuda.graph import time_launches
from orcd_batch.backend.cuda.program import Kernels
from orcd_batch.errors import DeviceError

# Rows of random input; a taller input repeats them.
_PATTERN_ROWS = 512
# Outputs that a comparison covers at least, where a small product allows it.
_OUTPUTS = 1 << 17
_POISON = 0xFE
# As many of the fastest that pass are timed at length.
_FINALISTS = 6

# Queues one product: (x, weight, y).
Product = Callable[[DeviceArray, DeviceArray, DeviceArray], None]


class SelfTest:
    """Compares and times products of one (N, K), of up to as many rows as `y` (M, N) fp32 has.

    y is overwritten; the memory of the input is given back by `close`.
    """

    def __init__(
        self, device: Device, kernels: Kernels, weights: Sequence[DeviceArray], y: DeviceArray
    ) -> None:
        self._device = device
        self._kernels = kernels
        self._weights = weights
        n, k = weights[0].shape
        x_rows = y.shape[0] + _PATTERN_ROWS
        self._x = device.allocate(x_rows * k * FP16.itemsize, "staging")
        self._y = y
        self._sum = device.allocate(8, "staging")
        self._shape = (n, k)
        self._fill(x_rows, k)

    def choose(
        self, library: CublasLt, fewest_rows: int, num_rows: int
    ) -> tuple[Algorithm | None, dict[str, Any]]:
        """The fastest candidate for `num_rows` whose bits equal gemm_k16's there and at
        `fewest_rows`, or None (gemm_k16 itself), and the record of the test."""
        candidates = self.by_time(library, library.candidates(num_rows, self._shape), num_rows)
        row_counts = sorted({fewest_rows, num_rows})
        expected = [self._bits(rows, partial(gemm_k16, self._kernels)) for rows in row_counts]
        passed: list[Algorithm] = []
        dropped: list[Algorithm] = []
        for algorithm in candidates:
            if len(passed) == _FINALISTS:
                break
            run = partial(library.run, algorithm)
            equal = [self._bits(rows, run) for rows in row_counts] == expected
            (passed if equal else dropped).append(algorithm)
        best, seconds = self._fastest(library, passed, num_rows)
        record = {
            "algorithm": best.config if best else "gemm_k16",
            "microseconds": round(seconds * 1e6, 2),
            "candidates": len(candidates),
            "equal_to_gemm_k16": len(passed),
            "dropped": [algorithm.config for algorithm in dropped],
        }
        return best, record

    def time(self, num_rows: int, run: Product, repeats: int = 20) -> float:
        """Seconds per product on the GPU, weights taken in turn so that they are not in cache."""
        x, y = self._operands(num_rows)

        def record() -> None:
            for i in range(repeats):
                run(x, self._weights[i % len(self._weights)], y)

        return time_launches(self._device, record) / repeats

    def by_time(
        self, library: CublasLt, algorithms: list[Algorithm], num_rows: int
    ) -> list[Algorithm]:
        """Those that run at all, fastest first after a short timing."""
        timed = []
        for algorithm in algorithms:
            with suppress(DeviceError):
                seconds = self.time(num_rows, partial(library.run, algorithm), 3)
                timed.append((seconds, algorithm))
        return [algorithm for _, algorithm in sorted(timed, key=lambda pair: pair[0])]

    def close(self) -> None:
        for buffer in (self._x, self._sum):
            self._device.free(buffer)

    def _fastest(
        self, library: CublasLt, algorithms: list[Algorithm], num_rows: int
    ) -> tuple[Algorithm | None, float]:
        if not algorithms:
            return None, self.time(num_rows, partial(gemm_k16, self._kernels), 4)
        timed = [(self.time(num_rows, partial(library.run, a)), a) for a in algorithms]
        seconds, best = min(timed, key=lambda pair: pair[0])
        return best, seconds

    def _bits(self, num_rows: int, run: Product) -> int | None:
        """A hash of the products of several inputs, every output poisoned before; None when
        they cannot be run."""
        from cuda.bindings import driver

        stream = self._device.stream.handle
        checksum = self._kernels.get("checksum")
        self._device.fill(self._sum.ptr, 8)
        for trial in range(self._num_trials(num_rows)):
            x, y = self._operands(num_rows, first_row=trial)
            self._device.fill(y.ptr, y.nbytes, _POISON + trial % 2)
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

    def _operands(self, num_rows: int, first_row: int = 0) -> tuple[DeviceArray, DeviceArray]:
        k = self._shape[1]
        return (
            DeviceArray(self._x.ptr + first_row * k * FP16.itemsize, (num_rows, k), FP16),
            self._y.rows(0, num_rows),
        )

    def _fill(self, x_rows: int, k: int) -> None:
        from cuda.bindings import driver

        rows = _PATTERN_ROWS
        pattern = np.random.default_rng(k).standard_normal((rows, k), np.float32).astype(FP16)
        stream = self._device.stream.handle
        call(driver.cuMemcpyHtoDAsync(self._x.ptr, pattern.ctypes.data, pattern.nbytes, stream))
        row_bytes = k * FP16.itemsize
        while rows < x_rows:
            count = min(rows, x_rows - rows) * row_bytes
            target = self._x.ptr + rows * row_bytes
            call(driver.cuMemcpyDtoDAsync(target, self._x.ptr, count, stream))
            rows = min(2 * rows, x_rows)
        self._device.synchronize()
