"""Every matrix product of the model: one arithmetic, the fastest proven way to get it.

The canonical arithmetic is one fp32 accumulator per output over ascending k16 steps
(kernels/gemm_k16.cu). The choice of an algorithm may depend on M because every choice has those
very bits: the self-test proved it on this card for this shape and range of M.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orcd_batch.backend.cuda.array import FP32, DeviceArray
from orcd_batch.backend.cuda.cache import cache_dir, read_json, write_json
from orcd_batch.backend.cuda.cublas import Algorithm, CublasLt
from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.cuda.gemm_k16 import gemm_k16
from orcd_batch.backend.cuda.plan import FP32_BYTES, ModelShape
from orcd_batch.backend.cuda.program import Kernels, kernel_source
from orcd_batch.backend.cuda.self_test import SelfTest
from orcd_batch.backend.cuda.workspace import Workspace
from orcd_batch.errors import DeviceError

# An algorithm is chosen for each of these M and used from the one before it, exclusive, on.
BUCKETS = (
    *(1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048),
    *(3072, 4096, 6144, 8192, 12288, 16384, 32768),
)

# Timing goes through this many bytes of weights, more than any L2 cache holds.
_ROTATION_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Bucket:
    """Row counts from `fewest` to `most`, which one algorithm serves."""

    fewest: int
    most: int


def buckets_up_to(max_rows: int) -> tuple[Bucket, ...]:
    """The buckets of 1 … max_rows, without gaps; the last one ends at max_rows."""
    ends = [*(end for end in BUCKETS if end < max_rows), max_rows]
    return tuple(Bucket(below + 1, end) for below, end in zip([0, *ends[:-1]], ends, strict=True))


def bucket_of(num_rows: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket that holds num_rows. Raises DeviceError beyond the last one."""
    index = bisect_left(buckets, num_rows, key=lambda bucket: bucket.most)
    if index == len(buckets):
        raise DeviceError(
            f"A step has {num_rows} rows and the matrix products were prepared for "
            f"{buckets[-1].most}: the step is larger than engine.max_num_batched_tokens allows."
        )
    return buckets[index]


class Linear:
    """y = x wᵀ on one device. A shape is tested on first use, or by `prepare`."""

    def __init__(self, device: Device, kernels: Kernels, workspace: Workspace) -> None:
        self._device = device
        self._kernels = kernels
        self._workspace = workspace
        self._weights: dict[tuple[int, ...], list[DeviceArray]] = {}
        self._chosen: dict[tuple[int, int, Bucket], Algorithm | None] = {}
        self._buckets: dict[tuple[int, ...], tuple[Bucket, ...]] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self._library: CublasLt | None = None
        self._missing: str | None = None
        try:
            self._library = CublasLt(device)
        except DeviceError as error:
            self._missing = str(error)
        self._path = cache_dir("linear") / f"{self._identity()}.json"
        self._stored: dict[str, Any] = read_json(self._path)

    def __call__(self, x: DeviceArray, weight: DeviceArray) -> DeviceArray:
        """(M, K) fp16, (N, K) fp16 -> (M, N) fp32 in the work buffer of that N."""
        num_rows, (n, k) = x.shape[0], weight.shape
        y = self._workspace.take(f"linear_{n}", (num_rows, n), FP32)
        if num_rows == 0:
            return y
        bucket = bucket_of(num_rows, self._buckets.get((n, k), _ANY_ROWS))
        if (n, k, bucket) not in self._chosen:
            self._weights.setdefault((n, k), [weight])
            self._choose((n, k), [bucket])
            y = self._workspace.take(f"linear_{n}", (num_rows, n), FP32)
        algorithm = self._chosen[n, k, bucket]
        if algorithm is None or self._library is None:
            gemm_k16(self._kernels, x, weight, y)
        else:
            self._library.run(algorithm, x, weight, y)
        return y

    def add_weight(self, weight: DeviceArray) -> None:
        """A weight that the self-test may read when it comes to this shape."""
        known = self._weights.setdefault(weight.shape, [])
        if sum(other.nbytes for other in known) < _ROTATION_BYTES:
            known.append(weight)

    def prepare(self, shapes: Sequence[tuple[int, int]], max_rows: int) -> None:
        """Chooses for up to max_rows rows of each (N, K) whose weights have been added."""
        for shape in dict.fromkeys(shapes):
            if shape in self._weights:
                self._buckets[shape] = buckets_up_to(max_rows)
                self._choose(shape, self._buckets[shape])

    def buffers(self, shape: ModelShape, max_tokens: int, max_seqs: int) -> dict[str, int]:
        """Work buffers and their bytes at the largest step."""
        *layers, (vocab, _) = shape.linear_shapes
        sizes = {f"linear_{n}": max_tokens * n * FP32_BYTES for n, _ in layers}
        logits = max_seqs * vocab * FP32_BYTES
        sizes[f"linear_{vocab}"] = max(logits, sizes.get(f"linear_{vocab}", 0))
        return sizes

    def manifest(self) -> dict[str, Any]:
        """cuBLASLt's version; for each N, K and bucket of M in use, what the self-test found."""
        return {
            "cublaslt": self._library.version if self._library else self._missing,
            "reference": "gemm_k16",
            "shapes": dict(sorted(self._records.items())),
        }

    def close(self) -> None:
        """Destroys the library handle. Safe to call twice."""
        if self._library is not None:
            self._library.close()
        self._weights.clear()

    def _choose(self, shape: tuple[int, int], buckets: Sequence[Bucket]) -> None:
        missing = [bucket for bucket in buckets if not self._recall(shape, bucket)]
        if not missing:
            return
        if self._library is None:
            for bucket in missing:
                self._remember(shape, bucket, None, {"algorithm": "gemm_k16"})
            return
        most = missing[-1].most
        y = self._workspace.take(f"linear_{shape[0]}", (most, shape[0]), FP32)
        test = SelfTest(self._device, self._kernels, self._weights[shape], y)
        try:
            for bucket in missing:
                algorithm, record = test.choose(self._library, bucket.fewest, bucket.most)
                code = algorithm.code if algorithm else ""
                self._stored[_name(shape, bucket)] = {"code": code, "record": record}
                self._remember(shape, bucket, algorithm, record)
        finally:
            test.close()
        write_json(self._path, {**read_json(self._path), **self._stored})

    def _recall(self, shape: tuple[int, int], bucket: Bucket) -> bool:
        if (*shape, bucket) in self._chosen:
            return True
        stored = self._stored.get(_name(shape, bucket))
        if not isinstance(stored, dict) or not {"code", "record"} <= stored.keys():
            return False
        code, record = stored["code"], stored["record"]
        algorithm = Algorithm(code, record["algorithm"]) if code else None
        self._remember(shape, bucket, algorithm, record)
        return True

    def _remember(
        self,
        shape: tuple[int, int],
        bucket: Bucket,
        algorithm: Algorithm | None,
        record: dict[str, Any],
    ) -> None:
        self._chosen[*shape, bucket] = algorithm
        self._records[_name(shape, bucket)] = record

    def _identity(self) -> str:
        """What a stored choice holds for: the card, its driver, the library, the reference."""
        device = self._device
        version = self._library.version if self._library else 0
        facts = (device.name, device.arch, device.driver_version, version)
        text = repr((facts, kernel_source("gemm_k16")))
        return f"{device.arch}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def _name(shape: tuple[int, int], bucket: Bucket) -> str:
    return f"N={shape[0]} K={shape[1]} M={bucket.fewest}..{bucket.most}"


_ANY_ROWS = buckets_up_to(BUCKETS[-1])
