"""One GPU: its facts, its one stream, and every byte taken from it, by use."""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

from orcd_batch.backend.cuda.closing import close_all
from orcd_batch.backend.cuda.driver import call, raise_gpu_failure, wait_for_stream
from orcd_batch.errors import DeviceError

MemoryUse = Literal["weights", "kv_cache", "work_space", "staging"]

# The generic kernels need cp.async and mma.m16n8k16 with fp32 accumulation.
MIN_COMPUTE_CAPABILITY = (8, 0)

_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Bytes free and in total on the card."""

    free: int
    total: int


@dataclass(frozen=True, slots=True)
class Buffer:
    """One plain allocation on the card. `ptr` is aligned to at least 256 bytes."""

    ptr: int
    num_bytes: int
    use: MemoryUse


class Device:
    """Opens the GPU `index` (as numbered by CUDA_VISIBLE_DEVICES) for this process.

    Raises DeviceError when there is no GPU, its driver is too old for the compiler at hand, or
    the card is older than sm_80.
    """

    def __init__(self, index: int = 0) -> None:
        core, driver = _import_cuda()
        self._driver = driver
        version = _driver_version(driver)
        _check_driver(version)
        count = call(driver.cuDeviceGetCount())
        if index >= count:
            raise DeviceError(
                f"GPU {index} was asked for and this process sees {count}; "
                "check CUDA_VISIBLE_DEVICES, or use engine=numpy."
            )
        self._device = core.Device(index)
        self._device.set_current()
        self.context = call(driver.cuCtxGetCurrent())
        properties = self._device.properties
        self.index = index
        self.name: str = self._device.name
        self.compute_capability: tuple[int, int] = tuple(self._device.compute_capability)
        self.arch = "sm_{}{}".format(*self.compute_capability)
        self.sm_count: int = properties.multiprocessor_count
        self.max_shared_memory: int = properties.max_shared_memory_per_block_optin
        self.cuda_version = f"{version // 1000}.{version % 1000 // 10}"
        self.driver_version = _kernel_driver_version(core) or self.cuda_version
        if self.compute_capability < MIN_COMPUTE_CAPABILITY:
            raise DeviceError(
                f"{self.name} is {self.arch} and the kernels need sm_80 or later; use engine=numpy."
            )
        self.stream: Any = self._device.create_stream()
        self._buffers: dict[int, Buffer] = {}
        self._is_closed = False

    def new_stream(self) -> Any:
        """A further non-blocking cuda.core stream; the caller closes it."""
        return self._device.create_stream()

    def record(self, event: Any = None) -> Any:
        """A cuda.core event behind what is queued on the stream; `event` is used again.

        Raises DeviceError where the GPU failed before.
        """
        try:
            return self.stream.record(event)
        except Exception as error:
            raise_gpu_failure(error)
            raise

    def make_current(self) -> None:
        """Binds this GPU to the calling thread: a thread's first call into CUDA."""
        call(self._driver.cuCtxSetCurrent(self.context))

    def allocate(self, num_bytes: int, use: MemoryUse) -> Buffer:
        """Takes memory for as long as the device is open, or until `free`.

        Raises DeviceError with the bytes needed and available when it does not fit.
        """
        size = -(-max(num_bytes, 1) // _ALIGNMENT) * _ALIGNMENT
        status, pointer = self._driver.cuMemAlloc(size)
        if int(status) == int(self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY):
            raise DeviceError(not_enough_memory(use, size, self.memory_info()))
        call((status,))
        buffer = Buffer(int(pointer), size, use)
        self._buffers[buffer.ptr] = buffer
        return buffer

    def fill(self, ptr: int, num_bytes: int, value: int = 0) -> None:
        """Queues setting every byte to `value`."""
        call(self._driver.cuMemsetD8Async(ptr, value, num_bytes, self.stream.handle))

    def free(self, buffer: Buffer) -> None:
        """Gives one buffer back, once everything queued on the GPU has run."""
        if self._buffers.pop(buffer.ptr, None) is not None:
            call(self._driver.cuMemFree(buffer.ptr))

    def free_use(self, use: MemoryUse) -> None:
        """Gives back every buffer of one use."""
        for buffer in [b for b in self._buffers.values() if b.use == use]:
            self.free(buffer)

    def memory_info(self) -> MemoryInfo:
        free, total = call(self._driver.cuMemGetInfo())
        return MemoryInfo(free, total)

    def memory_by_use(self) -> dict[str, int]:
        """Bytes taken so far, for each use that took any."""
        used: dict[str, int] = {}
        for buffer in self._buffers.values():
            used[buffer.use] = used.get(buffer.use, 0) + buffer.num_bytes
        return used

    def synchronize(self) -> None:
        """Waits for the stream; an error of an earlier kernel surfaces here as DeviceError."""
        wait_for_stream(self.stream)

    def close(self) -> None:
        """Gives everything back. Safe to call twice.

        Raises DeviceError, after trying all of it, where the GPU failed before.
        """
        if self._is_closed:
            return
        self._is_closed = True
        close_all(
            self.make_current,
            lambda: call(self._driver.cuCtxSynchronize()),
            *(partial(self.free, buffer) for buffer in self._buffers.values()),
            self.stream.close,
        )


def not_enough_memory(use: str, needed: int, memory: MemoryInfo) -> str:
    """The sentence for an allocation that does not fit, with what to lower."""
    remedy = {
        "weights": "use a GPU with more memory",
        "kv_cache": "lower engine.gpu_memory_utilization or engine.max_num_seqs",
        "work_space": "lower engine.max_num_batched_tokens or engine.max_num_seqs",
    }.get(use, "close other programs on this GPU")
    return (
        f"Not enough GPU memory for the {use.replace('_', ' ')}: {needed:,} bytes needed, "
        f"{memory.free:,} of {memory.total:,} available; {remedy}."
    )


def runs_sm90a(device: Device) -> bool:
    """Whether kernels compiled for sm_90a run: they do on compute capability 9.0 alone."""
    return device.compute_capability == (9, 0)


def device_unavailable_reason(index: int = 0) -> str | None:
    """Why no GPU can be used here, as one sentence, or None when one can."""
    try:
        Device(index).close()
    except DeviceError as error:
        return str(error)
    return None


def _import_cuda() -> tuple[Any, Any]:
    try:
        import cuda.core as core
        from cuda.bindings import driver

        call(driver.cuInit(0))
    except DeviceError as error:
        raise DeviceError(f"No usable NVIDIA GPU: {error} Use engine=numpy.") from error
    except ImportError as error:
        raise DeviceError(
            f"No usable NVIDIA GPU: cuda-python is not installed ({error}); use engine=numpy."
        ) from error
    except Exception as error:
        raise DeviceError(
            "No usable NVIDIA GPU: the NVIDIA driver (libcuda) is not installed or does not "
            "start; use engine=numpy."
        ) from error
    return core, driver


def _driver_version(driver: Any) -> int:
    return int(call(driver.cuDriverGetVersion()))


@cache
def _kernel_driver_version(core: Any) -> str | None:
    """Such as "580.159.4"; None where the management library (NVML) is missing."""
    try:
        return ".".join(str(part) for part in core.system.get_kernel_mode_driver_version())
    except Exception:
        return None


def _check_driver(version: int) -> None:
    from cuda.bindings import nvrtc

    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:
        raise DeviceError(
            "NVRTC, which compiles the kernels, was not found: install orcd-batch[cuda] "
            "or a CUDA toolkit, or use engine=numpy."
        ) from error
    call((status,))
    if version < major * 1000:
        raise DeviceError(
            f"The NVIDIA driver supports CUDA {version // 1000}.{version % 1000 // 10} and NVRTC "
            f"is {major}.{minor}, which needs {major}.0 or later: update the driver, or use "
            "engine=numpy."
        )
