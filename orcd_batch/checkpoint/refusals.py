"""What a file may ask for beyond the plain decoder; all of it is refused by name."""

from orcd_batch.checkpoint.architecture_facts import ArchitectureFacts, unsupported
from orcd_batch.checkpoint.gguf_file import GGUFFile
from orcd_batch.checkpoint.header_reader import quoted, shown

# Read elsewhere, or of no consequence for the computation.
_UNDERSTOOD = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.factor",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "tensor_data_layout",
        "vocab_size",
    }
)

# Features we do not have, and the values of their keys that leave them off.
_OFF_VALUES: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "use_parallel_residual": (False,),
}


def refuse_unknown_features(gguf: GGUFFile, facts: ArchitectureFacts) -> None:
    """Raises CheckpointError for a key whose effect we would otherwise ignore in silence."""
    kind = gguf.metadata.get("general.type", "model")
    if kind != "model":
        raise unsupported(gguf, f"its general.type is {shown(kind)} and not a whole model")
    _refuse_split(gguf)
    for key in facts.names():
        value = facts.get(key)
        off = isinstance(value, int | float) and value in _OFF_VALUES.get(key, ())
        if key not in _UNDERSTOOD and not off:
            raise unsupported(
                gguf,
                f"it sets {quoted(key)} to {shown(value)}, "
                "which asks for something this program does not do",
            )


def _refuse_split(gguf: GGUFFile) -> None:
    count = gguf.metadata.get("split.count", 1)
    if not isinstance(count, int) or count > 1:
        raise unsupported(
            gguf,
            f"it is one of {shown(count)} parts of a split model",
            "merge them with llama.cpp's `llama-gguf-split --merge`",
        )
