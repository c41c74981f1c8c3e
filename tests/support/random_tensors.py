"""Named random tensors in GGUF's layouts; each depends on the seed and its name only."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.random_blocks import draw, encode

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Tensor:
    """One tensor: what the file stores, the fp32 values that means, and the GGML type's name."""

    stored: NDArray[Any]
    values: Floats
    type_name: str

    @classmethod
    def of(cls, array: NDArray[Any]) -> "Tensor":
        type_name = "F16" if array.dtype == np.float16 else "F32"
        stored, values = encode(np.asarray(array, np.float32), type_name)
        return cls(stored, values, type_name)


@dataclass(frozen=True)
class RandomWeights:
    """Draws the tensors of a model; the options are those of `write_model`."""

    architecture: str
    fused: bool | None
    tied: bool
    qkv_bias: bool | None
    tensor_type: str | Mapping[str, str]
    seed: int
    weight_scale: float

    def _rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def _type_of(self, name: str) -> str:
        if isinstance(self.tensor_type, str):
            return self.tensor_type
        fitting = [part for part in self.tensor_type if part in name]
        if not fitting:
            raise ValueError(f'tensor_type names no type for {name}; add a "" entry')
        return self.tensor_type[max(fitting, key=len)]

    def matrix(self, name: str, rows: int, columns: int) -> Tensor:
        type_name = self._type_of(name)
        std = self.weight_scale / np.sqrt(columns)
        return Tensor(*draw(self._rng(name), (rows, columns), std, type_name), type_name)

    def norm(self, name: str, size: int) -> Tensor:
        noise = self._rng(name).standard_normal(size, dtype=np.float32)
        return Tensor.of(1 + np.float32(0.1) * noise)

    def bias(self, name: str, size: int) -> Tensor:
        noise = self._rng(name + ".bias").standard_normal(size, dtype=np.float32)
        return Tensor.of(np.float32(0.5) * noise)

    def layer(
        self, prefix: str, hidden: int, ffn: int, num_heads: int, num_kv_heads: int, head_dim: int
    ) -> dict[str, Tensor]:
        fused = self.architecture == "phi3" if self.fused is None else self.fused
        bias = self.architecture == "qwen2" if self.qkv_bias is None else self.qkv_bias
        heads = {"attn_q": num_heads, "attn_k": num_kv_heads, "attn_v": num_kv_heads}
        sizes = {f"{prefix}.{name}": count * head_dim for name, count in heads.items()}
        qkv = {name: self.matrix(name, size, hidden) for name, size in sizes.items()}
        biases = {name: self.bias(name, size) for name, size in sizes.items() if bias}
        ffn_in = {
            name: self.matrix(name, ffn, hidden)
            for name in (f"{prefix}.ffn_gate", f"{prefix}.ffn_up")
        }
        if fused:
            qkv = {f"{prefix}.attn_qkv": _stack(qkv)}
            biases = {f"{prefix}.attn_qkv": _stack(biases)} if bias else {}
            ffn_in = {f"{prefix}.ffn_up": _stack(ffn_in)}
        weights = {
            f"{prefix}.attn_norm": self.norm(f"{prefix}.attn_norm", hidden),
            **qkv,
            f"{prefix}.attn_output": self.matrix(
                f"{prefix}.attn_output", hidden, num_heads * head_dim
            ),
            f"{prefix}.ffn_norm": self.norm(f"{prefix}.ffn_norm", hidden),
            **ffn_in,
            f"{prefix}.ffn_down": self.matrix(f"{prefix}.ffn_down", hidden, ffn),
        }
        return {f"{name}.weight": tensor for name, tensor in weights.items()} | {
            f"{name}.bias": tensor for name, tensor in biases.items()
        }


def _stack(parts: Mapping[str, Tensor]) -> Tensor:
    tensors = list(parts.values())
    kinds = {tensor.type_name for tensor in tensors}
    if len(kinds) > 1:
        raise ValueError(f"one fused tensor cannot hold the types {sorted(kinds)}")
    return Tensor(
        np.concatenate([tensor.stored for tensor in tensors]),
        np.concatenate([tensor.values for tensor in tensors]),
        kinds.pop(),
    )
