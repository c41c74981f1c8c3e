"""The ops protocol on an NVIDIA GPU. The forward pass and sampling are in kernels.py."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orcd_batch.backend.cuda.array import FP16, DeviceArray
from orcd_batch.backend.cuda.closing import close_all
from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.cuda.few_rows_step import FewRowsStep
from orcd_batch.backend.cuda.kernels import ForwardKernels
from orcd_batch.backend.cuda.linear import Linear
from orcd_batch.backend.cuda.loader import Loader
from orcd_batch.backend.cuda.op_times import OpTimes
from orcd_batch.backend.cuda.placed_batch import PlacedBatch, batch_bytes, place_batch
from orcd_batch.backend.cuda.plan import MemoryPlan, ModelShape, plan_memory
from orcd_batch.backend.cuda.product import Output
from orcd_batch.backend.cuda.program import Kernels
from orcd_batch.backend.cuda.sampling import Sampling
from orcd_batch.backend.cuda.staging import Staging
from orcd_batch.backend.cuda.steps import Launched, Steps
from orcd_batch.backend.cuda.workspace import Workspace
from orcd_batch.backend.op_times import OpTable
from orcd_batch.backend.ops import (
    BLOCK_SIZE,
    Batch,
    Compute,
    KVCache,
    SampleBatch,
    Sampled,
    TensorPart,
)


class CudaOps(ForwardKernels):
    """Everything runs on one GPU and one stream; see `backend.ops.Ops` for what each op does.

    Order of use: `plan`, `load_*`, `allocate_kv_cache`, `prepare`, steps, `close`. Results of ops
    live in work buffers that the next step reuses. graphs: decode steps are replays of CUDA graphs.
    time_ops: keep the GPU time of every op, for the manifest; nothing is replayed then. Raises
    DeviceError when there is no usable GPU.
    """

    def __init__(self, index: int = 0, *, graphs: bool = True, time_ops: bool = False) -> None:
        self.device = Device(index)
        self.kernels = Kernels(self.device)
        self.workspace = Workspace(self.device)
        self.staging = Staging(self.device, self.workspace)
        self.sampling = Sampling(self.device, self.kernels, self.workspace, self.staging)
        self.steps = Steps(self.device, self.kernels, self.staging, self.sampling)
        self.steps.graphs = graphs
        self.caches: list[KVCache] = []
        self._few_rows_step = FewRowsStep(self)
        self.steps.whole = self._few_rows_step
        self._loader = Loader(self.device, self.kernels)
        self._linear = Linear(self.device, self.kernels, self.workspace)
        self._op_times = OpTimes(self.device) if time_ops else None
        if self._op_times is not None:
            self._op_times.watch(self)

    # Getting weights and memory in place.
    def load_linear(self, parts: Sequence[TensorPart]) -> DeviceArray:
        weight = self._loader.load_linear(parts)
        self._linear.add_weight(weight)
        return weight

    def load_vector(self, parts: Sequence[TensorPart]) -> DeviceArray:
        return self._loader.load_vector(parts)

    def load_rope_table(self, table: NDArray[np.float32]) -> DeviceArray:
        return self._loader.load_array("the rope table", np.ascontiguousarray(table, np.float32))

    def allocate_kv_cache(
        self, num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int
    ) -> list[KVCache]:
        """Raises DeviceError, with needed and available bytes, when it does not fit."""
        self.finish_loading()
        shape = (num_blocks, num_kv_heads, BLOCK_SIZE, head_dim)
        half = int(np.prod(shape)) * FP16.itemsize
        buffer = self.device.allocate(2 * num_layers * half, "kv_cache")
        self.device.fill(buffer.ptr, buffer.num_bytes)
        views = [DeviceArray(buffer.ptr + i * half, shape, FP16) for i in range(2 * num_layers)]
        self.caches = [KVCache(views[2 * i], views[2 * i + 1]) for i in range(num_layers)]
        return self.caches

    def place(self, batch: Batch) -> PlacedBatch:
        """The same batch on the GPU: one asynchronous copy of all arrays."""
        return place_batch(self.staging, batch, self.steps.shared_splits.find(batch))

    # The forward pass.
    def linear(self, x: DeviceArray, weight: DeviceArray) -> DeviceArray:
        """(T, K) fp16, (N, K) fp16 -> (T, N) fp16, each value one chain of ascending k16 steps."""
        return self._linear(x, weight, Output.FP16)

    def linear_add(self, x: DeviceArray, weight: DeviceArray, residual: DeviceArray) -> None:
        """Adds (T, K) fp16 (N, K)ᵀ into residual (T, N) fp32, in one rounding after the chain."""
        self._linear.add(x, weight, residual)

    def gated_linear(self, x: DeviceArray, weight: DeviceArray) -> DeviceArray:
        """(T, K) fp16, (2F, K) fp16, gate rows first -> (T, F) fp16: linear, then silu(g) * u."""
        return self._linear(x, weight, Output.GATED)

    def logits(self, x: DeviceArray, weight: DeviceArray) -> DeviceArray:
        """As linear, but fp32."""
        return self._linear(x, weight, Output.FP32)

    # Whole steps.
    def copy_blocks(self, caches: Sequence[KVCache], copies: NDArray[np.int32]) -> None:
        """Queues the copies ahead of the next step; caches: as `allocate_kv_cache` made them."""
        self.steps.copy_blocks(caches, copies)

    def launch(
        self, compute: Compute, batch: Batch, sampling: SampleBatch | None
    ) -> Launched | None:
        """Queues a step and the copy of its results; see `steps.Steps`."""
        return self.steps.launch(compute, batch, sampling)

    def collect(self, launched: Launched | None) -> Sampled | None:
        """Waits for a step's results; rows of padding come last."""
        return self.steps.collect(launched)

    def to_host(self, x: DeviceArray) -> NDArray[np.float32]:
        """Waits for x and copies it; fp16 comes back as fp32."""
        self._loader.wait()
        return self.staging.fetch(x).astype(np.float32, copy=False)

    def close(self) -> None:
        """Gives all memory back. Safe to call twice.

        Raises DeviceError, after closing all there is, where the GPU failed before.
        """
        parts = (self._loader, self.steps, self.staging, self._linear, self.device)
        close_all(*(part.close for part in parts))

    # Beside the protocol: start-up and what it tells.
    def plan(
        self,
        shape: ModelShape,
        *,
        weight_bytes: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        utilization: float,
        max_num_blocks: int,
    ) -> MemoryPlan:
        """How many KV blocks fit beside the weights and the largest step: see `plan_memory`."""
        buffers = self._buffers(shape, max_num_batched_tokens, max_num_seqs)
        return plan_memory(
            shape,
            self.device.memory_info(),
            weight_bytes=weight_bytes,
            work_space_bytes=sum(buffers.values()),
            utilization=utilization,
            max_num_blocks=max_num_blocks,
        )

    def finish_loading(self) -> dict[str, Any]:
        """Waits for the transfers under way and checks that every byte arrived.

        Returns the loading statistics. Raises CheckpointError for a value that fp16 cannot hold
        and DeviceError where a checksum on the GPU differs from the file's.
        """
        return self._loader.finish()

    def prepare(self, shape: ModelShape, max_num_batched_tokens: int, max_num_seqs: int) -> None:
        """Takes the work space, chooses and proves the matrix products, and freezes both.

        Afterwards no step allocates. Raises DeviceError when the work space does not fit.
        """
        self.finish_loading()
        for name, num_bytes in self._buffers(shape, max_num_batched_tokens, max_num_seqs).items():
            self.workspace.reserve(name, num_bytes)
        self._linear.prepare(shape, max_num_batched_tokens, max_num_seqs)
        self.load_decode_kernels(shape, max_num_seqs)
        self.workspace.freeze()
        if self.steps.graphs:  # only steps that are recorded run as one kernel
            self._few_rows_step.prepare(shape)
        self.steps.prepare(max_num_seqs, -(-shape.max_model_len // BLOCK_SIZE))

    def manifest(self) -> dict[str, Any]:
        """Device, driver, compiled kernels, matrix algorithms, loading and memory by use."""
        return {
            "device": self.device.name,
            "arch": self.device.arch,
            "driver": self.device.driver_version,
            "cuda": self.device.cuda_version,
            **self.kernels.manifest(),
            "linear": self._linear.manifest(),
            "few_rows_step": self._few_rows_step.manifest(),
            "loading": self._loader.statistics(),
            "memory_by_use": self.device.memory_by_use(),
            "op_times": self.op_times(),
        }

    def op_times(self) -> OpTable | None:
        """GPU time per op so far, under time_ops alone; waits for the GPU."""
        return self._op_times.summary() if self._op_times else None

    def _buffers(self, shape: ModelShape, max_tokens: int, max_seqs: int) -> dict[str, int]:
        buffers = dict(self.reserve_buffers(shape, max_tokens, max_seqs))
        buffers.update(self._linear.buffers(shape, max_tokens, max_seqs))
        max_blocks = -(-shape.max_model_len // BLOCK_SIZE)
        buffers["batch"] = batch_bytes(max_tokens, max_seqs, max_blocks)
        buffers["copies"] = 12 * max_seqs + 16
        buffers.update(self._few_rows_step.buffers(shape))
        return buffers
