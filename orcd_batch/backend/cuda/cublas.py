"""cuBLASLt for y = or += x wᵀ (fp16 in, fp32 accumulate): its candidates, and running one.

Split-K is excluded: it is the one thing that makes a row's bits depend on M. So is algorithm 16,
which reorders the products of long K even without it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from orcd_batch.backend.cuda.array import FP16, DeviceArray
from orcd_batch.backend.cuda.cublaslt_binding import cublaslt
from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.cuda.product import Output
from orcd_batch.errors import DeviceError

WORKSPACE_BYTES = 32 << 20
EXCLUDED_IDS = frozenset({16})
ANY_REDUCTION = 0x7

_MAX_CANDIDATES = 16
_POOL_ROWS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096)
_MAX_LAYOUTS = 4096
_FP32, _FP16 = 0, 2  # cudaDataType_t CUDA_R_32F, CUDA_R_16F
_COMPUTE_32F = 68  # cublasComputeType_t CUBLAS_COMPUTE_32F
_TRANSPOSED = np.array([1], np.int32)  # cublasOperation_t CUBLAS_OP_T
_ONE = np.array([1.0], np.float32)
_ZERO = np.array([0.0], np.float32)


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One way to run a product. code: cuBLASLt's opaque 64 bytes as hex; config: what they say."""

    code: str
    config: dict[str, int]


class CublasLt:
    """A cuBLASLt handle of one device. Raises DeviceError when the library is not installed."""

    def __init__(self, device: Device) -> None:
        try:
            cublasLt = cublaslt()
            self.version = int(cublasLt.get_version())
        except Exception as error:
            raise DeviceError(
                f"cuBLASLt was not found ({error}): install orcd-batch[cuda] or a CUDA toolkit."
            ) from error
        self._lt: Any = cublasLt
        self._device = device
        self._handle = cublasLt.create()
        self._workspace = device.allocate(WORKSPACE_BYTES, "work_space")
        self._codes: dict[str, Any] = {}
        self._layouts: dict[tuple[int, int, int], int] = {}
        self._product = cublasLt.matmul_desc_create(_COMPUTE_32F, _FP32)
        transpose = cublasLt.MatmulDescAttribute.TRANSA
        cublasLt.matmul_desc_set_attribute(
            self._product, transpose, _TRANSPOSED.ctypes.data, _TRANSPOSED.nbytes
        )

    def candidates(
        self, num_rows: int, weight_shape: tuple[int, int], output: Output
    ) -> list[Algorithm]:
        """What may be run for x (num_rows, K), w (N, K): no split-K, no excluded algorithm."""
        return [
            algorithm
            for algorithm in self.offers(num_rows, weight_shape, output, reductions=0)
            if algorithm.config["SPLITK_NUM"] <= 1
            and algorithm.config["REDUCTION_SCHEME"] == 0
            and algorithm.config["ID"] not in EXCLUDED_IDS
        ]

    def offers(
        self, num_rows: int, weight_shape: tuple[int, int], output: Output, reductions: int
    ) -> list[Algorithm]:
        """What the heuristic offers; `reductions` is the mask of split-K schemes it may use.

        It knows the shapes it was tuned on better than others, so what it offers for nearby row
        counts is added: any algorithm can run any number of rows.
        """
        near = [rows for rows in _POOL_ROWS if _is_near(rows, num_rows)]
        pool: dict[str, Algorithm] = {}
        for rows in (num_rows, *near):
            for code in self._heuristic(rows, weight_shape, output, reductions):
                if code.hex() not in pool:
                    pool[code.hex()] = self._describe(code)
        return list(pool.values())

    def run(
        self,
        algorithm: Algorithm,
        x: DeviceArray,
        weight: DeviceArray,
        y: DeviceArray,
        output: Output = Output.FP32,
    ) -> None:
        """Queues y = or += x weightᵀ (M, N). Raises DeviceError when the algorithm cannot."""
        n, k = weight.shape
        w_layout, x_layout, y_layout = self._operands(x.shape[0], (n, k), output)
        code = self._codes.get(algorithm.code)
        if code is None:
            code = np.frombuffer(bytes.fromhex(algorithm.code), np.uint64).copy()
            self._codes[algorithm.code] = code
        try:
            self._lt.matmul(
                self._handle,
                self._product,
                _ONE.ctypes.data,
                weight.ptr,
                w_layout,
                x.ptr,
                x_layout,
                (_ONE if output is Output.ADD else _ZERO).ctypes.data,
                y.ptr,
                y_layout,
                y.ptr,
                y_layout,
                code.ctypes.data,
                self._workspace.ptr,
                WORKSPACE_BYTES,
                int(self._device.stream.handle),
            )
        except self._lt.cuBLASLtError as error:
            self._device.memory_info()  # raises what an earlier kernel failed with, if one did
            raise DeviceError(
                f"cuBLASLt cannot run algorithm {algorithm.config} for M={x.shape[0]}, N={n}, "
                f"K={k}: {error}."
            ) from error

    def close(self) -> None:
        """Destroys the handle. Safe to call twice.

        Raises DeviceError where the GPU failed before.
        """
        handle, self._handle = self._handle, 0
        if not handle:
            return
        try:
            self._forget_layouts()
            self._lt.matmul_desc_destroy(self._product)
            self._lt.destroy(handle)
        except self._lt.cuBLASLtError as error:
            raise DeviceError(f"cuBLASLt cannot be closed: {error}.") from error

    def _heuristic(
        self, num_rows: int, weight_shape: tuple[int, int], output: Output, reductions: int
    ) -> list[bytes]:
        lt = self._lt
        preference = lt.matmul_preference_create()
        for name, value in (
            ("MAX_WORKSPACE_BYTES", np.array([WORKSPACE_BYTES], np.uint64)),
            ("REDUCTION_SCHEME_MASK", np.array([reductions], np.uint32)),
        ):
            attribute = lt.MatmulPreferenceAttribute[name]
            lt.matmul_preference_set_attribute(
                preference, attribute, value.ctypes.data, value.nbytes
            )
        results = np.zeros(_MAX_CANDIDATES, lt.matmul_heuristic_result_dtype)
        found = np.zeros(1, np.int32)
        w, x, y = self._operands(num_rows, weight_shape, output)
        descriptions = (self._handle, self._product, w, x, y, y, preference)
        try:
            lt.matmul_algo_get_heuristic(
                *descriptions, _MAX_CANDIDATES, results.ctypes.data, found.ctypes.data
            )
        except lt.cuBLASLtError:
            return []  # "not supported": nothing fits this shape
        finally:
            lt.matmul_preference_destroy(preference)
        usable = [result for result in results[: found[0]] if result["state"] == 0]
        return [np.ascontiguousarray(result["algo"]).tobytes() for result in usable]

    def _operands(
        self, num_rows: int, weight_shape: tuple[int, int], output: Output
    ) -> tuple[int, int, int]:
        """Column-major as cuBLAS sees them: wᵀ (K, N), xᵀ (K, M), yᵀ (N, M)."""
        n, k = weight_shape
        if len(self._layouts) > _MAX_LAYOUTS:
            self._forget_layouts()
        return (
            self._layout(_FP16, k, n),
            self._layout(_FP16, k, num_rows),
            self._layout(_FP16 if output.dtype == FP16 else _FP32, n, num_rows),
        )

    def _layout(self, dtype: int, rows: int, columns: int) -> int:
        key = (dtype, rows, columns)
        if key not in self._layouts:
            self._layouts[key] = self._lt.matrix_layout_create(dtype, rows, columns, rows)
        return self._layouts[key]

    def _forget_layouts(self) -> None:
        for layout in self._layouts.values():
            self._lt.matrix_layout_destroy(layout)
        self._layouts.clear()

    def _describe(self, code: bytes) -> Algorithm:
        lt = self._lt
        raw = np.frombuffer(code, np.uint8).copy()
        config: dict[str, int] = {}
        for attribute in lt.MatmulAlgoConfigAttribute:
            value = np.zeros(1, lt.get_matmul_algo_config_attribute_dtype(attribute))
            written = np.zeros(1, np.uint64)
            lt.matmul_algo_config_get_attribute(
                raw.ctypes.data, attribute, value.ctypes.data, value.nbytes, written.ctypes.data
            )
            config[attribute.name] = int(value[0])
        return Algorithm(code.hex(), config)


def _is_near(rows: int, num_rows: int) -> bool:
    if num_rows <= 128:
        return rows <= 256
    return num_rows // 4 <= rows <= num_rows * 4
