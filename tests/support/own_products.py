"""A pytest plugin (`-p support.own_products`) that hides cuBLASLt: our kernels do every product.

For compute-sanitizer's racecheck, which reports races inside cuBLAS's kernels and, when told to
leave them out, brings them to an illegal address. Nor are products timed: under the tool that takes
most of the time, and any order of them is right.
"""

from typing import Any

from orcd_batch.backend.cuda.cublas import CublasLt
from orcd_batch.backend.cuda.self_test import SelfTest
from orcd_batch.errors import DeviceError


def _hidden(*_: Any) -> None:
    raise DeviceError("cuBLASLt is hidden by support.own_products.")


def _not_timed(*_: Any) -> float:
    return 1.0


def pytest_configure() -> None:
    CublasLt.__init__ = _hidden  # type: ignore[method-assign]
    SelfTest.time = _not_timed  # type: ignore[assignment, method-assign]
