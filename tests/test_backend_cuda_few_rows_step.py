"""How a decode step becomes the program of one kernel, and where it may; decided without a card."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from orcd_batch.backend.cuda.array import FP16, FP32, DeviceArray
from orcd_batch.backend.cuda.few_rows_step import (
    INSTRUCTION,
    MAX_SPLITS,
    Op,
    Recording,
    step_layout,
)
from orcd_batch.backend.cuda.plan import ModelShape
from orcd_batch.backend.ops import KVCache
from orcd_batch.model.forward import forward

PHI3 = ModelShape(32, 3072, 8192, 32, 32, 96, 32064, 4096)
QWEN = ModelShape(24, 896, 4864, 14, 2, 64, 151936, 32768)
SMOLLM2 = ModelShape(30, 576, 1536, 9, 3, 64, 49152, 8192)


def card(capability: tuple[int, int] = (9, 0), shared_memory: int = 227 << 10) -> Any:
    return SimpleNamespace(
        sm_count=132, max_shared_memory=shared_memory, compute_capability=capability
    )


class Arrays:
    """Arrays at addresses of their own."""

    def __init__(self) -> None:
        self.next = 1 << 20

    def __call__(self, *shape: int, dtype: Any = FP16) -> DeviceArray:
        array = DeviceArray(self.next, shape, dtype)
        self.next += array.nbytes
        return array

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        return self.__dict__.setdefault(name, self(*shape, dtype=dtype))


def record(shape: ModelShape) -> tuple[np.ndarray[Any, Any], Any, Arrays]:
    """The program of a step of one row of the forward pass, its weights, and where arrays are."""
    arrays, hidden, heads = Arrays(), shape.hidden_size, shape.num_heads * shape.head_dim
    cache = (9, shape.num_kv_heads, 64, shape.head_dim)
    layers = [
        SimpleNamespace(
            attn_norm=arrays(hidden, dtype=FP32),
            attn_qkv=arrays(shape.qkv_size, hidden),
            attn_qkv_bias=arrays(shape.qkv_size, dtype=FP32),
            attn_output=arrays(hidden, heads),
            ffn_norm=arrays(hidden, dtype=FP32),
            ffn_gate_up=arrays(2 * shape.intermediate_size, hidden),
            ffn_down=arrays(hidden, shape.intermediate_size),
        )
        for _ in range(2)
    ]
    weights: Any = SimpleNamespace(
        token_embd=None,
        layers=layers,
        output_norm=arrays(hidden, dtype=FP32),
        output=arrays(shape.vocab_size, hidden),
        rope_table=arrays(16, 2, shape.head_dim // 2, dtype=FP32),
    )
    caches = [KVCache(arrays(*cache), arrays(*cache)) for _ in layers]
    workspace: Any = arrays
    ops: Any = Recording(workspace)
    residual = arrays(1, hidden, dtype=FP32)
    whole: Any = SimpleNamespace(
        embedding=lambda *_: residual,
        **{name: getattr(ops, name) for name in dir(ops) if not name.startswith("_")},
    )
    batch: Any = SimpleNamespace(token_ids=None, logits_rows=arrays(1))
    config: Any = SimpleNamespace(rms_norm_eps=1e-5, sliding_window=0)
    forward(whole, config, weights, caches, batch)
    return np.frombuffer(ops.program(), INSTRUCTION), weights, arrays


@pytest.mark.parametrize("shape", [PHI3, QWEN, SMOLLM2], ids=["phi3", "qwen", "smollm2"])
def test_a_layout_leaves_a_ring_and_fits_shared_memory(shape: ModelShape) -> None:
    for rows in range(1, 9):
        for width in (4, 8, 16, 32, 64):
            layout = step_layout(card(), shape, rows, width)
            if layout is None:
                continue
            assert rows * width / 4 <= MAX_SPLITS
            assert layout.num_slots >= 16
            attention = layout.attention_warps * (18 + 256) * shape.head_dim * 2
            ring = layout.num_slots * (8 * 512 + 16)
            x_bytes = rows * (2 * max(shape.hidden_size, shape.intermediate_size) + 16)
            assert x_bytes + attention + ring <= layout.shared_bytes <= (227 << 10) - 256
    assert step_layout(card(), shape, 1, 16) is not None


def test_what_the_kernel_cannot_do_has_no_layout() -> None:
    assert step_layout(card((10, 0)), PHI3, 1, 16) is None
    assert step_layout(card(shared_memory=99 << 10), PHI3, 1, 16) is None
    assert step_layout(card(), PHI3, 9, 4) is None
    assert step_layout(card(), PHI3, 1, 4 * MAX_SPLITS + 1) is None
    odd = ModelShape(32, 3072, 8192, 32, 32, 96, 32063, 4096)
    assert step_layout(card(), odd, 1, 16) is None


@pytest.mark.parametrize("shape", [PHI3, QWEN, SMOLLM2], ids=["phi3", "qwen", "smollm2"])
def test_a_step_is_five_instructions_a_layer_and_the_logits(shape: ModelShape) -> None:
    program, weights, _ = record(shape)
    layer = [Op.NORM, Op.ATTEND, Op.MERGE, Op.NORM, Op.COPY]
    assert program["op"].tolist() == layer * 2 + [Op.NORM]
    products = [w for layer in weights.layers for w in _products(layer)] + [weights.output]
    found = program[program["op"] != Op.ATTEND]
    assert found["w"].tolist() == [weight.ptr for weight in products]
    tiles = found["num_units"] * 8 * np.where(found["output"] == 3, 2, 1)
    assert tiles.tolist() == [weight.shape[0] for weight in products]


def test_what_one_instruction_leaves_the_next_one_reads() -> None:
    program, _, _ = record(PHI3)
    for layer in (program[:5], program[5:10]):
        qkv, attend, output, gate_up, down = layer
        assert qkv["y"] == attend["x"]
        assert attend["y"] == output["x"]
        assert output["y"] == gate_up["x"] == down["y"] == qkv["x"]
        assert gate_up["y"] == down["x"]


def _products(layer: Any) -> list[DeviceArray]:
    return [layer.attn_qkv, layer.attn_output, layer.ffn_gate_up, layer.ffn_down]
