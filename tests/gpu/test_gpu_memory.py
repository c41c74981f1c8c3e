"""Device memory: planned, named, and given back."""

from typing import Any

import numpy as np
import pytest

from orcd_batch.backend.ops import Batch
from orcd_batch.errors import DeviceError


def test_a_device_gives_all_its_memory_back() -> None:
    from orcd_batch.backend.cuda.device import Device

    first = Device()
    free = first.memory_info().free
    for _ in range(3):
        first.allocate(64 << 20, "weights")
    assert first.memory_by_use() == {"weights": 3 * (64 << 20)}
    assert first.memory_info().free < free
    first.close()
    second = Device()
    assert second.memory_info().free >= free
    second.close()


def test_a_batch_is_placed_as_it_is_and_over_and_over(ops: Any) -> None:
    rng = np.random.default_rng(0)
    for num_tokens in (1, 5, 300, 17):
        arrays = [
            rng.integers(0, 1000, shape).astype(np.int32)
            for shape in (num_tokens, num_tokens, num_tokens, 4, 3, (3, 9), 0)
        ]
        placed = ops.place(Batch(*arrays))
        for field, expected in zip(Batch.__slots__, arrays, strict=True):
            array = getattr(placed, field)
            assert array.shape == expected.shape
            np.testing.assert_array_equal(ops.staging.fetch(array), expected)


def test_a_frozen_workspace_refuses_a_larger_step(device: Any) -> None:
    from orcd_batch.backend.cuda.array import FP32
    from orcd_batch.backend.cuda.workspace import Workspace

    workspace = Workspace(device)
    workspace.reserve("x", 4096)
    workspace.freeze()
    assert workspace.take("x", (4, 256), FP32).ptr == workspace.take("x", (1, 256), FP32).ptr
    with pytest.raises(DeviceError, match=r"work buffer x .*max_num_batched_tokens"):
        workspace.take("x", (5, 256), FP32)


def test_a_download_larger_than_its_staging_comes_in_pieces(ops: Any) -> None:
    data = np.random.default_rng(0).standard_normal((5_000_001,), np.float32)
    (placed,) = ops.staging.place("large", [data])
    np.testing.assert_array_equal(ops.to_host(placed), data)


def test_a_kv_cache_has_the_shape_of_the_protocol_and_starts_at_zero() -> None:
    from orcd_batch.backend.cuda.ops import CudaOps

    ops = CudaOps()
    caches = ops.allocate_kv_cache(3, 5, 2, 64)
    assert len(caches) == 3
    assert ops.device.memory_by_use()["kv_cache"] == 3 * 2 * 5 * 2 * 64 * 64 * 2
    for cache in caches:
        assert cache.keys.shape == cache.values.shape == (5, 2, 64, 64)
        assert not ops.to_host(cache.values).any()
    ops.close()
    ops.close()
