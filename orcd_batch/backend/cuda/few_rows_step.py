"""A decode step of few sequences as one kernel: kernels/few_rows_step.cu, and its program.

The ops of such a step are taken down as instructions instead of being launched; what runs is the
same arithmetic in the same order, so no bit depends on it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from orcd_batch.backend.cuda.array import FP16, FP32, DeviceArray
from orcd_batch.backend.cuda.attention import MAX_HEAD_DIM, MMA_ROWS, SPLIT_TILES
from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.cuda.driver import call
from orcd_batch.backend.cuda.few_rows import MAX_ROWS
from orcd_batch.backend.cuda.kernels import norm_threads
from orcd_batch.backend.cuda.plan import ModelShape
from orcd_batch.backend.cuda.product import Output
from orcd_batch.backend.cuda.program import Defines, Kernels, int32
from orcd_batch.backend.cuda.workspace import Workspace
from orcd_batch.backend.ops import BLOCK_SIZE, Batch, KVCache

# Off until its bits and its speed are proven on the card.
USE_FEW_ROWS_STEP = False

# As in kernels/few_rows_step.cu and what it includes.
_ARCH, _CAPABILITY = "sm_90a", (9, 0)
_WARPS, _PRODUCERS = 8, 4
_STAGE_K, _TILE_N, _GROUP_K = 256, 8, 64
_SLOT_BYTES = _TILE_N * _STAGE_K * 2
_BARRIER_BYTES = 16
_SCRATCH_ROWS, _ATTENTION_STAGES = 18, 4
_STATIC_SHARED_BYTES = 256 + MAX_ROWS * 4 * (2 + MAX_HEAD_DIM)
_GATED = 3
_MIN_SLOTS = 3 * _WARPS

# Splits of all sequences together: every block reads all of them.
MAX_SPLITS = 16
# Warps of a block that attend, where one each is too few.
MAX_ATTENTION_WARPS = 2
# Slots whose weights are on their way at once, at least _WARPS: more would only queue up, and what
# the step waits for behind them.
IN_FLIGHT = 16
# Traps instead of waiting for more cycles: some 3 s.
SPIN_LIMIT = 5_000_000_000

INSTRUCTION = np.dtype(
    [
        *((name, np.int32) for name in ("op", "output", "num_units", "width")),
        *((name, np.uint64) for name in ("w", "x", "vector", "y", "keys", "values")),
    ]
)
_RECORDED_OPS = (
    *("rms_norm", "linear", "linear_add", "rope_and_cache", "attention", "swiglu"),
    *("take_rows", "logits"),
)
_UNLIMITED = 2**31 - 1


class Op(IntEnum):
    """Where a product's input comes from, or attention."""

    NORM = 0
    MERGE = 1
    COPY = 2
    ATTEND = 3


@dataclass(frozen=True, slots=True)
class StepLayout:
    """How the kernel runs for so many rows and splits."""

    x_bytes: int
    attention_warps: int
    num_slots: int
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
    if device.compute_capability != _CAPABILITY or num_rows > MAX_ROWS or splits > MAX_SPLITS:
        return None
    if any(k % _GROUP_K for k in inner) or any(n % _TILE_N for n in outer):
        return None
    program_bytes = -(-_num_instructions(shape) // 2) * 2 * INSTRUCTION.itemsize
    x_bytes = -(-num_rows * (max(inner) * FP16.itemsize + 16) // 128) * 128
    row_tiles = -(-(shape.num_heads // shape.num_kv_heads) // MMA_ROWS)
    items = splits * shape.num_kv_heads * row_tiles
    rows = _SCRATCH_ROWS + 2 * _ATTENTION_STAGES * BLOCK_SIZE
    for attention_warps in range(min(-(-items // device.sm_count), MAX_ATTENTION_WARPS), 0, -1):
        before = program_bytes + x_bytes + attention_warps * rows * shape.head_dim * FP16.itemsize
        room = device.max_shared_memory - _STATIC_SHARED_BYTES - before
        num_slots = room // (_SLOT_BYTES + _BARRIER_BYTES)
        if num_slots >= _MIN_SLOTS:
            shared_bytes = before + num_slots * (_SLOT_BYTES + _BARRIER_BYTES)
            return StepLayout(x_bytes, attention_warps, num_slots, shared_bytes)
    return None


# What the recorded ops return: what is to be computed, by whom it is read.
@dataclass(frozen=True, slots=True)
class _Norm:
    x: DeviceArray
    weight: DeviceArray
    eps: float


@dataclass(frozen=True, slots=True)
class _Product:
    x: _Norm
    weight: DeviceArray


@dataclass(frozen=True, slots=True)
class _Result:
    """Of attention or swiglu; y is where it is left."""

    op: Op
    y: DeviceArray


@dataclass(slots=True)
class Recording:
    """The ops of one step as instructions; each method stands in for the op of its name."""

    workspace: Workspace
    instructions: list[tuple[int, ...]] = field(default_factory=list)
    eps: float = 0.0
    sliding_window: int = 0
    rope_table: DeviceArray | None = None

    def rms_norm(self, x: DeviceArray, weight: DeviceArray, eps: float) -> _Norm:
        self.eps = eps
        return _Norm(x, weight, eps)

    def linear(self, x: _Norm, weight: DeviceArray) -> _Product:
        return _Product(x, weight)

    def rope_and_cache(
        self,
        qkv: _Product,
        bias: DeviceArray,
        rope_table: DeviceArray,
        cache: KVCache,
        batch: Batch,
    ) -> DeviceArray:
        width = qkv.weight.shape[0]
        y = self._take(f"linear_{width}_fp16", qkv.x.x.shape[0], width, FP16)
        self._multiply(Op.NORM, qkv.weight, qkv.x.x, y, Output.FP16, qkv.x.weight)
        attended = self._take("attention", y.shape[0], _attended_size(width, cache), FP16)
        pointers = (0, y.ptr, bias.ptr, attended.ptr, cache.keys.ptr, cache.values.ptr)
        self.instructions.append((Op.ATTEND, 0, 0, 0, *pointers))
        self.rope_table = rope_table
        return attended

    def attention(
        self, q: DeviceArray, cache: KVCache, batch: Batch, sliding_window: int
    ) -> _Result:
        self.sliding_window = sliding_window
        return _Result(Op.MERGE, q)

    def swiglu(self, gate_up: _Product) -> _Result:
        width = gate_up.weight.shape[0] // 2
        y = self._take("swiglu", gate_up.x.x.shape[0], width, FP16)
        self._multiply(Op.NORM, gate_up.weight, gate_up.x.x, y, _GATED, gate_up.x.weight)
        return _Result(Op.COPY, y)

    def linear_add(self, x: _Result, weight: DeviceArray, residual: DeviceArray) -> None:
        self._multiply(x.op, weight, x.y, residual, Output.ADD)

    def take_rows(self, x: _Norm, rows: DeviceArray) -> _Norm:
        assert rows.shape[0] == x.x.shape[0], "a decode step needs the logits of every row"
        return x

    def logits(self, x: _Norm, weight: DeviceArray) -> DeviceArray:
        y = self._take(f"linear_{weight.shape[0]}_fp32", x.x.shape[0], weight.shape[0], FP32)
        self._multiply(Op.NORM, weight, x.x, y, Output.FP32, x.weight)
        return y

    def program(self) -> bytes:
        return np.array(self.instructions, INSTRUCTION).tobytes()

    def _take(self, name: str, rows: int, width: int, dtype: np.dtype[Any]) -> DeviceArray:
        return self.workspace.take(name, (rows, width), dtype)

    def _multiply(
        self,
        op: Op,
        weight: DeviceArray,
        x: DeviceArray,
        y: DeviceArray,
        output: int,
        vector: DeviceArray | None = None,
    ) -> None:
        units = y.shape[1] // _TILE_N
        pointers = (weight.ptr, x.ptr, vector.ptr if vector else 0, y.ptr, 0, 0)
        self.instructions.append((op, output, units, y.shape[1], *pointers))


def _num_instructions(shape: ModelShape) -> int:
    """Five a layer, and the logits."""
    return 5 * shape.num_layers + 1


def _attended_size(width: int, cache: KVCache) -> int:
    """Columns of the queries in rows of qkv."""
    _, num_kv_heads, _, head_dim = cache.keys.shape
    return int(width - 2 * num_kv_heads * head_dim)


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

    def buffers(self, shape: ModelShape) -> dict[str, int]:
        """Work buffers and their bytes."""
        num_bytes = _num_instructions(shape) * INSTRUCTION.itemsize
        return {"step_program": num_bytes, "step_counter": 8}

    def prepare(self, shape: ModelShape) -> None:
        """From here on steps may be served."""
        counter = self._workspace.take("step_counter", (1,), np.dtype(np.uint64))
        self._device.fill(counter.ptr, counter.nbytes)
        self._shape = shape

    def serves(self, num_rows: int, table_width: int) -> bool:
        """Whether a step of so many rows and cache blocks may run through the kernel."""
        if not USE_FEW_ROWS_STEP or self._shape is None:
            return False
        if not self._verdicts.get((num_rows, table_width), True):
            return False
        return step_layout(self._device, self._shape, num_rows, table_width) is not None

    def is_proven(self, num_rows: int, table_width: int) -> bool:
        return (num_rows, table_width) in self._verdicts

    def judge(self, num_rows: int, table_width: int, is_equal: bool) -> None:
        """Notes whether a step's results were those of the ops launched one by one."""
        self._verdicts[num_rows, table_width] = is_equal

    def manifest(self) -> dict[str, bool]:
        """By rows and cache blocks, whether the results were equal."""
        return {f"M={m} blocks={width}": equal for (m, width), equal in self._verdicts.items()}

    def run(self, batch: Batch, work: Callable[[], Any]) -> Any:
        """`work`, a step over the placed batch, through the kernel: its ops are recorded, and run
        when it asks for logits."""
        recording = Recording(self._workspace)

        def logits(x: _Norm, weight: DeviceArray) -> DeviceArray:
            y = recording.logits(x, weight)
            self._launch(recording, batch)
            return y

        with _replaced(self._ops, recording, logits):
            return work()

    def _launch(self, recording: Recording, batch: Any) -> None:
        shape, table = self._shape, recording.rope_table
        assert shape is not None, "prepare() comes first"
        assert table is not None, "a step has layers"
        num_rows, width = batch.block_tables.shape
        layout = step_layout(self._device, shape, num_rows, width)
        assert layout is not None, "only steps that are served are recorded"
        program = self._upload(recording.program())
        kernel = self._kernels.get("few_rows_step", _defines(shape), _ARCH)
        counter = self._workspace.take("step_counter", (1,), np.dtype(np.uint64))
        heads = shape.num_heads * shape.head_dim
        attended = self._workspace.take("attention", (num_rows, heads), FP16)
        partials = self._workspace.take("attention_partials", (0,), FP32)
        args = (
            *(program, int32(len(recording.instructions)), counter, table),
            *(batch.positions, batch.slot_mapping, batch.context_lens, batch.block_tables),
            *(attended, partials, int32(num_rows), int32(width)),
            int32(recording.sliding_window or _UNLIMITED),
            np.float32(math.log2(math.e) / math.sqrt(shape.head_dim)),
            np.float32(recording.eps),
            *map(int32, (layout.num_slots, IN_FLIGHT, layout.x_bytes, layout.attention_warps)),
        )
        threads = 32 * (_WARPS + _PRODUCERS)
        self._kernels.launch(kernel, self._device.sm_count, threads, args, layout.shared_bytes)

    def _upload(self, program: bytes) -> DeviceArray:
        """The program on the GPU: the same for every step, so it travels once."""
        from cuda.bindings import driver

        target = self._workspace.take("step_program", (len(program),), np.dtype(np.uint8))
        if program != self._uploaded:
            stream = self._device.stream.handle
            call(driver.cuMemcpyHtoDAsync(target.ptr, program, len(program), stream))
            self._device.synchronize()
            self._uploaded = program
        return target


def _defines(shape: ModelShape) -> Defines:
    return {
        "NUM_HEADS": shape.num_heads,
        "NUM_KV_HEADS": shape.num_kv_heads,
        "HEAD_DIM": shape.head_dim,
        "HIDDEN": shape.hidden_size,
        "INTERMEDIATE": shape.intermediate_size,
        "WARPS": _WARPS,
        "PRODUCERS": _PRODUCERS,
        "STAGE_K": _STAGE_K,
        "NORM_THREADS": norm_threads(shape.hidden_size),
        "MIN_BLOCKS": 1,
        "SPIN_LIMIT": SPIN_LIMIT,
    }


@contextmanager
def _replaced(ops: Any, recording: Recording, logits: Callable[..., Any]) -> Iterator[None]:
    """The recorded ops in place of those of `ops`, for as long as the step is put together."""
    names: Sequence[str] = _RECORDED_OPS
    for name in names:
        setattr(ops, name, logits if name == "logits" else getattr(recording, name))
    try:
        yield
    finally:
        for name in names:
            delattr(ops, name)
