"""A metadata analysis of one GGUF file, as plain facts: what `orcd-batch inspect` shows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from orcd_batch.checkpoint.architecture_facts import ArchitectureFacts
from orcd_batch.checkpoint.gguf_file import GGUFFile, TensorInfo
from orcd_batch.checkpoint.inspection_difference import Difference, file_difference
from orcd_batch.checkpoint.inspection_facts import Scalar, TypeShare, shown_scalar, type_shares
from orcd_batch.checkpoint.model_config import read_model_config
from orcd_batch.checkpoint.weight_map import weight_map
from orcd_batch.errors import CheckpointError, OrcdError

_FP16_BYTES, _FP32_BYTES = 2, 4
_FACTS_OF_TENSORS = ("has_rope_freqs", "tied_output", "qkv_bias")


@dataclass(frozen=True, slots=True)
class MetadataEntry:
    """One key. value_type: in words, such as "string[49152]". value: arrays in summary."""

    key: str
    value_type: str
    value: Scalar


@dataclass(frozen=True, slots=True)
class DerivedFacts:
    """What follows from the configuration and the tensors; None where the file does not say.

    attention: "MHA" (as many KV heads as query heads), "GQA" or "MQA" (one KV head).
    heads_per_kv_head: query heads that share one KV head. file_bytes: tensors as stored; fp16 and
    fp32_bytes: the same parameters in those types. KV cache: keys and values of all layers, fp16.
    """

    attention: str | None
    heads_per_kv_head: int | None
    num_parameters: int
    file_bytes: int
    fp16_bytes: int
    fp32_bytes: int
    bits_per_parameter: float | None
    kv_cache_bytes_per_token: int | None
    kv_cache_bytes_full_context: int | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """Everything about one file. reasons: why this program cannot run it; empty when it can.

    configuration: ModelConfig's fields by name, or, of a model that cannot be run, those that the
    file tells. type_shares: what each tensor type contributes.
    """

    path: str
    size_bytes: int
    version: int
    architecture: str | None
    name: str | None
    reasons: tuple[str, ...]
    configuration: dict[str, Scalar]
    derived: DerivedFacts
    metadata: tuple[MetadataEntry, ...]
    type_shares: tuple[TypeShare, ...]
    tensors: tuple[TensorInfo, ...]
    difference: Difference | None

    @property
    def runnable(self) -> bool:
        return not self.reasons


def inspect_file(
    path: str | Path,
    other: str | Path | None = None,
    checks: Sequence[Callable[[GGUFFile], object]] = (),
) -> Inspection:
    """Opens one file, and a second one to compare it with, and gathers the facts.

    checks: what else has to work for the file to be run, such as building its tokenizer; an
    OrcdError they raise becomes a reason. Raises CheckpointError for a file that is no valid
    GGUF; one that is valid but cannot be run is described all the same.
    """
    with GGUFFile.open(path) as gguf:
        configuration, reasons = _configuration(gguf)
        for check in checks:
            reasons += _reason(check, gguf)
        return Inspection(
            path=str(path),
            size_bytes=gguf.identity.size,
            version=gguf.version,
            architecture=_text(gguf, "general.architecture"),
            name=_text(gguf, "general.name"),
            reasons=tuple(reasons),
            configuration=configuration,
            derived=_derived(gguf, configuration),
            metadata=tuple(
                MetadataEntry(key, gguf.value_types[key], shown_scalar(value))
                for key, value in gguf.metadata.items()
            ),
            type_shares=type_shares(gguf.tensors.values()),
            tensors=tuple(gguf.tensors.values()),
            difference=None if other is None else _difference(gguf, configuration, other),
        )


def _difference(gguf: GGUFFile, here: dict[str, Scalar], other: str | Path) -> Difference:
    with GGUFFile.open(other) as second:
        there, _ = _configuration(second)
        return file_difference(gguf, here, second, there)


def _configuration(gguf: GGUFFile) -> tuple[dict[str, Scalar], list[str]]:
    """The configuration as far as it can be read, and why the model cannot be run."""
    try:
        config = read_model_config(gguf)
    except CheckpointError as error:
        return _readable_configuration(gguf), [str(error)]
    configuration = asdict(config)
    if not gguf.tensors:
        for name in _FACTS_OF_TENSORS:
            del configuration[name]
    return configuration, _reason(lambda gguf: weight_map(gguf, config), gguf)


def _reason(check: Callable[[GGUFFile], object], gguf: GGUFFile) -> list[str]:
    try:
        check(gguf)
    except OrcdError as error:
        return [str(error)]
    return []


def _readable_configuration(gguf: GGUFFile) -> dict[str, Scalar]:
    facts = ArchitectureFacts(gguf, _text(gguf, "general.architecture") or "")
    keys = {
        "num_layers": "block_count",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_heads": "attention.head_count",
        "num_kv_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "vocab_size": "vocab_size",
        "context_length": "context_length",
    }
    readable: dict[str, Scalar] = {}
    for name, key in keys.items():
        try:
            readable[name] = facts.integer(key)
        except CheckpointError:
            continue
    hidden_size, num_heads = readable.get("hidden_size"), readable.get("num_heads")
    if isinstance(num_heads, int):
        readable.setdefault("num_kv_heads", num_heads)
        if isinstance(hidden_size, int) and hidden_size % num_heads == 0:
            readable.setdefault("head_dim", hidden_size // num_heads)
    return readable


def _derived(gguf: GGUFFile, configuration: dict[str, Scalar]) -> DerivedFacts:
    num_parameters = sum(tensor.num_elements for tensor in gguf.tensors.values())
    file_bytes = sum(tensor.num_bytes for tensor in gguf.tensors.values())
    attention, ratio = _attention(configuration)
    per_token = _product(configuration, "num_layers", "num_kv_heads", "head_dim")
    per_token = None if per_token is None else 2 * _FP16_BYTES * per_token
    context_length = _product(configuration, "context_length")
    full = None if per_token is None or context_length is None else per_token * context_length
    return DerivedFacts(
        attention=attention,
        heads_per_kv_head=ratio,
        num_parameters=num_parameters,
        file_bytes=file_bytes,
        fp16_bytes=num_parameters * _FP16_BYTES,
        fp32_bytes=num_parameters * _FP32_BYTES,
        bits_per_parameter=8 * file_bytes / num_parameters if num_parameters else None,
        kv_cache_bytes_per_token=per_token,
        kv_cache_bytes_full_context=full,
    )


def _attention(configuration: dict[str, Scalar]) -> tuple[str | None, int | None]:
    num_heads = _product(configuration, "num_heads")
    num_kv_heads = _product(configuration, "num_kv_heads")
    if num_heads is None or num_kv_heads is None or num_heads % num_kv_heads:
        return None, None
    ratio = num_heads // num_kv_heads
    if ratio == 1:
        return "MHA", 1
    return ("MQA" if num_kv_heads == 1 else "GQA"), ratio


def _product(configuration: dict[str, Scalar], *names: str) -> int | None:
    factors = [configuration.get(name) for name in names]
    counts = [factor for factor in factors if isinstance(factor, int)]
    return math.prod(counts) if len(counts) == len(names) else None


def _text(gguf: GGUFFile, key: str) -> str | None:
    value = gguf.metadata.get(key)
    return value if isinstance(value, str) else None
