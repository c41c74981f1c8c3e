"""The small random models that the oracle and the tests both write, and their prompts."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from support.rope_freqs import llama3_rope_freqs

NUM_TOKENS = 32
PROMPT_LENGTHS = (5, 70, 150)

# Llama 3.1's rope scaling with a short original context, so that short prompts feel it.
ROPE_THETA = 10000.0
LLAMA3_SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ORIGINAL_CONTEXT = 64


@dataclass(frozen=True)
class Case:
    """One model: `options` for `write_model`, and `off`, the options that leave its feature out."""

    name: str
    options: Mapping[str, Any]
    off: Mapping[str, Any] = field(default_factory=dict)


_PHI3 = {
    "architecture": "phi3",
    "num_layers": 3,
    "hidden_size": 192,
    "num_heads": 2,
    "num_kv_heads": 2,
    "intermediate_size": 256,
    "tokenizer": "llama",
    "weight_scale": 1.6,
    "seed": 1,
}
_LLAMA = {
    "architecture": "llama",
    "num_layers": 3,
    "hidden_size": 256,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 256,
    "weight_scale": 1.6,
    "seed": 2,
}
_QWEN2 = {
    "architecture": "qwen2",
    "num_layers": 2,
    "hidden_size": 896,
    "num_heads": 14,
    "num_kv_heads": 2,
    "intermediate_size": 512,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tied": True,
    "weight_scale": 1.6,
    "seed": 3,
}
_MIXED_TYPES = {
    "": "Q8_0",
    "attn_q": "Q4_K",
    "attn_k": "Q5_K",
    "attn_v": "Q6_K",
    "attn_output": "Q5_0",
    "ffn_gate": "Q3_K",
    "ffn_up": "Q5_1",
    "ffn_down": "Q4_0",
    "output.weight": "Q2_K",
    "blk.1.attn_q": "Q4_1",
    "blk.1.ffn_up": "BF16",
    "blk.1.ffn_down": "F16",
}

CASES = [
    Case("phi3_fused_96", _PHI3),
    Case("phi3_window_96", _PHI3 | {"sliding_window": 24}, off={"sliding_window": None}),
    Case("qwen2_bias_tied_64", _QWEN2, off={"qkv_bias": False}),
    Case("llama_64", _LLAMA),
    Case("llama_tied_128", _LLAMA | {"num_heads": 2, "num_kv_heads": 2, "tied": True}),
    Case(
        "llama_rope_freqs_128",
        _LLAMA
        | {
            "head_dim": 128,
            "rope_theta": ROPE_THETA,
            "rope_freqs": llama3_rope_freqs(
                128, ROPE_THETA, original_context_length=LLAMA3_ORIGINAL_CONTEXT, **LLAMA3_SCALING
            ),
        },
        off={"rope_freqs": None},
    ),
    Case(
        "llama_linear_64", _LLAMA | {"rope_scaling_factor": 4.0}, off={"rope_scaling_factor": None}
    ),
    Case("llama_quantized_64", _LLAMA | {"tensor_type": _MIXED_TYPES}),
]


def prompts() -> list[list[int]]:
    """Random token ids, the same for every case: shorter and longer than a window and a block."""
    rng = np.random.default_rng(11)
    return [rng.integers(3, 320, length).tolist() for length in PROMPT_LENGTHS]


def digest(tensors: Mapping[str, NDArray[np.float32]]) -> str:
    """SHA-256 over the names, shapes and fp32 values of a model's tensors."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(f"{name} {tensors[name].shape}\n".encode())
        state.update(np.ascontiguousarray(tensors[name], "<f4").tobytes())
    return state.hexdigest()
