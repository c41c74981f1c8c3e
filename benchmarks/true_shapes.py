"""The true shapes of four models, and the tensors of their files: name, size and scale."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Standard deviations that keep a random model near a trained one in what rounding does to it:
# attention scores about 1.5, branches a fraction of the residual stream, logits about 3 (the best
# two of 32,064 are then 0.7 apart on average).
_LOGIT_STD = 3.0
_QKV_STD = 1.2
_BIAS_STD = 0.3
# Of SiLU(g) * u for standard normal g and u; and of a mean of values under spread-out attention.
_SWIGLU_STD, _ATTENDED_STD = 0.6, 0.5


@dataclass(frozen=True, slots=True)
class Shape:
    """One model. rope_freqs: Llama 3.1's divisors are in the file; sliding_window: None leaves
    the key out. model_option: what `model=` runs it with. pre: its pre-tokenizer."""

    architecture: str
    model_option: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rope_theta: float
    rms_norm_eps: float
    tied: bool
    tokenizer: str
    pre: str
    rope_freqs: bool = False
    sliding_window: int | None = None


SHAPES = {
    "phi3": Shape(
        "phi3", "phi3", 32, 3072, 8192, 32, 32, 96, 32064, 4096, 1e4, 1e-5, False, "llama",
        "default",
    ),
    "qwen2_5": Shape(
        "qwen2", "qwen2_5", 24, 896, 4864, 14, 2, 64, 151936, 32768, 1e6, 1e-6, True, "gpt2",
        "qwen2",
    ),
    # Llama-3.1-8B's shape with two of its layers.
    "llama3": Shape(
        "llama", "llama3", 2, 4096, 14336, 32, 8, 128, 128256, 131072, 5e5, 1e-5, False, "gpt2",
        "llama-bpe", rope_freqs=True,
    ),
    "smollm2": Shape(
        "llama", "smollm2", 30, 576, 1536, 9, 3, 64, 49152, 8192, 1e5, 1e-5, True, "gpt2", "smollm",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor: (out, in) fp16 matrices, (n,) fp32 vectors; normal values, or the given ones."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0
    values: NDArray[np.float32] | None = None

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * (2 if self.is_matrix else 4)


def tensor_plans(shape: Shape, residual_scale: float = 1.0) -> list[TensorPlan]:
    """Every tensor of the file, in order.

    residual_scale: multiplies the embedding and what each branch adds to the residual stream; the
    logits stay the same but for rounding. Raises ValueError for it in a tied model, whose
    embedding is also its output.
    """
    if shape.tied and residual_scale != 1.0:
        raise ValueError("a tied model's embedding cannot be scaled without its logits")
    hidden = shape.hidden_size
    head_std = _LOGIT_STD / math.sqrt(hidden)
    embedding_std = head_std if shape.tied else residual_scale
    # A tied model whose stream stays near its embedding would only repeat its last token, and one
    # whose attention weighs much would say the same at every position.
    attention_std = embedding_std * 0.4
    ffn_std = embedding_std * (1.5 if shape.tied else 0.4)
    plans = [TensorPlan("token_embd.weight", (shape.vocab_size, hidden), embedding_std)]
    if shape.rope_freqs:
        freqs = _llama3_rope_freqs(shape)
        plans.append(TensorPlan("rope_freqs.weight", freqs.shape, 0.0, values=freqs))
    for layer in range(shape.num_layers):
        plans.extend(_layer(shape, f"blk.{layer}", attention_std, ffn_std))
    plans.append(TensorPlan("output_norm.weight", (hidden,), 0.1, 1.0))
    if not shape.tied:
        plans.append(TensorPlan("output.weight", (shape.vocab_size, hidden), head_std))
    return plans


def metadata(shape: Shape, name: str) -> dict[str, Any]:
    """The file's keys but for the tokenizer's."""
    facts: dict[str, Any] = {
        "block_count": shape.num_layers,
        "context_length": shape.context_length,
        "embedding_length": shape.hidden_size,
        "feed_forward_length": shape.intermediate_size,
        "attention.head_count": shape.num_heads,
        "attention.head_count_kv": shape.num_kv_heads,
        "attention.layer_norm_rms_epsilon": shape.rms_norm_eps,
        "rope.freq_base": shape.rope_theta,
        "rope.dimension_count": shape.head_dim,
        "vocab_size": shape.vocab_size,
    }
    if shape.head_dim * shape.num_heads != shape.hidden_size:
        facts |= {"attention.key_length": shape.head_dim, "attention.value_length": shape.head_dim}
    if shape.architecture == "phi3":
        facts["rope.scaling.original_context_length"] = shape.context_length
    if shape.sliding_window is not None:
        facts["attention.sliding_window"] = shape.sliding_window
    return {
        "general.architecture": shape.architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": 1,
        **{f"{shape.architecture}.{key}": value for key, value in facts.items()},
    }


def _layer(shape: Shape, prefix: str, attention_std: float, ffn_std: float) -> Iterator[TensorPlan]:
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    qkv_std, gate_std = _QKV_STD / math.sqrt(hidden), 1 / math.sqrt(hidden)
    fused = shape.architecture == "phi3"
    qkv = {"attn_qkv": heads + 2 * kv} if fused else {"attn_q": heads, "attn_k": kv, "attn_v": kv}
    ffn_in = {"ffn_up": 2 * ffn} if fused else {"ffn_gate": ffn, "ffn_up": ffn}
    output_std = attention_std / (_QKV_STD * _ATTENDED_STD * math.sqrt(heads))
    down_std = ffn_std / (_SWIGLU_STD * math.sqrt(ffn))
    yield TensorPlan(f"{prefix}.attn_norm.weight", (hidden,), 0.1, 1.0)
    for part, rows in qkv.items():
        yield TensorPlan(f"{prefix}.{part}.weight", (rows, hidden), qkv_std)
        if shape.architecture == "qwen2":
            yield TensorPlan(f"{prefix}.{part}.bias", (rows,), _BIAS_STD)
    yield TensorPlan(f"{prefix}.attn_output.weight", (hidden, heads), output_std)
    yield TensorPlan(f"{prefix}.ffn_norm.weight", (hidden,), 0.1, 1.0)
    for part, rows in ffn_in.items():
        yield TensorPlan(f"{prefix}.{part}.weight", (rows, hidden), gate_std)
    yield TensorPlan(f"{prefix}.ffn_down.weight", (hidden, ffn), down_std)


def _llama3_rope_freqs(shape: Shape) -> NDArray[np.float32]:
    from support.rope_freqs import llama3_rope_freqs

    return llama3_rope_freqs(shape.head_dim, shape.rope_theta)
