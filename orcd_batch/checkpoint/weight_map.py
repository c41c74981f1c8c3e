"""Which tensors of the file make up which weight, with every shape checked against the metadata."""

from dataclasses import dataclass, replace

from orcd_batch.checkpoint.architecture_facts import contradiction, unsupported
from orcd_batch.checkpoint.ggml_types import GGML_TYPE_BY_NAME
from orcd_batch.checkpoint.gguf_file import GGUFFile, TensorInfo
from orcd_batch.checkpoint.header_reader import quoted
from orcd_batch.checkpoint.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Some rows of a weight. Read them with `gguf.raw(source.tensor)`.

    tensor: a tensor of the file, or, where a fused one must be taken apart, the rows of it that
    are meant (name of the whole, own shape, offset and size). rope_head_dim: the head dim D where
    rows pair as neighbours and must be put in halves order, else 0.
    """

    tensor: TensorInfo
    rope_head_dim: int = 0


Sources = tuple[WeightSource, ...]


@dataclass(frozen=True, slots=True)
class LayerSources:
    """One layer's weights. Matrices are (out, in) once the sources are put one under the other.

    attn_norm, ffn_norm: (C,). attn_qkv: ((H + 2 Hkv) D, C). attn_qkv_bias: ((H + 2 Hkv) D,) or
    empty. attn_output: (C, H D). ffn_gate_up: (2 F, C), gate first. ffn_down: (C, F).
    """

    attn_norm: Sources
    attn_qkv: Sources
    attn_qkv_bias: Sources
    attn_output: Sources
    ffn_norm: Sources
    ffn_gate_up: Sources
    ffn_down: Sources


@dataclass(frozen=True, slots=True)
class WeightMap:
    """All weights. token_embd, output: (V, C), the same one when tied. output_norm: (C,).

    rope_freqs: (D / 2,), or empty where the file has none.
    """

    token_embd: Sources
    layers: tuple[LayerSources, ...]
    output_norm: Sources
    output: Sources
    rope_freqs: Sources


def weight_map(gguf: GGUFFile, config: ModelConfig) -> WeightMap:
    """Finds every weight of the model.

    Raises CheckpointError for a tensor that is missing, whose shape contradicts the metadata,
    whose type cannot be turned into numbers, or that no weight uses.
    """
    if not gguf.tensors:
        raise unsupported(
            gguf, "it holds a vocabulary and no weights", "name the file that has the tensors"
        )
    return _WeightFinder(gguf, config).whole_model()


class _WeightFinder:
    """Hands out tensors by name, checks them, and knows in the end which ones were left over."""

    def __init__(self, gguf: GGUFFile, config: ModelConfig) -> None:
        self._gguf = gguf
        self._config = config
        self._used: set[str] = set()

    def whole_model(self) -> WeightMap:
        config, tensors = self._config, self._gguf.tensors
        vocabulary = (config.vocab_size, config.hidden_size)
        token_embd = self._one("token_embd.weight", *vocabulary)
        found = WeightMap(
            token_embd=token_embd,
            layers=tuple(self._layer(f"blk.{layer}") for layer in range(config.num_layers)),
            output_norm=self._one("output_norm.weight", config.hidden_size),
            output=token_embd if config.tied_output else self._one("output.weight", *vocabulary),
            rope_freqs=self._one("rope_freqs.weight", config.head_dim // 2)
            if "rope_freqs.weight" in tensors
            else (),
        )
        self._refuse_unused()
        return found

    def _layer(self, prefix: str) -> LayerSources:
        config = self._config
        hidden, intermediate = config.hidden_size, config.intermediate_size
        return LayerSources(
            attn_norm=self._one(f"{prefix}.attn_norm.weight", hidden),
            attn_qkv=self._qkv(prefix, "weight", hidden),
            attn_qkv_bias=self._qkv(prefix, "bias") if config.qkv_bias else (),
            attn_output=self._one(
                f"{prefix}.attn_output.weight", hidden, config.num_heads * config.head_dim
            ),
            ffn_norm=self._one(f"{prefix}.ffn_norm.weight", hidden),
            ffn_gate_up=self._gate_up(prefix, intermediate, hidden),
            ffn_down=self._one(f"{prefix}.ffn_down.weight", hidden, intermediate),
        )

    def _qkv(self, prefix: str, part: str, *row_shape: int) -> Sources:
        """Q, K and V rows, from one tensor or three; Q and K rows are to be reordered if paired."""
        config = self._config
        rope_head_dim = config.head_dim if config.rope_pairing == "neighbours" else 0
        query_rows = config.num_heads * config.head_dim
        kv_rows = config.num_kv_heads * config.head_dim
        plan = (("q", query_rows, rope_head_dim), ("k", kv_rows, rope_head_dim), ("v", kv_rows, 0))
        fused = f"{prefix}.attn_qkv.{part}"
        if fused not in self._gguf.tensors:
            return tuple(
                WeightSource(self._take(f"{prefix}.attn_{letter}.{part}", rows, *row_shape), dim)
                for letter, rows, dim in plan
            )
        tensor = self._take(fused, config.qkv_size, *row_shape)
        if not rope_head_dim:
            return (WeightSource(tensor),)
        starts = (0, query_rows, query_rows + kv_rows)
        return tuple(
            WeightSource(self._rows(tensor, start, rows), dim)
            for start, (_, rows, dim) in zip(starts, plan, strict=True)
        )

    def _gate_up(self, prefix: str, intermediate: int, hidden: int) -> Sources:
        gate, up = f"{prefix}.ffn_gate.weight", f"{prefix}.ffn_up.weight"
        if gate not in self._gguf.tensors:
            return self._one(up, 2 * intermediate, hidden)
        return self._one(gate, intermediate, hidden) + self._one(up, intermediate, hidden)

    def _one(self, name: str, *shape: int) -> Sources:
        return (WeightSource(self._take(name, *shape)),)

    def _take(self, name: str, *shape: int) -> TensorInfo:
        tensor = self._gguf.tensors.get(name)
        if tensor is None:
            raise contradiction(
                self._gguf,
                f"the tensor {name} of shape {shape} that its metadata implies is missing",
            )
        if tensor.shape != shape:
            raise contradiction(
                self._gguf,
                f"tensor {name} should have shape {shape} by the metadata and has {tensor.shape}",
            )
        if not GGML_TYPE_BY_NAME[tensor.ggml_type].runnable:
            raise unsupported(
                self._gguf, f"tensor {name} has type {tensor.ggml_type}, which holds no weights"
            )
        self._used.add(name)
        return tensor

    def _rows(self, tensor: TensorInfo, start: int, count: int) -> TensorInfo:
        """Part of a tensor along its outermost dimension, which blocks must not straddle."""
        total = tensor.shape[0]
        offset, partial_offset = divmod(tensor.num_bytes * start, total)
        num_bytes, partial_bytes = divmod(tensor.num_bytes * count, total)
        block_bytes = GGML_TYPE_BY_NAME[tensor.ggml_type].block_bytes
        if partial_offset or partial_bytes or offset % block_bytes or num_bytes % block_bytes:
            raise unsupported(
                self._gguf,
                f"tensor {tensor.name} of type {tensor.ggml_type} cannot be cut at row {start}",
            )
        return replace(
            tensor,
            shape=(count, *tensor.shape[1:]),
            offset=tensor.offset + offset,
            num_bytes=num_bytes,
        )

    def _refuse_unused(self) -> None:
        unused = [name for name in self._gguf.tensors if name not in self._used]
        if unused:
            shown = ", ".join(quoted(name) for name in unused[:4])
            more = f" and {len(unused) - 4} more" if len(unused) > 4 else ""
            raise unsupported(
                self._gguf, f"it has tensors that this program does not use: {shown}{more}"
            )
