"""How a decode step becomes the program of one kernel, and where it may; decided without a card."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.step_program import record

from orcd_batch.backend.cuda.array import DeviceArray
from orcd_batch.backend.cuda.few_rows_step import step_layout
from orcd_batch.backend.cuda.plan import ModelShape
from orcd_batch.backend.cuda.product import Output
from orcd_batch.backend.cuda.step_program import MAX_SPLITS, Op, packet_places

PHI3 = ModelShape(32, 3072, 8192, 32, 32, 96, 32064, 4096)
QWEN = ModelShape(24, 896, 4864, 14, 2, 64, 151936, 32768)
SMOLLM2 = ModelShape(30, 576, 1536, 9, 3, 64, 49152, 8192)


def card(capability: tuple[int, int] = (9, 0), shared_memory: int = 227 << 10) -> Any:
    return SimpleNamespace(
        sm_count=132, max_shared_memory=shared_memory, compute_capability=capability
    )


@pytest.mark.parametrize("shape", [PHI3, QWEN, SMOLLM2], ids=["phi3", "qwen", "smollm2"])
def test_a_layout_leaves_a_ring_and_fits_shared_memory(shape: ModelShape) -> None:
    for rows in (1, 2):
        for width in (4, 8, 16, 32, 64):
            layout = step_layout(card(), shape, rows, width)
            if layout is None:
                continue
            assert rows * width / 4 <= MAX_SPLITS
            assert 8 <= layout.in_flight <= layout.num_slots - 20
            assert layout.in_flight % 4 == layout.num_slots % 4 == 0, "each slot has one copier"
            attention = layout.num_teams * 256 * shape.head_dim * 2
            ring = layout.num_slots * (8 * 512 + 16) + 64 * (5 * shape.num_layers + 1)
            x_bytes = rows * (2 * max(shape.hidden_size, shape.intermediate_size) + 16)
            assert x_bytes + attention + ring <= layout.shared_bytes <= (227 << 10) - 256
    assert step_layout(card(), shape, 1, 16) is not None


def test_what_the_kernel_cannot_do_has_no_layout() -> None:
    assert step_layout(card((10, 0)), PHI3, 1, 16) is None
    assert step_layout(card(shared_memory=99 << 10), PHI3, 1, 16) is None
    assert step_layout(card(), PHI3, 3, 4) is None
    assert step_layout(card(), PHI3, 1, 4 * MAX_SPLITS + 1) is None
    odd = ModelShape(32, 3072, 8192, 32, 32, 96, 32063, 4096)
    assert step_layout(card(), odd, 1, 16) is None


@pytest.mark.parametrize("shape", [PHI3, QWEN, SMOLLM2], ids=["phi3", "qwen", "smollm2"])
def test_a_step_is_five_instructions_a_layer_and_the_logits(shape: ModelShape) -> None:
    program, weights, arrays = record(shape)
    layer = [Op.ATTEND, Op.ATTENTION, Op.NORM, Op.SWIGLU]
    assert program["op"].tolist() == [Op.FIRST_NORM, *layer, Op.NORM, *layer, Op.NORM]
    products = [w for layer in weights.layers for w in _products(layer)] + [weights.output]
    found = program[program["op"] != Op.ATTEND]
    assert arrays.recorded == products
    tiles = found["num_units"] * 8 * np.where(found["output"] == 3, 2, 1)
    assert tiles.tolist() == [weight.shape[0] for weight in products]


def test_what_one_instruction_leaves_the_next_one_reads() -> None:
    program, _, arrays = record(PHI3)
    first = program[0]
    assert first["x"] == program[2]["addend"] == arrays.residual.ptr
    for layer in (program[:5], program[5:10]):
        qkv, attend, output, gate_up, down = layer
        assert qkv["y"] == attend["x"]
        assert attend["y"] == output["x"]
        assert output["y"] == gate_up["x"] == down["y"] == program[5]["x"]
        assert gate_up["y"] == down["x"]
    assert program[7]["addend"] == 0, "what the block itself left"
    assert program[-1]["x"] == program[-2]["y"]
    assert program[-1]["output"] == Output.FP32


@pytest.mark.parametrize("shape", [PHI3, QWEN, SMOLLM2], ids=["phi3", "qwen", "smollm2"])
def test_packets_of_different_kinds_lie_apart_on_lines_of_their_own(shape: ModelShape) -> None:
    places = packet_places(shape)
    starts = [getattr(places, name) for name in places.__slots__]
    heads = shape.num_heads * shape.head_dim
    columns = [shape.hidden_size, shape.qkv_size // 2, heads // 2, shape.intermediate_size // 2]
    rooms = np.diff(starts)
    assert all(start * 8 % 128 == 0 for start in starts)
    assert all(rooms[:4] >= 2 * np.array(columns))
    assert rooms[4] >= MAX_SPLITS * shape.num_heads * (shape.head_dim + 2)


def _products(layer: Any) -> list[DeviceArray]:
    return [layer.attn_qkv, layer.attn_output, layer.ffn_gate_up, layer.ffn_down]
