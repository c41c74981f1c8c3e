"""Calls into the CUDA driver: a non-zero status becomes a DeviceError."""

from typing import Any

from orcd_batch.errors import DeviceError

_OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
# No GPU to speak of: the caller says what to do then.
_NO_DEVICE = ("NO_DEVICE", "NOT_INITIALIZED", "SYSTEM_DRIVER_MISMATCH", "SYSTEM_NOT_READY")


def call(result: tuple[Any, ...]) -> Any:
    """Unpacks `(status, *values)` of a cuda.bindings.driver function.

    Returns None, the one value, or the tuple of values. Raises DeviceError naming the status.
    """
    status, *values = result
    if int(status) != 0:
        raise gpu_failure(status)
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)


def raise_gpu_failure(error: Exception) -> None:
    """Raises the DeviceError for cuda.core's own error; any other error is left to the caller."""
    if type(error).__name__ == "CUDAError":  # cuda.core does not export it
        raise gpu_failure(error) from error


def gpu_failure(status: Any) -> DeviceError:
    """The error for a driver status, or for an exception of cuda.core that names one."""
    what = f"{status}".strip().rstrip(".") if isinstance(status, Exception) else _describe(status)
    if _OUT_OF_MEMORY in what:
        advice = " Close other programs on this GPU, or lower engine.gpu_memory_utilization."
    elif any(name in what for name in _NO_DEVICE):
        advice = ""
    else:
        advice = " Run the same command again; if it fails again, test the card."
    return DeviceError(f"The GPU reported {what}.{advice}")


def wait_for_event(event: Any) -> None:
    """Waits for a cuda.core event; what failed on the GPU before it surfaces as DeviceError."""
    from cuda.bindings import driver

    call(driver.cuEventSynchronize(event.handle))


def wait_for_stream(stream: Any) -> None:
    """Waits for a cuda.core stream; errors as `wait_for_event`."""
    from cuda.bindings import driver

    call(driver.cuStreamSynchronize(stream.handle))


def _describe(status: Any) -> str:
    from cuda.bindings import driver

    error, text = driver.cuGetErrorString(status)
    name = getattr(status, "name", str(status))
    if int(error) != 0 or not text:
        return str(name)
    return f"{name} ({text.decode(errors='replace')})"
