"""A decode step's ops as the program of kernels/few_rows_step.cu, and where its packets lie."""

from dataclasses import dataclass, field
from enum import IntEnum
from itertools import accumulate

import numpy as np

from orcd_batch.backend.cuda.array import FP32, DeviceArray
from orcd_batch.backend.cuda.attention import item_floats, num_units
from orcd_batch.backend.cuda.plan import ModelShape
from orcd_batch.backend.cuda.product import Output, buffer_name
from orcd_batch.backend.cuda.workspace import Workspace
from orcd_batch.backend.ops import Batch, KVCache

# As in kernels/few_rows_step.cu: rows of a tile of w, and those of a step.
TILE_N = 8
MAX_STEP_ROWS = 2
# Splits of attention of all sequences together.
MAX_SPLITS = 16
PACKET = np.dtype(np.uint64)

INSTRUCTION = np.dtype(
    [
        *((name, np.int32) for name in ("op", "output", "num_units", "width")),
        *((name, np.uint64) for name in ("share", "x", "vector", "y", "addend", "values")),
    ]
)


class Op(IntEnum):
    """Where a product's input comes from, or attention."""

    NORM = 0
    ATTENTION = 1
    SWIGLU = 2
    ATTEND = 3
    FIRST_NORM = 4


@dataclass(frozen=True, slots=True)
class PacketPlaces:
    """Where a step's packets lie, counted in packets: as much for any number of rows."""

    residual: int
    qkv: int
    attended: int
    gated: int
    partials: int
    total: int


def packet_places(shape: ModelShape) -> PacketPlaces:
    heads = shape.num_heads * shape.head_dim
    group = shape.num_heads // shape.num_kv_heads
    items = MAX_SPLITS * num_units(shape.num_heads, shape.num_kv_heads)
    halves = (shape.qkv_size // 2, heads // 2, shape.intermediate_size // 2)
    sizes = (
        *(MAX_STEP_ROWS * size for size in (shape.hidden_size, *halves)),
        items * item_floats(group, shape.head_dim),
    )
    # Whole lines of the L2 cache.
    ends = tuple(accumulate(-(-size // 16) * 16 for size in sizes))
    return PacketPlaces(0, *ends)


# What the recorded ops return: what is to be computed, by whom it is read.
@dataclass(frozen=True, slots=True)
class _Norm:
    weight: DeviceArray


@dataclass(frozen=True, slots=True)
class _Product:
    x: _Norm
    weight: DeviceArray


@dataclass(frozen=True, slots=True)
class _Result:
    """Of attention or swiglu: by which op it is read, and where."""

    op: Op
    place: int


@dataclass(slots=True)
class Recording:
    """The ops of one step as instructions; each method stands in for the op of its name.

    packets: the address of the step's packets. places: see `packet_places`.
    """

    workspace: Workspace
    packets: int
    places: PacketPlaces
    instructions: list[tuple[int, ...]] = field(default_factory=list)
    weights: list[DeviceArray] = field(default_factory=list)
    eps: float = 0.0
    sliding_window: int = 0
    num_rows: int = 0
    rope_table: DeviceArray | None = None
    _residual: DeviceArray | None = None
    _is_first_sum: bool = True

    def rms_norm(self, x: DeviceArray, weight: DeviceArray, eps: float) -> _Norm:
        self.eps, self.num_rows = eps, x.shape[0]
        self._residual = x
        return _Norm(weight)

    def linear(self, x: _Norm, weight: DeviceArray) -> _Product:
        return _Product(x, weight)

    def rope_and_cache(
        self,
        qkv: _Product,
        bias: DeviceArray,
        rope_table: DeviceArray,
        cache: KVCache,
        batch: Batch,
    ) -> _Result:
        y = self._place(self.places.qkv)
        self._multiply_norm(qkv, y, Output.FP16)
        attended = _Result(Op.ATTENTION, self._place(self.places.attended))
        pointers = (0, y, bias.ptr, attended.place, cache.keys.ptr, cache.values.ptr)
        self.instructions.append((Op.ATTEND, 0, 0, 0, *pointers))
        self.rope_table = rope_table
        return attended

    def attention(self, q: _Result, cache: KVCache, batch: Batch, sliding_window: int) -> _Result:
        self.sliding_window = sliding_window
        return q

    def gated_linear(self, x: _Norm, weight: DeviceArray) -> _Result:
        y = self._place(self.places.gated)
        self._multiply_norm(_Product(x, weight), y, Output.GATED)
        return _Result(Op.SWIGLU, y)

    def linear_add(self, x: _Result, weight: DeviceArray, residual: DeviceArray) -> None:
        y, addend = self._place(self.places.residual), 0
        if self._is_first_sum:
            self._is_first_sum, addend = False, residual.ptr
        self._multiply(x.op, weight, x.place, y, Output.ADD, addend=addend)

    def logits(self, x: _Norm, weight: DeviceArray) -> DeviceArray:
        size = weight.shape[0]
        y = self.workspace.take(buffer_name(size, Output.FP32), (self.num_rows, size), FP32)
        self._multiply_norm(_Product(x, weight), y.ptr, Output.FP32)
        return y

    def program(self) -> bytes:
        return np.array(self.instructions, INSTRUCTION).tobytes()

    def _place(self, first: int) -> int:
        return self.packets + first * PACKET.itemsize

    def _multiply_norm(self, product: _Product, y: int, output: Output) -> None:
        op, x = Op.NORM, self._place(self.places.residual)
        if self._is_first_sum:
            assert self._residual is not None, "a norm comes first"
            op, x = Op.FIRST_NORM, self._residual.ptr
        self._multiply(op, product.weight, x, y, output, vector=product.x.weight.ptr)

    def _multiply(
        self,
        op: Op,
        weight: DeviceArray,
        x: int,
        y: int,
        output: Output,
        vector: int = 0,
        addend: int = 0,
    ) -> None:
        width = output.num_columns(weight.shape[0])
        pointers = (0, x, vector, y, addend, 0)
        self.instructions.append((op, output, width // TILE_N, width, *pointers))
        self.weights.append(weight)
