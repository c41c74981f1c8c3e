"""From the file's tensors to the weights of one forward pass, in its canonical fused layout."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import numpy as np

from orcd_batch.backend.ops import Array, Ops, TensorPart
from orcd_batch.checkpoint.gguf_file import GGUFFile
from orcd_batch.checkpoint.model_config import ModelConfig
from orcd_batch.checkpoint.weight_map import LayerSources, WeightMap, WeightSource
from orcd_batch.model.rope import rope_table

# Called with a part's name ("token_embd", "blk.3", "output"), parts done, and parts in all.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """attn_qkv: ((H + 2 Hkv) D, C), rows of Q, K, V. ffn_gate_up: (2F, C), gate first.

    attn_qkv_bias: ((H + 2 Hkv) D,), zeros where the model has none. Q and K are in halves order.
    """

    attn_norm: Array
    attn_qkv: Array
    attn_qkv_bias: Array
    attn_output: Array
    ffn_norm: Array
    ffn_gate_up: Array
    ffn_down: Array


@dataclass(frozen=True, slots=True)
class Weights:
    """token_embd, output: (V, C), the same array when tied. rope_table: see `model.rope`."""

    token_embd: Array
    layers: tuple[LayerWeights, ...]
    output_norm: Array
    output: Array
    rope_table: Array


def load_weights(
    gguf: GGUFFile,
    weight_map: WeightMap,
    config: ModelConfig,
    ops: Ops,
    progress: Progress | None = None,
    max_model_len: int | None = None,
) -> Weights:
    """Loads every weight through `ops`; positions up to max_model_len (default: the file's) rotate.

    Raises CheckpointError, naming the tensor, for values that are not finite or outside fp16.
    """
    loader = _Loader(gguf, config, ops)
    total = config.num_layers + 2

    def report(part: str, done: int) -> None:
        if progress is not None:
            progress(part, done, total)

    token_embd = ops.load_linear(loader.parts(weight_map.token_embd))
    report("token_embd", 1)
    layers = []
    for index, sources in enumerate(weight_map.layers):
        layers.append(loader.layer(sources))
        report(f"blk.{index}", index + 2)
    output_norm = ops.load_vector(loader.parts(weight_map.output_norm))
    tied = config.tied_output
    output = token_embd if tied else ops.load_linear(loader.parts(weight_map.output))
    table = loader.rope_table(weight_map, max_model_len or config.context_length)
    report("output", total)
    return Weights(token_embd, tuple(layers), output_norm, output, table)


def weight_bytes(weight_map: WeightMap, config: ModelConfig, bytes_per_value: int) -> int:
    """Bytes of all weights at bytes_per_value each, a tied output counted once."""
    weights = [weight_map.token_embd, weight_map.output_norm]
    if not config.tied_output:
        weights.append(weight_map.output)
    for layer in weight_map.layers:
        weights.extend(getattr(layer, name) for name in layer.__slots__)
    values = sum(prod(source.tensor.shape) for sources in weights for source in sources)
    return values * bytes_per_value


class _Loader:
    def __init__(self, gguf: GGUFFile, config: ModelConfig, ops: Ops) -> None:
        self._gguf, self._config, self._ops = gguf, config, ops

    def layer(self, sources: LayerSources) -> LayerWeights:
        linear, vector = self._ops.load_linear, self._ops.load_vector
        bias = self.parts(sources.attn_qkv_bias) or [self._no_bias()]
        return LayerWeights(
            attn_norm=vector(self.parts(sources.attn_norm)),
            attn_qkv=linear(self.parts(sources.attn_qkv)),
            attn_qkv_bias=vector(bias),
            attn_output=linear(self.parts(sources.attn_output)),
            ffn_norm=vector(self.parts(sources.ffn_norm)),
            ffn_gate_up=linear(self.parts(sources.ffn_gate_up)),
            ffn_down=linear(self.parts(sources.ffn_down)),
        )

    def parts(self, sources: Iterable[WeightSource]) -> list[TensorPart]:
        return [self._part(source) for source in sources]

    def _part(self, source: WeightSource) -> TensorPart:
        tensor = source.tensor
        rows, row_length = (*tensor.shape, 1)[:2]
        return TensorPart(
            tensor.name,
            self._gguf.raw(tensor),
            tensor.ggml_type,
            (rows, row_length),
            source.rope_head_dim,
            self._gguf.file,
            tensor.offset,
        )

    def _no_bias(self) -> TensorPart:
        size = self._config.qkv_size
        return TensorPart("no bias", np.zeros(4 * size, np.uint8), "F32", (size, 1))

    def rope_table(self, weight_map: WeightMap, num_positions: int) -> Array:
        frequencies = None
        if weight_map.rope_freqs:
            vector = self._ops.load_vector(self.parts(weight_map.rope_freqs))
            frequencies = self._ops.to_host(vector)
        return self._ops.load_rope_table(rope_table(self._config, num_positions, frequencies))
