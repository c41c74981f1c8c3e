"""Our .cu files at run time: found, compiled by NVRTC, cached as cubins, launched.

A kernel's source is common.cuh and its own file as one text, with the .cuh files it includes put in
place and `#line` keeping the real names; its
entry is `extern "C"` and named after the file. NVRTC works without a GPU, so `compile_kernel`
serves the tests as well.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orcd_batch.backend.cuda.array import DeviceArray
from orcd_batch.backend.cuda.cache import cache_dir
from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.cuda.driver import call, raise_gpu_failure
from orcd_batch.backend.cuda.tensor_map import TensorMap, launch_with_maps
from orcd_batch.errors import DeviceError

Defines = Mapping[str, int | float | str]
Dim = int | tuple[int, ...]

# Kernels that wait for the one before by themselves are launched beside its end (sm_90 and later).
OVERLAP = True

# A block may use this much shared memory without asking.
DEFAULT_SHARED_MEMORY = 48 * 1024


def kernel_dir() -> Path:
    """The .cu files: inside the installed package, or beside it in a checkout.

    Raises DeviceError when neither is there.
    """
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / "common.cuh").is_file():
            return folder
    raise DeviceError(f"The kernel sources are missing: no common.cuh in {package / 'kernels'}.")


def kernel_source(name: str) -> str:
    """common.cuh and `name`.cu as one text, its `#include`s of our own files in place.

    Raises DeviceError when there is no such kernel.
    """
    return "\n".join(_expanded(file) for file in ("common.cuh", f"{name}.cu"))


def _expanded(file: str) -> str:
    try:
        lines = (kernel_dir() / file).read_text().split("\n")
    except OSError as error:
        raise DeviceError(f"The kernel source {file} cannot be read: {error}.") from error
    text = [f'#line 1 "{file}"']
    for number, line in enumerate(lines, 1):
        included = re.fullmatch(r'#include "(\w+\.cuh)"', line)
        text += [_expanded(included[1]), f'#line {number + 1} "{file}"'] if included else [line]
    return "\n".join(text)


def waits_by_itself(name: str) -> bool:
    """Whether the kernel calls wait_for_previous (see common.cuh)."""
    return " wait_for_previous();" in (kernel_dir() / f"{name}.cu").read_text()


def compile_options() -> dict[str, Any]:
    """The NVRTC options every kernel shares, for the compiler and for the manifest."""
    return {"std": "c++17", "lineinfo": True}


def compile_kernel(
    name: str,
    arch: str,
    defines: Defines | None = None,
    *,
    cache: Any = None,
    log: Any = None,
    verbose: bool = False,
) -> Any:
    """Compiles `name`.cu to a cubin (a cuda.core ObjectCode).

    arch: such as "sm_90". verbose: ptxas writes registers and spills of each entry into `log`
    (any object with `write`). Raises DeviceError with the compiler's file, line and message.
    """
    from cuda.core import Program, ProgramOptions

    macros = [(key, str(value)) for key, value in sorted((defines or {}).items())]
    options = ProgramOptions(
        name=f"{name}.cu",
        arch=arch,
        define_macro=macros or None,
        ptxas_options=["-v"] if verbose else None,
        **compile_options(),
    )
    try:
        program = Program(kernel_source(name), "c++", options)
        return program.compile("cubin", cache=cache, logs=log)
    except DeviceError:
        raise
    except Exception as error:
        label = kernel_label(name, arch, defines)
        raise DeviceError(f"The kernel {label} does not compile: {error}") from error


def kernel_label(name: str, arch: str, defines: Defines | None) -> str:
    """Such as `attention[sm_90 HEAD_DIM=96]`."""
    parts = [arch, *(f"{key}={value}" for key, value in sorted((defines or {}).items()))]
    return f"{name}[{' '.join(parts)}]"


@dataclass(slots=True)
class LoadedKernel:
    """A kernel on the device. overlaps: it waits for the kernel before by itself.

    shared_memory: the dynamic bytes per block that it may use so far.
    """

    kernel: Any
    overlaps: bool
    shared_memory: int = DEFAULT_SHARED_MEMORY


class Kernels:
    """The compiled kernels of one device, and how they are launched (always on its stream)."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._kernels: dict[tuple[Any, ...], LoadedKernel] = {}
        self._hashes: dict[str, str] = {}
        self._configs: dict[tuple[Dim, Dim, int, bool], Any] = {}
        self._cache = _program_cache()

    def get(
        self, name: str, defines: Defines | None = None, arch: str | None = None
    ) -> LoadedKernel:
        """The kernel `name` of `name`.cu, compiled on first use.

        defines: macros of this variant. arch: where the generic one of the card will not do,
        such as "sm_90a". Raises DeviceError when it does not compile or load.
        """
        key = (name, arch, *(defines or {}).items())
        found = self._kernels.get(key)
        if found is None:
            found = self._kernels[key] = self._load(name, arch or self.device.arch, defines)
        return found

    def launch(
        self,
        kernel: LoadedKernel,
        grid: Dim,
        block: Dim,
        args: Sequence[Any],
        shared_mem: int = 0,
        stream: Any = None,
    ) -> None:
        """Queues one launch on the device's stream (or another).

        args: DeviceArrays (passed as pointers), ints (as 64-bit pointers), or numpy scalars of
        the exact parameter type (np.int32, np.float32, np.uint64, …); TensorMaps first, where the
        grid has one dimension. shared_mem: dynamic bytes.
        """
        from cuda.core import launch

        if shared_mem > kernel.shared_memory:
            self._allow_shared_memory(kernel, shared_mem)
        if args and isinstance(args[0], TensorMap):
            config = (grid, block, shared_mem, stream or self.device.stream, kernel.overlaps)
            launch_with_maps(kernel.kernel, args, *config)
            return
        values = [arg.ptr if isinstance(arg, DeviceArray) else arg for arg in args]
        config = self._config(grid, block, shared_mem, kernel.overlaps)
        try:
            launch(stream or self.device.stream, config, kernel.kernel, *values)
        except Exception as error:
            raise_gpu_failure(error)
            raise

    def manifest(self) -> dict[str, Any]:
        """Compile options, compiler version, and SHA-256 of every cubin that was loaded."""
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
        return {
            "nvrtc": f"{major}.{minor}",
            "compile_options": compile_options(),
            "cubins": dict(sorted(self._hashes.items())),
        }

    def _load(self, name: str, arch: str, defines: Defines | None) -> LoadedKernel:
        label = kernel_label(name, arch, defines)
        code = compile_kernel(name, arch, defines, cache=self._cache)
        self._hashes[label] = hashlib.sha256(bytes(code.code)).hexdigest()
        try:
            kernel = code.get_kernel(name)
        except Exception as error:
            raise DeviceError(f"The kernel {label} does not load: {error}") from error
        can_overlap = OVERLAP and self.device.compute_capability >= (9, 0)
        return LoadedKernel(kernel, can_overlap and waits_by_itself(name))

    def _config(self, grid: Dim, block: Dim, shared_mem: int, overlaps: bool) -> Any:
        from cuda.core import LaunchConfig

        key = (grid, block, shared_mem, overlaps)
        if key not in self._configs:
            self._configs[key] = LaunchConfig(
                grid=grid,
                block=block,
                shmem_size=shared_mem,
                programmatic_stream_serialization=overlaps,
            )
        return self._configs[key]

    def _allow_shared_memory(self, kernel: LoadedKernel, num_bytes: int) -> None:
        if num_bytes > self.device.max_shared_memory:
            raise DeviceError(
                f"A kernel asks for {num_bytes:,} bytes of shared memory and {self.device.name} "
                f"has {self.device.max_shared_memory:,} per block."
            )
        from cuda.bindings import driver

        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        handle = kernel.kernel.handle
        call(driver.cuKernelSetAttribute(attribute, num_bytes, handle, self.device.index))
        kernel.shared_memory = num_bytes


def int32(value: int) -> np.int32:
    """A kernel argument of type int. Raises OverflowError when it does not fit."""
    if not -(2**31) <= value < 2**31:
        raise OverflowError(f"{value} does not fit the kernel's 32-bit argument")
    return np.int32(value)


def _program_cache() -> Any:
    from cuda.core.utils import FileStreamProgramCache

    with suppress(OSError, RuntimeError):
        folder = cache_dir("kernels")
        folder.mkdir(parents=True, exist_ok=True)
        return FileStreamProgramCache(folder)
    return None
