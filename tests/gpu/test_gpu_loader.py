"""Weights on the GPU equal gguf's own dequantization, rounded to fp16, whatever way they came."""

import os
from collections.abc import Iterator
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.random_blocks import draw

from orcd_batch.backend.numpy_dequantize import dequantize_rows
from orcd_batch.backend.ops import TensorPart
from orcd_batch.errors import CheckpointError, DeviceError

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
HOST_TYPES = ("Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS")


class Loading:
    """A loader on its own device, and a way to look at what it loaded."""

    def __init__(self) -> None:
        from orcd_batch.backend.cuda.device import Device
        from orcd_batch.backend.cuda.loader import Loader
        from orcd_batch.backend.cuda.program import Kernels
        from orcd_batch.backend.cuda.staging import Staging
        from orcd_batch.backend.cuda.workspace import Workspace

        self.device = Device()
        self.loader = Loader(self.device, Kernels(self.device))
        self.staging = Staging(self.device, Workspace(self.device))

    def linear(self, *parts: TensorPart) -> NDArray[Any]:
        weight = self.loader.load_linear(parts)
        self.loader.finish()
        return self.staging.fetch(weight)

    def close(self) -> None:
        self.loader.close()
        self.staging.close()
        self.device.close()


@pytest.fixture
def loading() -> Iterator[Loading]:
    opened = Loading()
    yield opened
    opened.close()


def random_part(
    tensor_type: str, rows: int, columns: int, rope_head_dim: int = 0, seed: int = 0
) -> tuple[TensorPart, NDArray[np.float32]]:
    rng = np.random.default_rng([seed, rows, columns])
    stored, values = draw(rng, (rows, columns), 0.1, tensor_type)
    data = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
    part = TensorPart(f"{tensor_type}.weight", data, tensor_type, (rows, columns), rope_head_dim)
    return part, values


def in_halves_order(values: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    heads = values.reshape(-1, head_dim, values.shape[1])
    return np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(values.shape)


@pytest.mark.parametrize("tensor_type", TYPES + HOST_TYPES)
@pytest.mark.parametrize("rows", [1, 7, 513])
def test_a_linear_equals_gguf_to_the_bit(loading: Loading, tensor_type: str, rows: int) -> None:
    part, values = random_part(tensor_type, rows, 512)
    np.testing.assert_array_equal(loading.linear(part), values.astype(np.float16))


@pytest.mark.parametrize("tensor_type", ["F16", "Q4_1", "Q6_K"])
def test_a_tensor_of_many_chunks_arrives_whole(loading: Loading, tensor_type: str) -> None:
    part, values = random_part(tensor_type, 20_011, 1024)
    np.testing.assert_array_equal(loading.linear(part), values.astype(np.float16))


def test_parts_are_stacked_and_rotated_rows_put_in_halves_order(loading: Loading) -> None:
    q, q_values = random_part("Q8_0", 256, 96, rope_head_dim=64, seed=1)
    k, k_values = random_part("F16", 128, 96, rope_head_dim=64, seed=2)
    v, v_values = random_part("F32", 128, 96, seed=3)
    expected = [in_halves_order(q_values, 64), in_halves_order(k_values, 64), v_values]
    np.testing.assert_array_equal(
        loading.linear(q, k, v), np.concatenate(expected).astype(np.float16)
    )


def test_a_vector_stays_fp32_and_follows_its_rows(loading: Loading) -> None:
    first, second = (
        TensorPart(name, values.view(np.uint8), "F32", (values.size, 1), head_dim)
        for name, values, head_dim in (
            ("attn_q.bias", np.arange(16, dtype=np.float32), 8),
            ("attn_v.bias", np.full(3, 6e4, np.float32), 0),
        )
    )
    vector = loading.loader.load_vector([first, second])
    loading.loader.finish()
    expected = [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15, *[np.float32(6e4)] * 3]
    np.testing.assert_array_equal(loading.staging.fetch(vector), np.array(expected, np.float32))


@pytest.mark.parametrize("bad", [65504.004, 65519.0, -1e9, np.inf, np.nan])
def test_a_value_beyond_fp16_is_refused_by_tensor_name_and_frees_everything(
    loading: Loading, bad: float
) -> None:
    free = loading.device.memory_info().free
    values = np.ones((300, 64), np.float32)
    values[299, 63] = bad
    good, _ = random_part("F32", 300, 64)
    part = TensorPart("blk.3.ffn_down.weight", values.reshape(-1).view(np.uint8), "F32", (300, 64))
    loading.loader.load_linear([good])
    loading.loader.load_linear([part])
    with pytest.raises(CheckpointError) as refused:
        loading.loader.finish()
    with pytest.raises(CheckpointError) as refused_by_numpy:
        dequantize_rows(part, 0, 300)
    assert str(refused.value) == str(refused_by_numpy.value)
    assert loading.device.memory_by_use() == {}
    # Compiled kernels stay in memory: less than one staging buffer.
    assert loading.device.memory_info().free >= free - (6 << 20)


def test_the_largest_fp16_values_are_accepted(loading: Loading) -> None:
    values = np.full((8, 8), 65504.0, np.float32)
    values[::2] *= -1
    part = TensorPart("w", values.reshape(-1).view(np.uint8), "F32", (8, 8))
    np.testing.assert_array_equal(loading.linear(part), values)


def test_the_first_of_many_values_beyond_fp16_is_the_one_told(loading: Loading) -> None:
    values = np.full((4096, 4096), 1e6, np.float32)
    values[0, 1] = values[4000, 0] = 1e7
    values[0, 0] = 1.0
    part = TensorPart("w", values.reshape(-1).view(np.uint8), "F32", values.shape)
    with pytest.raises(CheckpointError, match=r"'w' holds the value 10000000\.0,"):
        loading.linear(part)


def test_a_norm_weight_beyond_fp16_is_refused_as_on_numpy(loading: Loading) -> None:
    values = np.array([1.0, -7e4], np.float32)
    part = TensorPart("output_norm.weight", values.view(np.uint8), "F32", (2, 1))
    with pytest.raises(CheckpointError, match=r"'output_norm\.weight' holds the value -70000\.0"):
        loading.loader.load_vector([part])


@pytest.mark.parametrize("left", [0, 1 << 20, (8 << 20) + 5])
def test_a_file_cut_short_while_it_is_loaded_is_an_error_and_frees_everything(
    loading: Loading, tmp_path: Path, left: int
) -> None:
    part, values = random_part("F16", 4096, 2048)
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(64) + part.data.tobytes())
    with FileIO(path) as file:
        whole = replace(part, file=file, offset=64)
        np.testing.assert_array_equal(loading.linear(whole), values.astype(np.float16))
        os.truncate(path, 64 + left)
        with pytest.raises(CheckpointError, match=r"model\.gguf ends at byte .*F16\.weight"):
            loading.linear(whole)
    assert loading.device.memory_by_use() == {}


def test_bytes_that_change_on_the_way_are_noticed(
    loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orcd_batch.backend.cuda import transfer

    fill = transfer._Slot.fill

    def damaged(slot: Any, chunk: Any) -> NDArray[np.uint64]:
        expected = fill(slot, chunk)
        slot.pinned.bytes[1234] ^= 0x80
        return expected

    monkeypatch.setattr(transfer._Slot, "fill", damaged)
    part, _ = random_part("F16", 64, 64)
    loading.loader.load_linear([part])
    with pytest.raises(DeviceError, match=r"F16\.weight.*checksum"):
        loading.loader.finish()
    assert loading.device.memory_by_use() == {}


def test_a_tensor_shorter_than_its_shape_is_refused_and_frees_everything(loading: Loading) -> None:
    part, _ = random_part("Q4_K", 16, 256)
    short = TensorPart("short.weight", part.data[:-1], "Q4_K", (16, 256))
    loading.loader.load_linear([part])
    with pytest.raises(CheckpointError, match=r"short\.weight"):
        loading.loader.load_linear([short])
    assert loading.device.memory_by_use() == {}


def test_a_reader_that_fails_half_way_frees_everything(
    loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orcd_batch.backend.cuda import transfer

    def failing(slot: Any, chunk: Any) -> NDArray[np.uint64]:
        raise OSError("the disk is gone")

    monkeypatch.setattr(transfer._Slot, "fill", failing)
    part, _ = random_part("F16", 4096, 4096)
    with pytest.raises(DeviceError, match="the disk is gone"):
        loading.linear(part)
    assert loading.device.memory_by_use() == {}


def test_a_model_larger_than_the_card_names_needed_and_available_bytes(loading: Loading) -> None:
    with pytest.raises(DeviceError, match=r"bytes needed, [\d,]+ of [\d,]+ available"):
        loading.device.allocate(1 << 50, "weights")


@pytest.mark.parametrize("size", [1, 7, 8, 9, 4096 * 8, 4096 * 8 + 3, 1_000_003, 1 << 23])
def test_checksums_are_the_same_on_both_sides(ops: Any, size: int) -> None:
    from orcd_batch.backend.cuda.checksum import MAX_ROWS, ROW_WORDS, checksum, folded

    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    (placed,) = ops.staging.place("checksum_test", [data])
    (out,) = ops.staging.place("checksum_out", [np.zeros(ROW_WORDS + MAX_ROWS, np.uint64)])
    ops.kernels.launch(ops.kernels.get("checksum"), 264, 256, [placed, np.uint64(size), out])
    assert int(ops.staging.fetch(out)[0]) == checksum(data)
    ops.kernels.launch(ops.kernels.get("fold"), 16 + MAX_ROWS, 256, [placed, np.uint64(size), out])
    np.testing.assert_array_equal(ops.staging.fetch(out), folded(data))
