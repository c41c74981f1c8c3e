"""One generic decoder: RMSNorm, rotary grouped-query attention, SwiGLU (Llama, Phi-3, Qwen2)."""

from collections.abc import Sequence

from orcd_batch.backend.ops import Array, Batch, KVCache, Ops
from orcd_batch.checkpoint.model_config import ModelConfig
from orcd_batch.model.weights import Weights


def forward(
    ops: Ops, config: ModelConfig, weights: Weights, caches: Sequence[KVCache], batch: Batch
) -> Array:
    """Runs one step's tokens, fills their cache slots, and returns logits (R, V) fp32.

    batch: placed by `ops.place`. caches: one per layer. R rows are those of batch.logits_rows.
    """
    are_all = batch.logits_rows.shape == batch.token_ids.shape
    rows = None if are_all else batch.logits_rows
    return ops.logits(hidden_states(ops, config, weights, caches, batch, rows), weights.output)


def hidden_states(
    ops: Ops,
    config: ModelConfig,
    weights: Weights,
    caches: Sequence[KVCache],
    batch: Batch,
    rows: Array | None = None,
) -> Array:
    """As `forward`, up to the last norm: what the output projection takes.

    rows: (R,) of the step's tokens, ascending; None: all T. (R, C): beyond the last layer's cache
    nothing else of the others is needed.
    """
    eps = config.rms_norm_eps
    x = ops.embedding(batch.token_ids, weights.token_embd)
    for layer, cache in zip(weights.layers, caches, strict=True):
        qkv = ops.linear(ops.rms_norm(x, layer.attn_norm, eps), layer.attn_qkv)
        q = ops.rope_and_cache(qkv, layer.attn_qkv_bias, weights.rope_table, cache, batch)
        attended = ops.attention(q, cache, batch, config.sliding_window)
        if rows is not None and layer is weights.layers[-1]:
            x, attended = ops.take_rows(x, rows), ops.take_rows(attended, rows)
        ops.linear_add(attended, layer.attn_output, x)
        gated = ops.gated_linear(ops.rms_norm(x, layer.ffn_norm, eps), layer.ffn_gate_up)
        ops.linear_add(gated, layer.ffn_down, x)
    return ops.rms_norm(x, weights.output_norm, eps)
