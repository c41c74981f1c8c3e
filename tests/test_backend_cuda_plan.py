"""What the CUDA backend decides without a GPU: memory plan, checksums, buckets, refusals."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from orcd_batch.backend.cuda.array import FP16, DeviceArray
from orcd_batch.backend.cuda.checksum import ROW_BYTES, checksum, folded
from orcd_batch.backend.cuda.device import Device, MemoryInfo, device_unavailable_reason
from orcd_batch.backend.cuda.linear import bucket_of, buckets_up_to
from orcd_batch.backend.cuda.plan import RESERVE_BYTES, ModelShape, plan_memory
from orcd_batch.errors import DeviceError

PHI3 = ModelShape(32, 3072, 8192, 32, 32, 96, 32064, 4096)
GIB = 1 << 30


def plan(free: int, **overrides: int) -> int:
    facts = {"weight_bytes": 8 * GIB, "work_space_bytes": GIB, "max_num_blocks": 100_000}
    facts.update(overrides)
    return plan_memory(PHI3, MemoryInfo(free, 140 * GIB), utilization=0.9, **facts).num_blocks


def test_a_kv_block_of_phi3_is_393_216_bytes_a_token() -> None:
    assert PHI3.kv_block_bytes == 64 * 393_216


def test_what_is_left_after_weights_and_work_space_becomes_kv_blocks() -> None:
    left = int(80 * GIB * 0.9) - RESERVE_BYTES - 9 * GIB
    assert plan(80 * GIB) == left // PHI3.kv_block_bytes


def test_no_more_blocks_than_can_be_used() -> None:
    assert plan(80 * GIB, max_num_blocks=70) == 70


@pytest.mark.parametrize("free", [4 * GIB, 9 * GIB, 10 * GIB, 11 * GIB])
def test_too_little_memory_names_needed_and_available_bytes(free: int) -> None:
    with pytest.raises(DeviceError, match=r"[\d,]+ bytes needed, [\d,]+ of [\d,]+ available"):
        plan(free)


def chunk_checksum(data: NDArray[np.uint8]) -> int:
    return checksum(folded(data).view(np.uint8))


def random_bytes(size: int) -> NDArray[np.uint8]:
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)


@pytest.mark.parametrize("digest", [checksum, chunk_checksum])
@given(st.integers(0, 8 * 5000 - 1), st.integers(0, 8 * 5000 - 1), st.integers(0, 7))
def test_a_checksum_notices_one_or_two_flipped_bits(
    digest: Callable[[NDArray[np.uint8]], int], first: int, second: int, bit: int
) -> None:
    data = random_bytes(8 * 5000)
    expected = digest(data)
    data[first] ^= 1 << bit
    assert digest(data) != expected
    if second != first:
        data[second] ^= 1 << bit
        assert digest(data) != expected


def test_a_checksum_notices_pieces_that_changed_places() -> None:
    data = random_bytes(2 * ROW_BYTES)
    swapped = np.concatenate([data[ROW_BYTES:], data[:ROW_BYTES]])
    assert chunk_checksum(data) != chunk_checksum(swapped)
    assert checksum(data) != checksum(swapped)


@given(st.integers(1, 40_000))
def test_buckets_cover_every_row_count_once(max_rows: int) -> None:
    buckets = buckets_up_to(max_rows)
    assert buckets[0].fewest == 1
    for below, above in pairwise(buckets):
        assert above.fewest == below.most + 1
    assert buckets[-1].most == max_rows
    for num_rows in {1, max_rows, max_rows // 2 + 1}:
        bucket = bucket_of(num_rows, buckets)
        assert bucket.fewest <= num_rows <= bucket.most
    with pytest.raises(DeviceError, match="max_num_batched_tokens"):
        bucket_of(max_rows + 1, buckets)


def test_views_of_device_memory_stay_inside_it() -> None:
    array = DeviceArray(4096, (10, 3), FP16)
    assert array.rows(2, 5) == DeviceArray(4096 + 12, (3, 3), FP16)
    assert array.reshape(30).nbytes == array.nbytes == 60
    with pytest.raises(IndexError):
        array.rows(2, 11)
    with pytest.raises(ValueError, match="cannot view"):
        array.reshape(7, 4)


def test_without_a_gpu_the_reason_is_one_sentence_with_the_next_step() -> None:
    reason = device_unavailable_reason()
    if reason is None:
        pytest.skip("there is a GPU here")
    assert "engine=numpy" in reason
    assert "\n" not in reason
    with pytest.raises(DeviceError):
        Device()
