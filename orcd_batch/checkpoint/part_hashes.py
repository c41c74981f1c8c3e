"""A model file's content hash together with a short hash of each of its parts, to name a change."""

import hashlib
from dataclasses import dataclass

import numpy as np

from orcd_batch.checkpoint.content_hash import part_digests
from orcd_batch.checkpoint.gguf_file import GGUFFile

_SHOWN = 16


@dataclass(frozen=True, slots=True)
class PartHashes:
    """model_hash: the file's. metadata, tensors: first 16 hex digits of a SHA-256, by name."""

    model_hash: str
    metadata: dict[str, str]
    tensors: dict[str, str]

    @classmethod
    def of(cls, gguf: GGUFFile) -> "PartHashes":
        """Reads the whole file. Raises as `content_hash.model_hash` does."""
        digests = part_digests(gguf)
        return cls(
            hashlib.sha256(b"".join(digests)).hexdigest(),
            {key: _value_hash(value) for key, value in gguf.metadata.items()},
            {
                name: f"{digest.hex()[:_SHOWN]} {tensor.ggml_type} {list(tensor.shape)}"
                for (name, tensor), digest in zip(gguf.tensors.items(), digests[1:], strict=True)
            },
        )


def _value_hash(value: object) -> str:
    """A short value stands for itself, so that a change can be read."""
    text = f"{value.dtype} {value.tobytes().hex()}" if isinstance(value, np.ndarray) else str(value)
    return text if len(text) <= 40 else hashlib.sha256(text.encode()).hexdigest()[:_SHOWN]
