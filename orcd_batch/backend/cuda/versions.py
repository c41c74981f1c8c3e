"""The versions of everything below us that could change a bit on a GPU."""

from orcd_batch.backend.cuda.cublaslt_binding import cublaslt
from orcd_batch.backend.cuda.device import Device


def library_versions(device: Device) -> dict[str, str | None]:
    """Driver, CUDA, compiler and matrix library; None for cuBLASLt where it is not installed."""
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return {
        "driver": device.driver_version,
        "cuda": device.cuda_version,
        "nvrtc": f"{major}.{minor}",
        "cublaslt": _cublaslt_version(),
    }


def _cublaslt_version() -> str | None:
    try:
        return str(cublaslt().get_version())
    except Exception:  # nvmath raises types of its own when the library cannot be loaded
        return None
