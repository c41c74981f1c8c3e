"""A decode step of one or two sequences as one kernel: when and how kernels/few_rows_step.cu runs.

The ops of such a step are taken down as instructions instead of being launched; what runs is the
same arithmetic in the same order, so no bit depends on it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from orcd_batch.backend.cuda.array import FP16, FP32, DeviceArray
from orcd_batch.backend.cuda.attention import (
    MMA_ROWS,
    SPLIT_TILES,
    num_units,
    reach,
    score_scale,
)
from orcd_batch.backend.cuda.device import Device, runs_sm90a
from orcd_batch.backend.cuda.driver import call
from orcd_batch.backend.cuda.kernels import norm_threads
from orcd_batch.backend.cuda.plan import ModelShape
from orcd_batch.backend.cuda.program import Defines, Kernels, LoadedKernel, int32
from orcd_batch.backend.cuda.step_program import (
    INSTRUCTION,
    MAX_SPLITS,
    MAX_STEP_ROWS,
    PACKET,
    TILE_N,
    Recording,
    packet_places,
)
from orcd_batch.backend.cuda.step_slots import StepSlots
from orcd_batch.backend.cuda.tensor_map import weight_map
from orcd_batch.backend.cuda.workspace import Workspace
from orcd_batch.backend.ops import BLOCK_SIZE, Batch

# Whether steps may run so at all.
USE_FEW_ROWS_STEP = True

# As in kernels/few_rows_step.cu and what it includes.
_ARCH = "sm_90a"
_WARPS, _COPIERS = 8, 4
_STAGE_K, _GROUP_K = 256, 64
_SLOT_BYTES = TILE_N * _STAGE_K * 2
_BARRIER_BYTES = 16
# Items of attention for each block: with more of them, in turn, launches may well be faster.
_MAX_ITEMS = 2
# Teams of a block that attend, where one is too few.
_MAX_TEAMS = 2
_STATIC_SHARED_BYTES = 2048
# Slots of the ring besides those in flight, see kernels/weight_ring.cuh; and the fewest of all.
_SLOTS_BEYOND = 2 * _WARPS + _COPIERS
_MIN_SLOTS = _SLOTS_BEYOND + _WARPS
_MAP_BYTES = 128

# Slots whose weights are on their way at once: more only queue up.
IN_FLIGHT = 12
# A wait that looks more often than this traps: some seconds.
SPIN_LIMIT = 1 << 24

_RECORDED_OPS = (
    *("rms_norm", "linear", "linear_add", "rope_and_cache", "attention", "gated_linear", "logits"),
)


@dataclass(frozen=True, slots=True)
class StepLayout:
    """How the kernel runs for so many rows and splits."""

    x_bytes: int
    num_teams: int
    num_slots: int
    in_flight: int
    shared_bytes: int


def step_layout(
    device: Device, shape: ModelShape, num_rows: int, table_width: int
) -> StepLayout | None:
    """None where the kernel cannot run, or would be slow.

    table_width: cache blocks of the longest sequence.
    """
    inner = {shape.hidden_size, shape.num_heads * shape.head_dim, shape.intermediate_size}
    outer = {n for n, _ in shape.linear_shapes}
    splits = num_rows * -(-table_width // SPLIT_TILES)
    if not runs_sm90a(device) or num_rows > MAX_STEP_ROWS or splits > MAX_SPLITS:
        return None
    if any(k % _GROUP_K for k in inner) or any(n % TILE_N for n in outer):
        return None
    program_bytes = -(-_num_instructions(shape) // 2) * 2 * INSTRUCTION.itemsize
    items = splits * num_units(shape.num_heads, shape.num_kv_heads)
    if items > _MAX_ITEMS * device.sm_count:
        return None
    tiles_bytes = SPLIT_TILES * BLOCK_SIZE * shape.head_dim * FP16.itemsize
    for num_teams in range(min(-(-items // device.sm_count), _MAX_TEAMS), 0, -1):
        x_bytes = num_rows * (max(inner) * FP16.itemsize + 16)
        x_bytes = max(x_bytes, num_teams * _team_bytes(shape.head_dim))
        x_bytes = -(-x_bytes // 128) * 128
        before = program_bytes + x_bytes + num_teams * tiles_bytes
        room = device.max_shared_memory - _STATIC_SHARED_BYTES - before
        num_slots = room // (_SLOT_BYTES + _BARRIER_BYTES) // _COPIERS * _COPIERS
        if num_slots >= _MIN_SLOTS:
            shared_bytes = before + num_slots * (_SLOT_BYTES + _BARRIER_BYTES)
            in_flight = min(IN_FLIGHT, num_slots - _SLOTS_BEYOND)
            return StepLayout(x_bytes, num_teams, num_slots, in_flight, shared_bytes)
    return None


def _team_bytes(head_dim: int) -> int:
    """What a team shares besides its tiles: TeamMemory of kernels/attention_step.cuh."""
    weights = SPLIT_TILES * BLOCK_SIZE * MMA_ROWS * FP16.itemsize
    sums = SPLIT_TILES * (2 * 32 + MMA_ROWS) * FP32.itemsize
    return weights + sums + (MMA_ROWS + 2) * head_dim * FP16.itemsize


def _num_instructions(shape: ModelShape) -> int:
    """Five a layer, and the logits."""
    return 5 * shape.num_layers + 1


class FewRowsStep:
    """Runs decode steps through the one kernel, once their results have been proven equal."""

    def __init__(self, ops: Any) -> None:
        """ops: the `CudaOps` whose steps these are."""
        self._ops = ops
        self._device: Device = ops.device
        self._kernels: Kernels = ops.kernels
        self._workspace: Workspace = ops.workspace
        self._shape: ModelShape | None = None
        self._uploaded = b""
        self._verdicts: dict[tuple[int, int], bool] = {}
        self._layouts: dict[tuple[int, int], StepLayout | None] = {}

    def buffers(self, shape: ModelShape) -> dict[str, int]:
        """Work buffers and their bytes."""
        num_instructions = _num_instructions(shape)
        return {
            "step_program": num_instructions * (INSTRUCTION.itemsize + _MAP_BYTES),
            "step_counter": 8,
            "step_packets": packet_places(shape).total * PACKET.itemsize,
        }

    def prepare(self, shape: ModelShape) -> None:
        """From here on steps may be served; the kernel is loaded before the first of them."""
        sizes = self.buffers(shape)
        for name in ("step_counter", "step_packets"):
            buffer = self._workspace.take(name, (sizes[name],), np.dtype(np.uint8))
            self._device.fill(buffer.ptr, buffer.nbytes)
        self._shape = shape
        if self.serves(num_rows=1, table_width=1):
            self._kernel()

    def serves(self, num_rows: int, table_width: int) -> bool:
        """Whether a step of so many rows and cache blocks may run through the kernel."""
        if not USE_FEW_ROWS_STEP or self._shape is None:
            return False
        if not self._verdicts.get((num_rows, table_width), True):
            return False
        return self._layout(num_rows, table_width) is not None

    def is_proven(self, num_rows: int, table_width: int) -> bool:
        return (num_rows, table_width) in self._verdicts

    def prove(self, batch: Batch, work: Callable[[], Any], results: Callable[[Any], bytes]) -> None:
        """Runs a step's ops one by one and then through the kernel, and notes whether both left
        the same: results(what `work` returns), and keys and values in the cache, where the kernel
        finds NaN in the place of what it is to write."""
        expected = results(work())
        places = self._ops.staging.fetch(batch.slot_mapping)
        slots = StepSlots(self._device, self._ops.caches, places)
        written = slots.read()
        slots.poison()
        found = results(self.run(batch, work))
        num_rows, width = batch.block_tables.shape
        self._verdicts[num_rows, width] = found == expected and slots.read() == written

    def manifest(self) -> dict[str, bool]:
        """By rows and cache blocks, whether the results were equal."""
        return {f"M={m} blocks={width}": equal for (m, width), equal in self._verdicts.items()}

    def run(self, batch: Batch, work: Callable[[], Any]) -> Any:
        """`work`, a step over the placed batch, through the kernel: its ops are recorded, and run
        when it asks for logits."""
        assert self._shape is not None, "prepare() comes first"
        places = packet_places(self._shape)
        packets = self._workspace.take("step_packets", (places.total,), PACKET)
        recording = Recording(self._workspace, packets.ptr, places)

        def logits(x: Any, weight: DeviceArray) -> DeviceArray:
            y = recording.logits(x, weight)
            self._launch(recording, batch)
            return y

        with _replaced(self._ops, recording, logits):
            return work()

    def _layout(self, num_rows: int, table_width: int) -> StepLayout | None:
        """As `step_layout`, worked out once: every decode step asks."""
        assert self._shape is not None, "prepare() comes first"
        key = num_rows, table_width
        if key not in self._layouts:
            self._layouts[key] = step_layout(self._device, self._shape, *key)
        return self._layouts[key]

    def _launch(self, recording: Recording, batch: Any) -> None:
        shape, table = self._shape, recording.rope_table
        assert shape is not None, "prepare() comes first"
        assert table is not None, "a step has layers"
        num_rows, width = batch.block_tables.shape
        layout = self._layout(num_rows, width)
        assert layout is not None, "only steps that are served are recorded"
        program, maps = self._upload(recording)
        counter = self._workspace.take("step_counter", (1,), np.dtype(np.uint64))
        places = recording.places
        args = (
            *(program, maps, int32(len(recording.instructions)), counter, table),
            *(batch.positions, batch.slot_mapping, batch.context_lens, batch.block_tables),
            *(recording.packets + 8 * place for place in (places.attended, places.partials)),
            *(int32(num_rows), int32(width), reach(recording.sliding_window)),
            score_scale(shape.head_dim),
            np.float32(recording.eps),
            *map(int32, (layout.num_slots, layout.in_flight, layout.x_bytes, layout.num_teams)),
        )
        threads = 32 * (_WARPS + _COPIERS)
        grid = self._device.sm_count
        self._kernels.launch(self._kernel(), grid, threads, args, layout.shared_bytes)

    def _kernel(self) -> LoadedKernel:
        assert self._shape is not None, "prepare() comes first"
        return self._kernels.get("few_rows_step", _defines(self._shape), _ARCH)

    def _upload(self, recording: Recording) -> tuple[int, DeviceArray]:
        """The program and its maps on the GPU: the same for every step, so they travel once."""
        from cuda.bindings import driver

        maps = b"".join(bytes(weight_map(w.ptr, *w.shape)) for w in recording.weights)
        everything = maps + recording.program()
        target = self._workspace.take("step_program", (len(everything),), np.dtype(np.uint8))
        if everything != self._uploaded:
            assert not self._uploaded, "recorded steps run the program that was there first"
            stream = self._device.stream.handle
            call(driver.cuMemcpyHtoDAsync(target.ptr, everything, len(everything), stream))
            self._device.synchronize()
            self._uploaded = everything
        return target.ptr + len(maps), target


def _defines(shape: ModelShape) -> Defines:
    return {
        "NUM_HEADS": shape.num_heads,
        "NUM_KV_HEADS": shape.num_kv_heads,
        "HEAD_DIM": shape.head_dim,
        "HIDDEN": shape.hidden_size,
        "INTERMEDIATE": shape.intermediate_size,
        "WARPS": _WARPS,
        "COPIERS": _COPIERS,
        "STAGE_K": _STAGE_K,
        "NORM_THREADS": norm_threads(shape.hidden_size),
        "MIN_BLOCKS": 1,
        "SPIN_LIMIT": SPIN_LIMIT,
    }


@contextmanager
def _replaced(ops: Any, recording: Recording, logits: Callable[..., Any]) -> Iterator[None]:
    """The recorded ops in place of those of `ops`, for as long as the step is put together."""
    for name in _RECORDED_OPS:
        setattr(ops, name, logits if name == "logits" else getattr(recording, name))
    try:
        yield
    finally:
        for name in _RECORDED_OPS:
            delattr(ops, name)
