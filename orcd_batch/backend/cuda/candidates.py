"""The ways to get a matrix product on a card: what the self-test chooses among."""

from functools import partial
from typing import Any

from orcd_batch.backend.cuda.array import FP16, DeviceArray
from orcd_batch.backend.cuda.cublas import Algorithm, CublasLt
from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.cuda.few_rows import few_rows, few_rows_shape
from orcd_batch.backend.cuda.gated_linear import (
    GatedTile,
    gated_linear,
    gated_tiles,
    swiglu,
)
from orcd_batch.backend.cuda.gemm_k16 import gemm_k16
from orcd_batch.backend.cuda.product import Key, Output, buffer_name
from orcd_batch.backend.cuda.program import Kernels
from orcd_batch.backend.cuda.self_test import Candidate, Product
from orcd_batch.backend.cuda.workspace import Workspace
from orcd_batch.errors import DeviceError

# The code of kernels/few_rows.cu among those of cuBLASLt's algorithms.
_FEW_ROWS = "few_rows"


class Candidates:
    """Our own products and cuBLASLt's, all of which may have the bits of `reference`.

    missing: why cuBLASLt is not among them, or None.
    """

    def __init__(self, device: Device, kernels: Kernels, workspace: Workspace) -> None:
        self._device = device
        self._kernels = kernels
        self._workspace = workspace
        self._library: CublasLt | None = None
        self.missing: str | None = None
        try:
            self._library = CublasLt(device)
        except DeviceError as error:
            self.missing = str(error)

    @property
    def library_version(self) -> int:
        """cuBLASLt's; 0 without it."""
        return self._library.version if self._library else 0

    def offered(self, key: Key, num_rows: int) -> list[Candidate]:
        """What may be run for up to num_rows rows; nothing here splits K."""
        n, k, output = key
        if output is Output.GATED:
            fused = gated_tiles(self._device, (n, k), num_rows)
            unfused = self.offered((n, k, Output.FP16), num_rows)
            return [*map(self._fused, fused), *map(self.gated, unfused)]
        found = []
        if few_rows_shape(self._device, (n, k), num_rows):
            found.append(self.restored(key, num_rows, _FEW_ROWS, _FEW_ROWS))
        if self._library is not None:
            found += [
                self.restored(key, num_rows, algorithm.code, algorithm.config)
                for algorithm in self._library.candidates(num_rows, (n, k), output)
            ]
        return found

    def restored(self, key: Key, num_rows: int, code: str, config: Any) -> Candidate:
        """The candidate for up to num_rows rows that a code stands for."""
        n, k, output = key
        if output is Output.GATED:
            for tile in gated_tiles(self._device, (n, k), num_rows):
                if tile.code == code:
                    return self._fused(tile)
            return self.gated(self.restored((n, k, Output.FP16), num_rows, code, config))
        if code == _FEW_ROWS:
            layout = few_rows_shape(self._device, (n, k), num_rows)
            assert layout is not None, "few_rows was chosen where it cannot run"
            run: Product = partial(few_rows, self._kernels, layout, output=output)
            return Candidate(code, config, run)
        assert self._library is not None, "an algorithm of a library that is missing was chosen"
        run = partial(self._library.run, Algorithm(code, config), output=output)
        return Candidate(code, config, run)

    def reference(self, output: Output) -> Product:
        """gemm_k16: what every candidate must equal, and what is left without one."""
        if output is Output.GATED:
            return self._then_swiglu(self.reference(Output.FP16))
        return partial(gemm_k16, self._kernels, output=output)

    def between(self, num_rows: int, n: int, output: Output) -> DeviceArray | None:
        """Where a product leaves what its activation reads, if they may be two kernels."""
        return self._gate_up(num_rows, n) if output is Output.GATED else None

    def close(self) -> None:
        """Destroys the library handle. Safe to call twice."""
        if self._library is not None:
            self._library.close()

    def gated(self, product: Candidate) -> Candidate:
        """The same with the activation behind it; product: one that leaves fp16."""
        return Candidate(product.code, product.config, self._then_swiglu(product.run))

    def _fused(self, tile: GatedTile) -> Candidate:
        return Candidate(tile.code, tile.code, partial(gated_linear, self._kernels, tile))

    def _then_swiglu(self, product: Product) -> Product:
        def run(x: DeviceArray, weight: DeviceArray, y: DeviceArray) -> None:
            gate_up = self._gate_up(x.shape[0], weight.shape[0])
            product(x, weight, gate_up)
            swiglu(self._kernels, gate_up, y)

        return run

    def _gate_up(self, num_rows: int, n: int) -> DeviceArray:
        return self._workspace.take(buffer_name(n, Output.FP16), (num_rows, n), FP16)
