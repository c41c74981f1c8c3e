"""Our own matrix product: the reference for every other one, and the fallback for all of them."""

from dataclasses import dataclass

from orcd_batch.backend.cuda.array import DeviceArray
from orcd_batch.backend.cuda.product import Output
from orcd_batch.backend.cuda.program import Defines, Kernels, int32


@dataclass(frozen=True, slots=True)
class Tile:
    """One build of kernels/gemm_k16.cu; the fields are its macros."""

    m: int
    n: int
    k: int
    warps_m: int
    warps_n: int
    stages: int

    def defines(self, output: Output) -> Defines:
        return {
            "TILE_M": self.m,
            "TILE_N": self.n,
            "TILE_K": self.k,
            "WARPS_M": self.warps_m,
            "WARPS_N": self.warps_n,
            "STAGES": self.stages,
            "OUTPUT": int(output),
        }

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.m + self.n) * (self.k + 8) * 2


# For M up to 16, up to 64, and beyond; they differ in speed only.
TILES = (
    Tile(16, 32, 128, 1, 2, 6),
    Tile(64, 64, 64, 2, 2, 4),
    Tile(128, 128, 64, 2, 4, 3),
)


def tile_for(num_rows: int) -> Tile:
    if num_rows <= 16:
        return TILES[0]
    return TILES[1] if num_rows <= 64 else TILES[2]


def gemm_k16(
    kernels: Kernels,
    x: DeviceArray,
    weight: DeviceArray,
    y: DeviceArray,
    output: Output = Output.FP32,
    tile: Tile | None = None,
) -> None:
    """Queues y (M, N) = or += x (M, K) fp16 weight (N, K) fp16 ᵀ; K is a multiple of 8."""
    tile = tile or tile_for(x.shape[0])
    num_rows, (n, k) = x.shape[0], weight.shape
    kernels.launch(
        kernels.get("gemm_k16", tile.defines(output)),
        (-(-num_rows // tile.m), -(-n // tile.n)),
        32 * tile.warps_m * tile.warps_n,
        [x, weight, y, int32(num_rows), int32(n), int32(k)],
        shared_mem=tile.shared_bytes,
    )
