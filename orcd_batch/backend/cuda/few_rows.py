"""Our own matrix product for a few rows: how kernels/few_rows.cu is laid out on a card."""

from dataclasses import dataclass

from orcd_batch.backend.cuda.array import DeviceArray
from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.cuda.product import Output
from orcd_batch.backend.cuda.program import Defines, Kernels, int32

MAX_ROWS = 8

# As in kernels/few_rows.cu.
_TILE_N = 8
_GROUP_K = 64
# Columns of a stage: one copy of a warp. Chains of a block, and those that one producer serves.
_STAGE_K = 256
MAX_WARPS = 16
WARPS_PER_PRODUCER = 2
_MIN_STAGES = 2


@dataclass(frozen=True, slots=True)
class FewRows:
    """One build of the kernel for a weight (N, K) and up to so many rows."""

    k: int
    num_warps: int
    num_producers: int
    num_stages: int
    grid: int
    shared_bytes: int

    def defines(self, output: Output) -> Defines:
        return {
            "K_SIZE": self.k,
            "STAGE_K": _STAGE_K,
            "WARPS": self.num_warps,
            "PRODUCERS": self.num_producers,
            "OUTPUT": int(output),
        }

    @property
    def threads(self) -> int:
        return 32 * (self.num_warps + self.num_producers)


def few_rows_shape(device: Device, weight_shape: tuple[int, int], num_rows: int) -> FewRows | None:
    """The layout for up to num_rows rows, or None where the kernel cannot run."""
    n, k = weight_shape
    if n % _TILE_N or k % _GROUP_K or num_rows > MAX_ROWS or device.compute_capability < (9, 0):
        return None
    tiles = n // _TILE_N
    per_block = -(-tiles // device.sm_count)
    rounds = -(-per_block // MAX_WARPS)
    warps = -(-per_block // rounds)
    x_bytes = num_rows * (k * 2 + 16)
    stage_bytes = warps * (_TILE_N * (_STAGE_K * 2 + 16) + 16)
    room = device.max_shared_memory - x_bytes - 64
    stages = min(room // stage_bytes, rounds * -(-k // _STAGE_K))
    if stages < _MIN_STAGES and stages < -(-k // _STAGE_K):
        return None
    shared_bytes = x_bytes + stages * stage_bytes + 64
    producers = -(-warps // WARPS_PER_PRODUCER)
    grid = min(-(-tiles // warps), device.sm_count)
    return FewRows(k, warps, producers, stages, grid, shared_bytes)


def few_rows(
    kernels: Kernels,
    layout: FewRows,
    x: DeviceArray,
    weight: DeviceArray,
    y: DeviceArray,
    output: Output,
) -> None:
    """Queues y (M, N) = or += x (M, K) fp16 weight (N, K) fp16 ᵀ."""
    sizes = (x.shape[0], weight.shape[0], layout.num_stages)
    kernels.launch(
        kernels.get("few_rows", layout.defines(output)),
        layout.grid,
        layout.threads,
        [x, weight, y, *map(int32, sizes)],
        shared_mem=layout.shared_bytes,
    )
