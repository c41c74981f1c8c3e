"""Builds transformers models from GGUF tensors by hand, for what its own GGUF reader leaves out.

Needs torch and transformers; only the scripts that make answers import it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

_CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}
_PART_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def build(
    options: Mapping[str, Any],
    tensors: Mapping[str, NDArray[np.floating[Any]]],
    rope_parameters: Mapping[str, Any],
    device: str = "cpu",
) -> PreTrainedModel:
    """The transformers model of `write_model(**options)`, in fp32 with eager attention.

    tensors: fp32 or fp16, in GGUF's layout. rope_parameters: transformers' own description of
    rope scaling ("rope_type" and its numbers); it stands for `rope_freqs` and for the linear
    scaling of the file.
    """
    architecture = options["architecture"]
    config_class, model_class = _CLASSES[architecture]
    head_dim = options.get("head_dim") or options["hidden_size"] // options["num_heads"]
    config = config_class(
        vocab_size=len(tensors["token_embd.weight"]),
        hidden_size=options["hidden_size"],
        intermediate_size=options["intermediate_size"],
        num_hidden_layers=options["num_layers"],
        num_attention_heads=options["num_heads"],
        num_key_value_heads=options["num_kv_heads"],
        head_dim=head_dim,
        max_position_embeddings=options.get("context_length", 512),
        rms_norm_eps=options.get("rms_norm_eps", 1e-5),
        tie_word_embeddings="output.weight" not in tensors,
        rope_parameters={"rope_theta": options.get("rope_theta", 10000.0), **rope_parameters},
        sliding_window=options.get("sliding_window"),
        pad_token_id=None,
        attn_implementation="eager",
    )
    if architecture == "qwen2":
        assert options.get("sliding_window") is None, "Qwen2's window works otherwise there"
    with torch.device(device):
        model = model_class(config).float().eval()
    state = _state(tensors, architecture == "llama", head_dim)
    if "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    if architecture == "qwen2" and not any(name.endswith("q_proj.bias") for name in state):
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                state[name] = torch.zeros_like(parameter)
    model.load_state_dict(state, strict=True)
    return model


def _state(
    tensors: Mapping[str, NDArray[np.floating[Any]]], neighbours: bool, head_dim: int
) -> dict[str, torch.Tensor]:
    state = {}
    for name, values in tensors.items():
        if name == "rope_freqs.weight":
            continue
        if name in _TOP_NAMES:
            state[_TOP_NAMES[name]] = torch.from_numpy(values.copy())
            continue
        _, layer, part, kind = name.split(".")
        target = _PART_NAMES[part]
        if part == "ffn_up" and f"blk.{layer}.ffn_gate.weight" not in tensors:
            target = "mlp.gate_up_proj"
        if neighbours and part in ("attn_q", "attn_k"):
            values = halves_from_neighbours(values, head_dim)
        state[f"model.layers.{layer}.{target}.{kind}"] = torch.from_numpy(values.copy())
    return state


def halves_from_neighbours(
    values: NDArray[np.floating[Any]], head_dim: int
) -> NDArray[np.floating[Any]]:
    """Puts rows 0, 2, 4, … of each head first and rows 1, 3, 5, … after them."""
    heads = values.reshape(-1, head_dim, *values.shape[1:])
    return np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(values.shape)
