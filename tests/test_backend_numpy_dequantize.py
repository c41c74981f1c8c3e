"""Tensor bytes to fp32: every simple type by hand, the others against the gguf package."""

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from orcd_batch.backend.numpy_dequantize import dequantize_rows, dequantize_vector, row_chunks
from orcd_batch.backend.numpy_ops import NumpyOps
from orcd_batch.backend.ops import TensorPart
from orcd_batch.errors import CheckpointError

Floats = NDArray[np.float32]


def normal(*shape: int) -> Floats:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def part_of(values: Floats, kind: str, rope_head_dim: int = 0, name: str = "some") -> TensorPart:
    quantized = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    data = np.ascontiguousarray(quantized).reshape(-1).view(np.uint8)
    return TensorPart(name, data, kind, (values.shape[0], values.shape[1]), rope_head_dim)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_every_type_gives_what_the_gguf_package_gives(kind: str) -> None:
    values = normal(7, 64)
    kind_value = gguf.GGMLQuantizationType[kind]
    expected = gguf.quants.dequantize(gguf.quants.quantize(values, kind_value), kind_value)
    part = part_of(values, kind)
    assert np.array_equal(dequantize_rows(part, 0, 7), expected)
    assert np.array_equal(dequantize_rows(part, 2, 5), expected[2:5])


def test_a_weight_is_its_parts_one_under_the_other_padded_rows_are_zero() -> None:
    upper, lower = normal(40, 64), normal(30, 64) + 1
    ops = NumpyOps(2)
    weight = ops.load_linear([part_of(upper, "F32"), part_of(lower, "F16")])
    ops.close()
    assert weight.num_rows == 70
    assert np.array_equal(weight.rows[:40], upper)
    assert np.array_equal(weight.rows[40:70], lower.astype(np.float16).astype(np.float32))
    assert not weight.rows[70:].any()


def test_neighbouring_rows_of_a_head_are_put_in_halves_order() -> None:
    values = np.repeat(np.arange(16, dtype=np.float32)[:, None], 32, axis=1)
    got = dequantize_rows(part_of(values, "F32", rope_head_dim=8), 0, 16)[:, 0]
    assert got.tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]


def test_a_bias_is_put_in_halves_order_too() -> None:
    values = np.arange(8, dtype=np.float32)
    part = TensorPart("bias", values.view(np.uint8), "F32", (8, 1), 4)
    assert dequantize_vector(part).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_pieces_never_cut_a_head_in_two() -> None:
    part = TensorPart("q", np.zeros(0, np.uint8), "F32", (9 * 64, 70_000), 64)
    chunks = list(row_chunks(part))
    assert len(chunks) > 1
    assert all(first % 64 == 0 for first, _ in chunks)
    assert [last for _, last in chunks[:-1]] == [first for first, _ in chunks[1:]]
    assert chunks[-1][1] == 9 * 64


@pytest.mark.parametrize("bad", [65520.0, -1e30, np.inf, np.nan])
@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_a_value_outside_fp16_is_refused_by_tensor_name(kind: str, bad: float) -> None:
    values = normal(4, 32)
    values[2, 3] = bad
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_up\.weight'.*fp16"):
        dequantize_rows(part_of(values, kind, name="blk.0.ffn_up.weight"), 0, 4)


def test_the_largest_fp16_value_is_accepted() -> None:
    values = np.full((1, 32), 65504.0, np.float32)
    assert dequantize_rows(part_of(values, "F32"), 0, 1).max() == 65504.0


@pytest.mark.parametrize(
    "part",
    [
        TensorPart("odd", np.zeros(33, np.uint8), "Q8_0", (1, 32)),
        TensorPart("odd", np.zeros(35, np.uint8), "F16", (2, 8)),
        TensorPart("odd", np.zeros(64, np.uint8), "F32", (2, 7)),
        TensorPart("odd", np.zeros(64, np.uint8), "I8", (2, 32)),
        TensorPart("odd", np.zeros(64, np.uint8), "WHAT", (2, 32)),
    ],
)
def test_bytes_that_do_not_fit_their_type_are_refused_by_name(part: TensorPart) -> None:
    with pytest.raises(CheckpointError, match="'odd'"):
        dequantize_rows(part, 0, part.shape[0])
