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
from typing import Any

from orcd_batch.backend.cuda.array import DeviceArray
from orcd_batch.backend.cuda.cache import cache_dir, read_json, write_json
from orcd_batch.backend.cuda.candidates import Candidates
from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.cuda.gated_linear import TILES
from orcd_batch.backend.cuda.plan import FP32_BYTES, ModelShape
from orcd_batch.backend.cuda.product import Key, Output, buffer_name
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

# Kernels whose source a stored choice depends on.
_KERNELS = ("gemm_k16", "few_rows", "gated_linear_sm90a", "swiglu")


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
        self._candidates = Candidates(device, kernels, workspace)
        self._path = cache_dir("linear") / f"{self._identity()}.json"
        self._stored: dict[str, Any] = read_json(self._path)

    def __call__(
        self, x: DeviceArray, weight: DeviceArray, output: Output = Output.FP16
    ) -> DeviceArray:
        """(M, K) fp16, (N, K) fp16 -> (M, N), fp16 or fp32, in the work buffer of that N and type;
        (M, N / 2) where it is gated.

        Raises ValueError for Output.ADD, which is `add`'s.
        """
        if output is Output.ADD:
            raise ValueError("a product that is added to something goes through `add`")
        n = weight.shape[0]
        shape = (x.shape[0], output.num_columns(n))
        candidate = self._candidate(x, weight, output)
        y = self._workspace.take(buffer_name(n, output), shape, output.dtype)
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
        """Work buffers and their bytes at the largest step.

        What is gated has one for the product before, whatever will be chosen: the memory plan
        depends on no timing.
        """
        sizes = {}
        for (n, _), output in _products(shape):
            rows = max_seqs if output is Output.FP32 else max_tokens
            kept = [output] if output is not Output.ADD else []
            for left in [*kept, Output.FP16] if output is Output.GATED else kept:
                sizes[buffer_name(n, left)] = rows * left.num_columns(n) * left.dtype.itemsize
        return sizes

    def candidates(self, key: Key, bucket: Bucket) -> list[Candidate]:
        """What the self-test chooses among: our own products, and cuBLASLt's without split-K."""
        return self._candidates.offered(key, bucket.most)

    def manifest(self) -> dict[str, Any]:
        """cuBLASLt's version; for each N, K and bucket of M in use, what the self-test found."""
        return {
            "cublaslt": self._candidates.missing or self._candidates.library_version,
            "reference": "gemm_k16",
            "shapes": dict(sorted(self._records.items())),
        }

    def close(self) -> None:
        """Destroys the library handle. Safe to call twice."""
        self._candidates.close()
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
        run = candidate.run if candidate else self._candidates.reference(output)
        run(x, weight, y)

    def _choose(self, key: Key, buckets: Sequence[Bucket]) -> None:
        missing = [bucket for bucket in buckets if not self._recall(key, bucket)]
        if not missing:
            return
        n, k, output = key
        with self._test_output(missing[-1].most, n, output) as y:
            weights = self._weights[n, k]
            reference = self._candidates.reference(output)
            between = self._candidates.between(missing[-1].most, n, output)
            test = SelfTest(self._device, self._kernels, weights, y, output, reference, between)
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
            shape = (num_rows, output.num_columns(n))
            yield self._workspace.take(buffer_name(n, output), shape, output.dtype)
            return
        buffer = self._device.allocate(num_rows * n * FP32_BYTES, "staging")
        try:
            yield DeviceArray(buffer.ptr, (num_rows, n), output.dtype)
        finally:
            self._device.free(buffer)

    def _recall(self, key: Key, bucket: Bucket) -> bool:
        if (key, bucket) in self._chosen:
            return True
        stored = self._stored.get(_name(key, bucket))
        if not isinstance(stored, dict) or not {"code", "record"} <= stored.keys():
            return False
        code, record = stored["code"], stored["record"]
        found = (
            self._candidates.restored(key, bucket.most, code, record["algorithm"]) if code else None
        )
        self._remember(key, bucket, found, record)
        return True

    def _remember(
        self, key: Key, bucket: Bucket, candidate: Candidate | None, record: dict[str, Any]
    ) -> None:
        self._chosen[key, bucket] = candidate
        self._records[_name(key, bucket)] = record

    def _identity(self) -> str:
        """What a stored choice holds for: the card, its driver, library, compiler, our kernels."""
        device, version = self._device, self._candidates.library_version
        compiler = self._kernels.manifest()["nvrtc"]
        facts = (device.name, device.arch, device.driver_version, version, compiler)
        text = repr((facts, TILES, *map(kernel_source, _KERNELS)))
        return f"{device.arch}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def _products(shape: ModelShape) -> tuple[tuple[tuple[int, int], Output], ...]:
    """(N, K) of every product of the model, and what it leaves."""
    qkv, attn_output, gate_up, down, head = shape.linear_shapes
    return (
        *((qkv, Output.FP16), (attn_output, Output.ADD), (gate_up, Output.GATED)),
        *((down, Output.ADD), (head, Output.FP32)),
    )


def _name(key: Key, bucket: Bucket) -> str:
    n, k, output = key
    return f"N={n} K={k} {output.name.lower()} M={bucket.fewest}..{bucket.most}"


_ANY_ROWS = buckets_up_to(BUCKETS[-1])
