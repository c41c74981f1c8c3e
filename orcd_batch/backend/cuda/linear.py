"""Every matrix product of the model: one arithmetic, the fastest proven way to get it.

The canonical arithmetic is one fp32 accumulator per output over ascending k16 steps
(kernels/gemm_k16.cu). The choice of an algorithm may depend on M because every choice has those
very bits: the self-test proved it on this card for this shape and range of M.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from orcd_batch.backend.cuda.array import DeviceArray
from orcd_batch.backend.cuda.cache import cache_dir, read_json, write_json
from orcd_batch.backend.cuda.cublas import Algorithm, CublasLt
from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.cuda.few_rows import few_rows, few_rows_shape
from orcd_batch.backend.cuda.gemm_k16 import gemm_k16
from orcd_batch.backend.cuda.plan import FP32_BYTES, ModelShape
from orcd_batch.backend.cuda.product import Output
from orcd_batch.backend.cuda.program import Kernels, kernel_source
from orcd_batch.backend.cuda.self_test import Candidate, SelfTest
from orcd_batch.backend.cuda.workspace import Workspace
from orcd_batch.errors import DeviceError

# An algorithm is chosen for each of these M and used from the one before it, exclusive, on.
BUCKETS = (
    *(1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 640, 768, 896, 1024),
    *(1280, 1536, 1792, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768),
)

# Timing goes through this many bytes of weights, more than any L2 cache holds.
_ROTATION_BYTES = 256 << 20

# The code of kernels/few_rows.cu among those of cuBLASLt's algorithms.
_FEW_ROWS = "few_rows"

# N, K and what the product leaves.
Key = tuple[int, int, Output]


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
    """y = or += x wᵀ on one device. A shape is tested on first use, or by `prepare`."""

    def __init__(self, device: Device, kernels: Kernels, workspace: Workspace) -> None:
        self._device = device
        self._kernels = kernels
        self._workspace = workspace
        self._weights: dict[tuple[int, ...], list[DeviceArray]] = {}
        self._chosen: dict[tuple[Key, Bucket], Candidate | None] = {}
        self._buckets: dict[Key, tuple[Bucket, ...]] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self._library: CublasLt | None = None
        self._missing: str | None = None
        try:
            self._library = CublasLt(device)
        except DeviceError as error:
            self._missing = str(error)
        self._path = cache_dir("linear") / f"{self._identity()}.json"
        self._stored: dict[str, Any] = read_json(self._path)

    def __call__(
        self, x: DeviceArray, weight: DeviceArray, output: Output = Output.FP16
    ) -> DeviceArray:
        """(M, K) fp16, (N, K) fp16 -> (M, N), fp16 or fp32, in the work buffer of that N and type.

        Raises ValueError for Output.ADD, which is `add`'s.
        """
        if output is Output.ADD:
            raise ValueError("a product that is added to something goes through `add`")
        shape = (x.shape[0], weight.shape[0])
        candidate = self._candidate(x, weight, output)
        y = self._workspace.take(_buffer(shape[1], output), shape, output.dtype)
        self._run(candidate, x, weight, y, output)
        return y

    def add(self, x: DeviceArray, weight: DeviceArray, y: DeviceArray) -> None:
        """Adds the product to y (M, N) fp32, in one rounding after the whole sum."""
        self._run(self._candidate(x, weight, Output.ADD), x, weight, y, Output.ADD)

    def add_weight(self, weight: DeviceArray) -> None:
        """A weight that the self-test may read when it comes to this shape."""
        known = self._weights.setdefault(weight.shape, [])
        if sum(other.nbytes for other in known) < _ROTATION_BYTES:
            known.append(weight)

    def prepare(self, shape: ModelShape, max_tokens: int, max_seqs: int) -> None:
        """Chooses for steps of up to max_tokens rows, max_seqs of them with logits, among the
        weights that have been added."""
        for weight_shape, output in dict.fromkeys(_products(shape)):
            if weight_shape in self._weights:
                most = max(max_seqs, 1) if output is Output.FP32 else max_tokens
                key = (*weight_shape, output)
                self._buckets[key] = buckets_up_to(most)
                self._choose(key, self._buckets[key])

    def buffers(self, shape: ModelShape, max_tokens: int, max_seqs: int) -> dict[str, int]:
        """Work buffers and their bytes at the largest step."""
        sizes = {}
        for (n, _), output in _products(shape):
            if output is not Output.ADD:
                rows = max_seqs if output is Output.FP32 else max_tokens
                sizes[_buffer(n, output)] = rows * n * output.dtype.itemsize
        return sizes

    def candidates(self, key: Key, bucket: Bucket) -> list[Candidate]:
        """What the self-test chooses among: our own product, and cuBLASLt's without split-K."""
        n, k, output = key
        found = []
        if few_rows_shape(self._device, (n, k), bucket.most):
            found.append(self._restored(key, bucket, _FEW_ROWS, _FEW_ROWS))
        if self._library is not None:
            found += [
                self._restored(key, bucket, algorithm.code, algorithm.config)
                for algorithm in self._library.candidates(bucket.most, (n, k), output)
            ]
        return found

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

    def _candidate(self, x: DeviceArray, weight: DeviceArray, output: Output) -> Candidate | None:
        """What was chosen for so many rows; None is gemm_k16."""
        if x.shape[0] == 0:
            return None
        n, k = weight.shape
        key = (n, k, output)
        bucket = bucket_of(x.shape[0], self._buckets.get(key, _ANY_ROWS))
        if (key, bucket) not in self._chosen:
            self._weights.setdefault(weight.shape, [weight])
            self._choose(key, [bucket])
        return self._chosen[key, bucket]

    def _run(
        self,
        candidate: Candidate | None,
        x: DeviceArray,
        weight: DeviceArray,
        y: DeviceArray,
        output: Output,
    ) -> None:
        if x.shape[0] == 0:
            return
        if candidate is None:
            gemm_k16(self._kernels, x, weight, y, output)
        else:
            candidate.run(x, weight, y)

    def _choose(self, key: Key, buckets: Sequence[Bucket]) -> None:
        missing = [bucket for bucket in buckets if not self._recall(key, bucket)]
        if not missing:
            return
        n, k, output = key
        with self._test_output(missing[-1].most, n, output) as y:
            weights = self._weights[n, k]
            test = SelfTest(self._device, self._kernels, weights, y, output)
            try:
                for bucket in missing:
                    candidates = self.candidates(key, bucket)
                    found, record = test.choose(candidates, bucket.fewest, bucket.most)
                    code = found.code if found else ""
                    self._stored[_name(key, bucket)] = {"code": code, "record": record}
                    self._remember(key, bucket, found, record)
            finally:
                test.close()
        write_json(self._path, {**read_json(self._path), **self._stored})

    @contextmanager
    def _test_output(self, num_rows: int, n: int, output: Output) -> Iterator[DeviceArray]:
        """Somewhere for the self-test to write; what a product is added to holds a step's data."""
        if output is not Output.ADD:
            yield self._workspace.take(_buffer(n, output), (num_rows, n), output.dtype)
            return
        buffer = self._device.allocate(num_rows * n * FP32_BYTES, "staging")
        try:
            yield DeviceArray(buffer.ptr, (num_rows, n), output.dtype)
        finally:
            self._device.free(buffer)

    def _restored(self, key: Key, bucket: Bucket, code: str, config: Any) -> Candidate:
        """The candidate that a code stands for."""
        n, k, output = key
        if code == _FEW_ROWS:
            layout = few_rows_shape(self._device, (n, k), bucket.most)
            assert layout is not None, "few_rows was chosen where it cannot run"
            run = partial(few_rows, self._kernels, layout, output=output)
            return Candidate(code, config, run)
        assert self._library is not None, "an algorithm of a library that is missing was chosen"
        return Candidate(
            code, config, partial(self._library.run, Algorithm(code, config), output=output)
        )

    def _recall(self, key: Key, bucket: Bucket) -> bool:
        if (key, bucket) in self._chosen:
            return True
        stored = self._stored.get(_name(key, bucket))
        if not isinstance(stored, dict) or not {"code", "record"} <= stored.keys():
            return False
        code, record = stored["code"], stored["record"]
        found = self._restored(key, bucket, code, record["algorithm"]) if code else None
        self._remember(key, bucket, found, record)
        return True

    def _remember(
        self, key: Key, bucket: Bucket, candidate: Candidate | None, record: dict[str, Any]
    ) -> None:
        self._chosen[key, bucket] = candidate
        self._records[_name(key, bucket)] = record

    def _identity(self) -> str:
        """What a stored choice holds for: the card, its driver, the library, the reference."""
        device = self._device
        version = self._library.version if self._library else 0
        facts = (device.name, device.arch, device.driver_version, version)
        text = repr((facts, kernel_source("gemm_k16"), kernel_source("few_rows")))
        return f"{device.arch}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def _products(shape: ModelShape) -> tuple[tuple[tuple[int, int], Output], ...]:
    """(N, K) of every product of the model, and what it leaves."""
    qkv, attn_output, gate_up, down, head = shape.linear_shapes
    return (
        *((qkv, Output.FP16), (attn_output, Output.ADD), (gate_up, Output.FP16)),
        *((down, Output.ADD), (head, Output.FP32)),
    )


def _buffer(n: int, output: Output) -> str:
    return f"linear_{n}_{output.name.lower()}"


def _name(key: Key, bucket: Bucket) -> str:
    n, k, output = key
    return f"N={n} K={k} {output.name.lower()} M={bucket.fewest}..{bucket.most}"


_ANY_ROWS = buckets_up_to(BUCKETS[-1])
