"""Sampling on the GPU: parameters up, one launch, five results a row down in one copy."""

from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orcd_batch.backend.cuda.array import FP32, INT32, DeviceArray
from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.cuda.program import Kernels
from orcd_batch.backend.cuda.staging import Download, Staging
from orcd_batch.backend.cuda.workspace import Workspace
from orcd_batch.backend.ops import SampleBatch, Sampled
from orcd_batch.errors import DeviceError

MAX_VOCAB_SIZE = 1 << 18

# As in kernels/sample.cu.
THREADS = 512
_STATIC_SHARED_BYTES = 14 << 10
_CLUSTER_CAPABILITY = (9, 0)
_FEW_PARTS_VOCAB_SIZE = 1 << 16

# In the order in which they are placed: seen_ids, whose length changes, must move no other.
_TYPES: dict[str, Any] = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repetition_penalty": np.float32,
    "seed": np.uint64,
    "stream": np.uint64,
    "position": np.uint32,
    "seen_start": np.int32,
    "seen_ids": np.int32,
}
# In the result buffer: 8-byte values first, so that all are aligned.
_RESULTS: tuple[tuple[str, np.dtype[Any]], ...] = (
    ("fingerprints", np.dtype(np.int64)),
    ("token_ids", INT32),
    ("logprobs", FP32),
    ("margins", FP32),
    ("finite", INT32),
)
_RESULT_BYTES = sum(dtype.itemsize for _, dtype in _RESULTS)


class Sampling:
    """The sampler of one device. It holds no state of its own."""

    def __init__(
        self, device: Device, kernels: Kernels, workspace: Workspace, staging: Staging
    ) -> None:
        self._device = device
        self._kernels = kernels
        self._workspace = workspace
        self._staging = staging

    @staticmethod
    def buffers(vocab_size: int, max_model_len: int, max_seqs: int) -> dict[str, int]:
        """Work buffers and their bytes at the largest step."""
        seen_bytes = 4 * max_seqs * min(vocab_size, max_model_len)
        row_bytes = sum(np.dtype(kind).itemsize for kind in _TYPES.values())
        return {
            "sample_batch": seen_bytes + (max_seqs + 1) * row_bytes + 16 * len(_TYPES),
            "sample_results": max_seqs * _RESULT_BYTES,
        }

    def place(self, batch: SampleBatch) -> SampleBatch:
        """The same parameters on the GPU: one asynchronous copy."""
        arrays = [np.ascontiguousarray(getattr(batch, name), kind) for name, kind in _TYPES.items()]
        placed = self._staging.place("sample_batch", arrays)
        return SampleBatch(**dict(zip(_TYPES, placed, strict=True)))

    def choose(self, logits: DeviceArray, batch: SampleBatch, *, generic: bool = False) -> Sampled:
        """Samples (R, V) fp32 logits with placed parameters; the results stay on the GPU.

        generic: one block per row, as on cards without clusters; the same bits but for speed.
        Raises DeviceError for a vocabulary beyond MAX_VOCAB_SIZE.
        """
        num_rows, vocab_size = logits.shape
        if vocab_size > MAX_VOCAB_SIZE:
            raise DeviceError(
                f"The vocabulary has {vocab_size:,} tokens and the GPU sampler takes up to "
                f"{MAX_VOCAB_SIZE:,}; use engine=numpy."
            )
        num_parts = 4 if vocab_size <= _FEW_PARTS_VOCAB_SIZE else 8
        part = -(-vocab_size // num_parts)
        clustered_bytes = 4 * (part + -(-part // 32))
        generic |= self._device.compute_capability < _CLUSTER_CAPABILITY
        generic |= clustered_bytes + _STATIC_SHARED_BYTES > self._device.max_shared_memory
        results = self._results(num_rows)
        if num_rows:
            kernel = self._kernels.get("sample", {"VOCAB": vocab_size, "GENERIC": int(generic)})
            parameters = [getattr(batch, field.name) for field in fields(SampleBatch)]
            names = ("token_ids", "logprobs", "margins", "fingerprints", "finite")
            args = (logits, *parameters, *(getattr(results, name) for name in names))
            grid = num_rows if generic else num_rows * num_parts
            shared_bytes = 4 * -(-vocab_size // 32) if generic else clustered_bytes
            self._kernels.launch(kernel, grid, THREADS, args, shared_bytes)
        return results

    def fetch(self, results: Sampled) -> Sampled:
        """Waits for the results and brings them to the host."""
        return self.read(self._staging.fetch(_flat(results)), results.token_ids.shape[0])

    def download(self, results: Sampled) -> Download:
        """Starts bringing the results to the host, where `read` takes them apart."""
        return self._staging.download(_flat(results))

    @staticmethod
    def read(data: NDArray[np.uint8], num_rows: int) -> Sampled:
        """The results of num_rows rows from their bytes."""
        arrays: dict[str, NDArray[Any]] = {}
        for name, offset, dtype in _layout(num_rows):
            arrays[name] = data[offset : offset + num_rows * dtype.itemsize].view(dtype)
        return Sampled(**{**arrays, "finite": arrays["finite"].astype(np.bool_)})

    def _results(self, num_rows: int) -> Sampled:
        size = (num_rows * _RESULT_BYTES,)
        buffer = self._workspace.take("sample_results", size, np.dtype(np.uint8))
        arrays = {
            name: DeviceArray(buffer.ptr + offset, (num_rows,), dtype)
            for name, offset, dtype in _layout(num_rows)
        }
        return Sampled(**arrays)


def _flat(results: Sampled) -> DeviceArray:
    """All results as one array of bytes."""
    first = getattr(results, _RESULTS[0][0])
    return DeviceArray(first.ptr, (first.shape[0] * _RESULT_BYTES,), np.dtype(np.uint8))


def _layout(num_rows: int) -> list[tuple[str, int, np.dtype[Any]]]:
    """Name, byte offset and type of each result."""
    layout, offset = [], 0
    for name, dtype in _RESULTS:
        layout.append((name, offset, dtype))
        offset += num_rows * dtype.itemsize
    return layout
