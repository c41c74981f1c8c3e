"""Matrices in device memory as Hopper's copy engine wants them described, and launches with them.

cuda.core's launch takes no descriptors in every version that we support, so these launches pack
their own arguments.
"""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from orcd_batch.backend.cuda.array import DeviceArray
from orcd_batch.backend.cuda.driver import call
from orcd_batch.errors import DeviceError

_ROWS = 64
_PANEL = 64
_VECTOR = 8
# CUtensorMapDataType, CUtensorMapSwizzle by bytes of a row, CUtensorMapL2promotion.
_FLOAT16 = 6
_SWIZZLE = {32: 1, 64: 2, 128: 3}
_PROMOTE_256_BYTES = 3

_TYPES: dict[type[Any], Any] = {
    np.int32: ctypes.c_int32,
    np.uint32: ctypes.c_uint32,
    np.float32: ctypes.c_float,
    np.uint64: ctypes.c_uint64,
}


class TensorMap(ctypes.Structure):
    """A CUtensorMap: passed by value."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)


def panel_map(ptr: int, num_rows: int, num_columns: int) -> TensorMap:
    """A (num_rows, num_columns) fp16 matrix in boxes of 64 rows and one panel of columns.

    A panel is 64, 32 or 16 columns: the most that divide num_columns, as in kernels/hopper.cuh.
    Raises DeviceError when the driver refuses.
    """
    columns = next(n for n in (64, 32, 16) if num_columns % n == 0)
    return box_map(ptr, num_rows, num_columns, _ROWS, columns)


@lru_cache(maxsize=4096)
def box_map(ptr: int, num_rows: int, num_columns: int, rows: int, columns: int) -> TensorMap:
    """A (num_rows, num_columns) fp16 matrix in boxes of (rows, columns), 64, 32 or 16 columns; what
    a box has beyond the matrix is read as 0 and not written.

    Raises DeviceError when the driver refuses.
    """
    sizes, strides = (num_columns, num_rows), (num_columns * 2,)
    return _encode(ptr, sizes, strides, (columns, rows), _SWIZZLE[columns * 2])


@lru_cache(maxsize=4096)
def weight_map(ptr: int, num_rows: int, num_columns: int) -> TensorMap:
    """A (num_rows, num_columns) fp16 matrix in boxes of 8 rows of 4 panels of 64 columns.

    Raises DeviceError when the driver refuses.
    """
    sizes = (_PANEL, num_rows, num_columns // _PANEL)
    strides = (num_columns * 2, _PANEL * 2)
    return _encode(ptr, sizes, strides, (_PANEL, 8, 4), _SWIZZLE[_PANEL * 2])


def _encode(
    ptr: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle: int
) -> TensorMap:
    """sizes, box: elements, the innermost first. strides: bytes, of all but the innermost."""
    room = (ctypes.c_uint64 * 24)()
    start = -ctypes.addressof(room) % 64
    encoded = TensorMap.from_buffer(room, start)
    rank = len(sizes)
    status = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled(
        ctypes.byref(encoded),
        ctypes.c_int(_FLOAT16),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(ptr),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        ctypes.c_int(0),
        ctypes.c_int(swizzle),
        ctypes.c_int(_PROMOTE_256_BYTES),
        ctypes.c_int(0),
    )
    if status:
        raise DeviceError(
            f"The driver cannot describe {sizes[1]:,} rows of fp16 values at {ptr:#x} to the copy "
            f"engine, in boxes of {box}: error {status}."
        )
    return encoded


def tile_map(cache: DeviceArray) -> TensorMap:
    """A cache (num_blocks, Hkv, 64, D) fp16 as a matrix of D columns."""
    num_blocks, num_kv_heads, rows, head_dim = cache.shape
    return panel_map(cache.ptr, num_blocks * num_kv_heads * rows, head_dim)


def launch_with_maps(
    kernel: Any,
    args: Sequence[Any],
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    shared_mem: int,
    stream: Any,
    overlaps: bool,
) -> None:
    """As `Kernels.launch`, where some of the arguments are TensorMaps."""
    from cuda.bindings import driver

    values = [_packed(arg) for arg in args]
    pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = _three(grid)
    config.blockDimX, config.blockDimY, config.blockDimZ = _three(block)
    config.sharedMemBytes = shared_mem
    config.hStream = driver.CUstream(int(stream.handle))
    if overlaps:
        attribute = driver.CUlaunchAttribute()
        name = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.id = name
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
    function = driver.CUfunction(int(kernel.handle))
    call(driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0))


def _three(size: int | tuple[int, ...]) -> tuple[int, ...]:
    sizes = size if isinstance(size, tuple) else (size,)
    return (*sizes, 1, 1)[:3]


def _packed(arg: Any) -> Any:
    if isinstance(arg, TensorMap):
        return arg
    if isinstance(arg, DeviceArray):
        return ctypes.c_void_p(arg.ptr)
    return _TYPES[type(arg)](arg.item())
