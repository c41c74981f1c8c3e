"""A pytest plugin (`-p support.own_products`) that hides cuBLASLt: our kernels do every product.

For compute-sanitizer's racecheck, which reports races inside cuBLAS's kernels and, when told to
leave them out, brings them to an illegal address. Nor are products timed, and the self-test
compares them on one input each instead of many: under the tool both take most of the time, any
order of them is right, and their bits are tested elsewhere.
"""

from typing import Any

from orcd_batch.backend.cuda.cublas import CublasLt
from orcd_batch.backend.cuda.self_test import SelfTest
from orcd_batch.errors import DeviceError


def _hidden(*_: Any) -> None:
    raise DeviceError("cuBLASLt is hidden by support.own_products.")


def _not_timed(*_: Any) -> float:
    return 1.0


def _one_trial(*_: Any) -> int:
    return 1


def pytest_configure() -> None:
    CublasLt.__init__ = _hidden  # type: ignore[method-assign]
    SelfTest.time = _not_timed  # type: ignore[assignment, method-assign]
    SelfTest._num_trials = _one_trial  # type: ignore[method-assign]
