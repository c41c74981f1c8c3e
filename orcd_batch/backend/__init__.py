"""Backends: the ops protocol, its numpy twin, and CUDA (imported only where one is picked)."""

from orcd_batch.backend.ops import (
    BLOCK_SIZE,
    Array,
    Batch,
    KVCache,
    Ops,
    SampleBatch,
    Sampled,
    TensorPart,
)

__all__ = [
    "BLOCK_SIZE",
    "Array",
    "Batch",
    "KVCache",
    "Ops",
    "SampleBatch",
    "Sampled",
    "TensorPart",
]
