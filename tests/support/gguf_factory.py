"""Writes small random models as GGUF files, with the keys and layouts that real converters use."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from support.random_tensors import Floats, RandomWeights, Tensor
from support.vocabulary import gpt2_vocabulary, llama_vocabulary, num_tokens

_PRE_TOKENIZERS = {"llama": "smollm", "qwen2": "qwen2", "phi3": "smollm"}


def write_model(
    path: str | Path,
    architecture: str = "llama",
    *,
    num_layers: int = 2,
    hidden_size: int = 128,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    intermediate_size: int = 192,
    context_length: int = 512,
    rope_theta: float = 10000.0,
    rms_norm_eps: float = 1e-5,
    fused: bool | None = None,
    tied: bool = False,
    qkv_bias: bool | None = None,
    rope_freqs: Sequence[float] | Floats | None = None,
    rope_scaling_factor: float | None = None,
    sliding_window: int | None = None,
    tensor_type: str | Mapping[str, str] = "F32",
    tokenizer: str = "gpt2",
    chat_template: str | None = None,
    seed: int = 0,
    weight_scale: float = 1.5,
    extra_metadata: Mapping[str, object] | None = None,
    extra_tensors: Mapping[str, NDArray[Any]] | None = None,
    omit: Collection[str] = (),
) -> dict[str, Floats]:
    """Writes one model and returns every tensor's fp32 values by name, in GGUF's own layout.

    Arrays are outermost dimension first; for `llama` the rows of Q and K pair as neighbours, as
    its converter leaves them. Values are those the file holds after rounding to its type. A
    tensor depends on the seed and its own part's name only, so the fused and the split file of
    one seed hold the same rows (types drawn as raw blocks excepted).

    fused: attn_qkv and a double-height ffn_up (None: phi3 only). qkv_bias: None means qwen2 only.
    tensor_type: one GGML type for all matrices, or {part of the tensor's name: type, "": the
    rest}; vectors stay F32, as converters keep them. tokenizer: "gpt2" or "llama".
    weight_scale: linear outputs of a normed input have about this standard deviation.
    extra_metadata: added or replacing (by full key; None removes). extra_tensors: written as
    given (fp32 or fp16). omit: names of tensors and metadata keys to leave out.
    Raises ValueError for a type that cannot be written or a row that is no whole number of blocks.
    """
    weights = RandomWeights(architecture, fused, tied, qkv_bias, tensor_type, seed, weight_scale)
    head_dim = hidden_size // num_heads if head_dim is None else head_dim
    vocabulary = _vocabulary(tokenizer, architecture)
    metadata = _facts(architecture) | {
        f"{architecture}.{key}": value
        for key, value in {
            "block_count": num_layers,
            "context_length": context_length,
            "embedding_length": hidden_size,
            "feed_forward_length": intermediate_size,
            "attention.head_count": num_heads,
            "attention.head_count_kv": num_kv_heads,
            "attention.layer_norm_rms_epsilon": float(rms_norm_eps),
            "rope.freq_base": float(rope_theta),
            "rope.dimension_count": head_dim,
            "vocab_size": num_tokens(vocabulary),
        }.items()
    }
    metadata |= _optional_facts(
        architecture,
        head_dim if head_dim * num_heads != hidden_size else None,
        context_length,
        rope_scaling_factor,
        sliding_window,
    )
    metadata |= vocabulary | {"general.quantization_version": 2}
    if chat_template is not None:
        metadata["tokenizer.chat_template"] = chat_template
    metadata |= extra_metadata or {}

    vocab_size = num_tokens(vocabulary)
    tensors = {"token_embd.weight": weights.matrix("token_embd", vocab_size, hidden_size)}
    for layer in range(num_layers):
        tensors |= weights.layer(
            f"blk.{layer}", hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim
        )
    tensors["output_norm.weight"] = weights.norm("output_norm", hidden_size)
    if not tied:
        tensors["output.weight"] = weights.matrix("output", vocab_size, hidden_size)
    if rope_freqs is not None:
        tensors["rope_freqs.weight"] = Tensor.of(np.asarray(rope_freqs, np.float32))
    tensors |= {name: Tensor.of(array) for name, array in (extra_tensors or {}).items()}

    tensors = {name: tensor for name, tensor in tensors.items() if name not in omit}
    metadata = {key: value for key, value in metadata.items() if key not in omit}
    _write(Path(path), architecture, metadata, tensors)
    return {name: tensor.values for name, tensor in tensors.items()}


def _vocabulary(tokenizer: str, architecture: str) -> dict[str, object]:
    if tokenizer == "gpt2":
        return gpt2_vocabulary(_PRE_TOKENIZERS.get(architecture, "default"))
    if tokenizer == "llama":
        return llama_vocabulary()
    raise ValueError(f'tokenizer is {tokenizer!r}; it must be "gpt2" or "llama"')


def _facts(architecture: str) -> dict[str, object]:
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": f"Random {architecture}",
    }


def _optional_facts(
    architecture: str,
    head_dim: int | None,
    context_length: int,
    rope_scaling_factor: float | None,
    sliding_window: int | None,
) -> dict[str, object]:
    facts: dict[str, object] = {}
    if head_dim is not None:
        facts |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if architecture == "phi3":
        facts["rope.scaling.original_context_length"] = context_length
    if rope_scaling_factor is not None:
        facts |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope_scaling_factor)}
    if sliding_window is not None:
        facts["attention.sliding_window"] = sliding_window
    return {f"{architecture}.{key}": value for key, value in facts.items()}


def _write(
    path: Path, architecture: str, metadata: Mapping[str, object], tensors: Mapping[str, Tensor]
) -> None:
    writer = GGUFWriter(None, architecture)
    writer.kv_data[0].clear()
    for key, value in metadata.items():
        if value is not None:
            writer.add_key_value(key, value, _value_type(key, value))
    for name, tensor in tensors.items():
        writer.add_tensor(
            name, np.ascontiguousarray(tensor.stored), raw_dtype=_raw_type(tensor.type_name)
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _raw_type(type_name: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[type_name]


def _value_type(key: str, value: object) -> GGUFValueType:
    match value:
        case bool():
            return GGUFValueType.BOOL
        case int():
            if value < 0:
                return GGUFValueType.INT32
            return GGUFValueType.UINT32 if value < 2**32 else GGUFValueType.UINT64
        case float():
            return GGUFValueType.FLOAT32
        case str():
            return GGUFValueType.STRING
        case list():
            return GGUFValueType.ARRAY
        case _:
            raise ValueError(f"metadata {key} has a value of type {type(value).__name__}")
