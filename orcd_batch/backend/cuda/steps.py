"""Whole steps on the GPU: launched without waiting for results, decode steps as graph replays."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from orcd_batch.backend.cuda.array import DeviceArray
from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.cuda.graph import Graph
from orcd_batch.backend.cuda.padding import is_decode, pad_step, step_sizes
from orcd_batch.backend.cuda.placed_batch import place_batch
from orcd_batch.backend.cuda.program import Kernels, int32
from orcd_batch.backend.cuda.sampling import Sampling
from orcd_batch.backend.cuda.shared_splits import SharedSplitFinder
from orcd_batch.backend.cuda.staging import Download, Staging
from orcd_batch.backend.ops import Batch, Compute, KVCache, SampleBatch, Sampled

_THREADS = 256
COPY_THREADS = 128


@dataclass(frozen=True, slots=True)
class Launched:
    """A step whose results are on their way to the host."""

    results: Download
    num_rows: int


class WholeStep(Protocol):
    """Another way to run a decode step; see `few_rows_step.FewRowsStep`."""

    def serves(self, num_rows: int, table_width: int) -> bool: ...

    def is_proven(self, num_rows: int, table_width: int) -> bool: ...

    def prove(
        self, batch: Any, work: Callable[[], Any], results: Callable[[Any], bytes]
    ) -> None: ...

    def run(self, batch: Any, work: Callable[[], Any]) -> Any: ...


class Steps:
    """Launches steps and collects their results, in order.

    graphs: whether decode steps are padded and replayed once `prepare` has been called.
    """

    def __init__(
        self, device: Device, kernels: Kernels, staging: Staging, sampling: Sampling
    ) -> None:
        self._kernels = kernels
        self._staging = staging
        self._sampling = sampling
        self.recordings = Recordings(device)
        self.shared_splits = SharedSplitFinder()
        self._sizes: list[int] = []
        self._max_blocks = 0
        self._tokens: DeviceArray | None = None
        self.graphs = True
        self.whole: WholeStep | None = None

    def prepare(self, max_seqs: int, max_blocks: int) -> None:
        """From here on work buffers keep their addresses, so that steps can be recorded."""
        self._sizes = step_sizes(max_seqs)
        self._max_blocks = max_blocks

    def launch(
        self, compute: Compute, batch: Batch, sampling: SampleBatch | None
    ) -> Launched | None:
        """See `backend.ops.Ops.launch`."""
        key: tuple[Hashable, ...] | None = None
        if sampling is not None and self._is_recorded and is_decode(batch, sampling):
            batch, sampling = pad_step(batch, sampling, self._sizes, self._max_blocks)
            key = (compute, *batch.block_tables.shape)
        placed = place_batch(self._staging, batch, self.shared_splits.find(batch))
        if key is not None:
            key = (*key, placed.has_chunks)  # other kernels
        self._feed_back(batch.token_ids, placed.token_ids)
        parameters = None
        if sampling is not None:
            parameters = self._sampling.place(sampling)
            self._feed_back(sampling.seen_ids, parameters.seen_ids)
        work: Callable[[], Any] = partial(compute, placed, parameters)
        if key is not None:
            work = self._best(work, placed)
        sampled = self.recordings.run(key, work)
        if sampled is None:
            return None
        self._tokens = sampled.token_ids
        return Launched(self._sampling.download(sampled), sampled.token_ids.shape[0])

    def copy_blocks(self, caches: Sequence[KVCache], copies: NDArray[np.int32]) -> None:
        """See `backend.ops.Ops.copy_blocks`. The caches lie one behind the other."""
        first = caches[0].keys
        arrays = [array for cache in caches for array in (cache.keys, cache.values)]
        assert all(a.ptr == first.ptr + i * first.nbytes for i, a in enumerate(arrays)), "gaps"
        _, num_kv_heads, _, head_dim = first.shape
        defines = {"NUM_KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim, "THREADS": COPY_THREADS}
        kernel = self._kernels.get("copy_blocks", defines)
        (placed,) = self._staging.place("copies", [np.ascontiguousarray(copies, np.int32)])
        grid = (len(copies), len(arrays) * num_kv_heads)
        self._kernels.launch(kernel, grid, COPY_THREADS, (first, placed, np.int64(first.size)))

    def collect(self, launched: Launched | None) -> Sampled | None:
        """Waits for the results of a step; those of padding come last."""
        if launched is None:
            return None
        return self._sampling.read(launched.results.wait(), launched.num_rows)

    def close(self) -> None:
        """Frees the graphs. Safe to call twice."""
        self.recordings.close()

    @property
    def _is_recorded(self) -> bool:
        return self.graphs and bool(self._sizes)

    def _best(self, work: Callable[[], Any], batch: Batch) -> Callable[[], Any]:
        """The decode step as one kernel where that is possible and its first results were equal."""
        whole, (num_rows, width) = self.whole, batch.block_tables.shape
        if whole is None or not whole.serves(num_rows, width):
            return work
        if not whole.is_proven(num_rows, width):
            whole.prove(batch, work, self._results)
        return partial(whole.run, batch, work) if whole.serves(num_rows, width) else work

    def _results(self, sampled: Sampled) -> bytes:
        """What was sampled, and the fingerprints of all logits."""
        return self._sampling.download(sampled).wait().tobytes()

    def _feed_back(self, ids: NDArray[np.int32], placed: DeviceArray) -> None:
        """Puts the tokens of the step launched before in place of the ids that stand for them."""
        if not ids.size or ids.min() >= 0:
            return
        assert self._tokens is not None, "no step before this one sampled a token"
        kernel = self._kernels.get("feed_back", {"THREADS": _THREADS})
        args = (placed, self._tokens, int32(ids.size))
        self._kernels.launch(kernel, -(-ids.size // _THREADS), _THREADS, args)


class Recordings:
    """Work recorded as graphs, by key: the first time it runs as it is, which compiles and loads
    what it needs; the second time it is recorded."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._graphs: dict[Hashable, tuple[Graph, Any] | None] = {}

    def run(self, key: Hashable, work: Callable[[], Any]) -> Any:
        """Queues `work`, or replays what it queued under the same key; None is never recorded.

        Returns what `work` returned, whose arrays a replay fills again.
        """
        if key is None:
            return work()
        if key not in self._graphs:
            self._graphs[key] = None
            return work()
        recorded = self._graphs[key]
        if recorded is None:
            results: list[Any] = []
            graph = Graph(self._device, lambda: results.append(work()))
            recorded = self._graphs[key] = (graph, results[0])
        graph, result = recorded
        graph.launch()
        return result

    @property
    def num_graphs(self) -> int:
        return sum(recorded is not None for recorded in self._graphs.values())

    def close(self) -> None:
        """Frees every graph. Safe to call twice."""
        for recorded in self._graphs.values():
            if recorded is not None:
                recorded[0].close()
        self._graphs.clear()
