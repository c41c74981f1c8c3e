"""A pytest plugin (`-p support.own_products`) that hides cuBLASLt: our kernels do every product.

For compute-sanitizer's racecheck, which reports races inside cuBLAS's kernels and, when told to
leave them out, brings them to an illegal address.
"""

from typing import Any

from orcd_batch.backend.cuda.cublas import CublasLt
from orcd_batch.errors import DeviceError


def _hidden(*_: Any) -> None:
    raise DeviceError("cuBLASLt is hidden by support.own_products.")


def pytest_configure() -> None:
    CublasLt.__init__ = _hidden  # type: ignore[method-assign]
