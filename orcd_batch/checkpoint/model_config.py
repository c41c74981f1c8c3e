"""The facts of one model, read from the file and frozen."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from orcd_batch.checkpoint.architecture_facts import ArchitectureFacts, contradiction, unsupported
from orcd_batch.checkpoint.gguf_file import GGUFFile
from orcd_batch.checkpoint.header_reader import shown
from orcd_batch.checkpoint.refusals import refuse_unknown_features
from orcd_batch.checkpoint.rope_facts import check_rotary_size, rope_scaling_factor
from orcd_batch.errors import ConfigError

RopePairing = Literal["neighbours", "halves"]

SUPPORTED_ARCHITECTURES: Mapping[str, RopePairing] = MappingProxyType(
    {"llama": "neighbours", "phi3": "halves", "qwen2": "halves"}
)

# Every position up to here is exact in fp32, where rotary angles are computed.
MAX_CONTEXT_LENGTH = 2**24


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and constants of one decoder. Sizes are counts; nothing here comes from a table.

    rope_pairing: how the file's Q and K rows pair up: "neighbours" (2i, 2i+1) for `llama`,
    "halves" (i, i + head_dim/2) for `qwen2` and `phi3`. rope_scaling_factor: linear scaling,
    positions are divided by it (1.0 is off). sliding_window: key j is visible to query i when
    i - sliding_window < j <= i; 0 is off. has_rope_freqs: `rope_freqs.weight` divides frequencies.
    """

    architecture: str
    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    rope_pairing: RopePairing
    rope_scaling_factor: float
    sliding_window: int
    has_rope_freqs: bool
    tied_output: bool
    qkv_bias: bool

    @property
    def qkv_size(self) -> int:
        """Rows of the fused Q, K, V projection: (H + 2 Hkv) * D."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


def read_model_config(gguf: GGUFFile, sliding_window: int | None = None) -> ModelConfig:
    """The model's facts from the metadata; also of a vocabulary-only file, which has no tensors.

    sliding_window: None as the file says, 0 for off, else the window in tokens.
    Raises CheckpointError for an unsupported architecture or feature, a missing or contradicting
    key; ConfigError for a negative window.
    """
    architecture = supported_architecture(gguf)
    facts = ArchitectureFacts(gguf, architecture)
    hidden_size = facts.integer("embedding_length")
    num_heads = facts.integer("attention.head_count")
    head_dim = _head_dim(gguf, facts, hidden_size, num_heads)
    check_rotary_size(gguf, facts, head_dim)
    scaling_factor = rope_scaling_factor(gguf, facts)
    refuse_unknown_features(gguf, facts)
    name = gguf.metadata.get("general.name")
    return ModelConfig(
        architecture=architecture,
        name=name if isinstance(name, str) else gguf.path.stem,
        num_layers=facts.integer("block_count"),
        hidden_size=hidden_size,
        intermediate_size=facts.integer("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(gguf, facts, num_heads),
        head_dim=head_dim,
        vocab_size=_vocab_size(gguf, facts),
        context_length=_context_length(gguf, facts),
        rms_norm_eps=facts.number("attention.layer_norm_rms_epsilon"),
        rope_theta=facts.number("rope.freq_base", 10000.0, minimum=1.0),
        rope_pairing=SUPPORTED_ARCHITECTURES[architecture],
        rope_scaling_factor=scaling_factor,
        sliding_window=_sliding_window(facts, sliding_window),
        has_rope_freqs="rope_freqs.weight" in gguf.tensors,
        tied_output="output.weight" not in gguf.tensors,
        qkv_bias=any(f"blk.0.attn_{part}.bias" in gguf.tensors for part in ("qkv", "q", "k", "v")),
    )


def supported_architecture(gguf: GGUFFile) -> str:
    """`general.architecture`; raises CheckpointError where we cannot run it."""
    architecture = gguf.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in SUPPORTED_ARCHITECTURES:
        raise unsupported(
            gguf,
            f"its general.architecture is {shown(architecture)}, and the supported ones are "
            + ", ".join(SUPPORTED_ARCHITECTURES),
        )
    return architecture


def _head_dim(gguf: GGUFFile, facts: ArchitectureFacts, hidden_size: int, num_heads: int) -> int:
    if facts.get("attention.key_length") is None and hidden_size % num_heads:
        raise contradiction(
            gguf, f"embedding_length {hidden_size} is not a multiple of head_count {num_heads}"
        )
    head_dim = facts.integer("attention.key_length", hidden_size // num_heads or None)
    value_length = facts.integer("attention.value_length", head_dim)
    if value_length != head_dim:
        raise unsupported(
            gguf, f"its keys have {head_dim} values a head and its values {value_length}"
        )
    if head_dim % 2:
        raise contradiction(gguf, f"the head dimension {head_dim} is odd and cannot be rotated")
    return head_dim


def _num_kv_heads(gguf: GGUFFile, facts: ArchitectureFacts, num_heads: int) -> int:
    num_kv_heads = facts.integer("attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads:
        raise contradiction(
            gguf, f"head_count {num_heads} is not a multiple of head_count_kv {num_kv_heads}"
        )
    return num_kv_heads


def _context_length(gguf: GGUFFile, facts: ArchitectureFacts) -> int:
    context_length = facts.integer("context_length")
    if context_length > MAX_CONTEXT_LENGTH:
        raise unsupported(
            gguf, f"its context_length {context_length} is beyond {MAX_CONTEXT_LENGTH}"
        )
    return context_length


def _sliding_window(facts: ArchitectureFacts, override: int | None) -> int:
    in_file = facts.integer("attention.sliding_window", 0, minimum=0)
    if override is None:
        return in_file
    if override < 0:
        raise ConfigError(
            f"model.sliding_window is {override}; it must be 0 (off), a number of tokens, "
            "or null for what the file says."
        )
    return override


def _vocab_size(gguf: GGUFFile, facts: ArchitectureFacts) -> int:
    tokens = gguf.metadata.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list):
        raise contradiction(gguf, "tokenizer.ggml.tokens is not a list of strings")
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        return facts.integer("vocab_size", len(tokens) or None)
    rows = embedding.shape[0]
    if rows != facts.integer("vocab_size", rows):
        raise contradiction(
            gguf,
            f"token_embd.weight has {rows} rows and vocab_size is {facts.get('vocab_size')}",
        )
    if len(tokens) > rows:
        raise contradiction(
            gguf, f"token_embd.weight has {rows} rows for a vocabulary of {len(tokens)} tokens"
        )
    return rows
