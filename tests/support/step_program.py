"""The program of a decode step as one kernel, taken down without a card."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from orcd_batch.backend.cuda.array import FP16, FP32, DeviceArray
from orcd_batch.backend.cuda.plan import ModelShape
from orcd_batch.backend.cuda.step_program import INSTRUCTION, Recording, packet_places
from orcd_batch.backend.ops import KVCache
from orcd_batch.model.forward import forward

PACKETS = 1 << 40


class Arrays:
    """Arrays at addresses of their own."""

    residual: DeviceArray
    recorded: list[DeviceArray]

    def __init__(self) -> None:
        self.next = 1 << 20

    def __call__(self, *shape: int, dtype: Any = FP16) -> DeviceArray:
        array = DeviceArray(self.next, shape, dtype)
        self.next += array.nbytes
        return array

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        return self.__dict__.setdefault(name, self(*shape, dtype=dtype))


def record(shape: ModelShape, num_layers: int = 2) -> tuple[np.ndarray[Any, Any], Any, Arrays]:
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
        for _ in range(num_layers)
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
    ops: Any = Recording(workspace, PACKETS, packet_places(shape))
    residual = arrays.residual = arrays(1, hidden, dtype=FP32)
    whole: Any = SimpleNamespace(
        embedding=lambda *_: residual,
        **{name: getattr(ops, name) for name in dir(ops) if not name.startswith("_")},
    )
    batch: Any = SimpleNamespace(token_ids=arrays(1), logits_rows=arrays(1))
    config: Any = SimpleNamespace(rms_norm_eps=1e-5, sliding_window=0)
    forward(whole, config, weights, caches, batch)
    arrays.recorded = ops.weights
    return np.frombuffer(ops.program(), INSTRUCTION), weights, arrays
