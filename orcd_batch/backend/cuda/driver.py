"""Calls into the CUDA driver: a non-zero status becomes a DeviceError."""

from typing import Any

from orcd_batch.errors import DeviceError


def call(result: tuple[Any, ...]) -> Any:
    """Unpacks `(status, *values)` of a cuda.bindings.driver function.

    Returns None, the one value, or the tuple of values. Raises DeviceError naming the status.
    """
    status, *values = result
    if int(status) != 0:
        raise DeviceError(f"The GPU reported {_describe(status)}.")
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)


def _describe(status: Any) -> str:
    from cuda.bindings import driver

    error, text = driver.cuGetErrorString(status)
    name = getattr(status, "name", str(status))
    if int(error) != 0 or not text:
        return str(name)
    return f"{name} ({text.decode(errors='replace')})"
