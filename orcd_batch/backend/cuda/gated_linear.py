"""gate and up and their activation: as one kernel on Hopper, or the activation after a product."""

from dataclasses import dataclass

from orcd_batch.backend.cuda.array import DeviceArray
from orcd_batch.backend.cuda.device import Device, runs_sm90a
from orcd_batch.backend.cuda.program import Defines, Kernels, int32
from orcd_batch.backend.cuda.tensor_map import box_map
from orcd_batch.errors import DeviceError

# As in kernels/gated_linear_sm90a.cu.
_GROUP_ROWS = 64
_TILE_K = 64
_STORED_ROWS = 16
_LOADER_WARPS = 4
_BARRIER_BYTES = 16

_VECTOR = 8
_SWIGLU_THREADS = 256


@dataclass(frozen=True, slots=True)
class GatedTile:
    """One build of the kernel; the fields are its macros. columns: of y."""

    columns: int
    row_groups: int
    cluster: int
    stages: int
    group: int

    @property
    def code(self) -> str:
        """What a stored choice and the manifest call it."""
        sizes = f"{self.rows}x2x{self.columns} cluster {self.cluster} stages {self.stages}"
        return f"gated_linear_sm90a {sizes} group {self.group}"

    @property
    def rows(self) -> int:
        return self.row_groups * _GROUP_ROWS

    @property
    def threads(self) -> int:
        return 32 * (4 * self.row_groups + _LOADER_WARPS)

    @property
    def shared_bytes(self) -> int:
        stage = (self.rows + 2 * self.columns) * _TILE_K * 2
        return self.stages * (stage + _BARRIER_BYTES) + self.rows * self.columns * 2

    def defines(self, n: int, k: int) -> Defines:
        return {
            "K_SIZE": k,
            "INTERMEDIATE": n // 2,
            "TILE_F": self.columns,
            "ROW_GROUPS": self.row_groups,
            "CLUSTER": self.cluster,
            "STAGES": self.stages,
            "GROUP": self.group,
        }


# They differ in speed only; each is the fastest for some number of rows (H200).
TILES = (
    GatedTile(columns=128, row_groups=2, cluster=2, stages=4, group=8),
    GatedTile(columns=64, row_groups=2, cluster=1, stages=6, group=16),
    GatedTile(columns=64, row_groups=1, cluster=1, stages=8, group=8),
)


def gated_tiles(
    device: Device, weight_shape: tuple[int, int], num_rows: int
) -> tuple[GatedTile, ...]:
    """The builds for up to num_rows rows: none of twice the rows that a smaller one has for them.

    Empty where the kernel cannot run.
    """
    n, k = weight_shape
    size = n // 2
    is_narrow = min(size, k) < _TILE_K or size % _VECTOR or k % _VECTOR
    if not runs_sm90a(device) or is_narrow:
        return ()
    return tuple(t for t in TILES if t.rows * t.cluster < 2 * max(num_rows, _GROUP_ROWS))


def gated_linear(
    kernels: Kernels, tile: GatedTile, x: DeviceArray, weight: DeviceArray, y: DeviceArray
) -> None:
    """Queues y (M, F) from x (M, K) fp16 and weight (2F, K) fp16, gate rows first, M > 0."""
    (num_rows, size), (n, k) = y.shape, weight.shape
    tiles = -(-num_rows // (tile.rows * tile.cluster)) * -(-size // tile.columns)
    grid = tile.cluster * min(tiles, kernels.device.sm_count // tile.cluster)
    maps = (
        box_map(x.ptr, num_rows, k, tile.rows, _TILE_K),
        box_map(weight.ptr, n, k, tile.columns, _TILE_K),
        box_map(y.ptr, num_rows, size, _STORED_ROWS, _TILE_K),
    )
    kernel = kernels.get("gated_linear_sm90a", tile.defines(n, k), "sm_90a")
    kernels.launch(kernel, grid, tile.threads, [*maps, int32(num_rows)], tile.shared_bytes)


def swiglu(kernels: Kernels, gate_up: DeviceArray, y: DeviceArray) -> None:
    """Queues y (M, F) from gate_up (M, 2F), fp16, gate first.

    Raises DeviceError where F is no multiple of 8.
    """
    num_rows, size = y.shape
    if size % _VECTOR:
        raise DeviceError(
            f"This model's FFN size is {size} and the GPU kernels need a multiple of {_VECTOR}; "
            "use engine=numpy."
        )
    grid = -(-num_rows * (size // _VECTOR) // _SWIGLU_THREADS)
    if grid == 0:
        return
    kernel = kernels.get("swiglu", {"INTERMEDIATE": size, "THREADS": _SWIGLU_THREADS})
    kernels.launch(kernel, grid, _SWIGLU_THREADS, (gate_up, y, int32(num_rows)))
