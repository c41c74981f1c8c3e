"""How kernels are laid out on a card, decided without one: shared memory, grids, work buffers."""

from collections.abc import Callable
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orcd_batch.backend.cuda.array import DeviceArray
from orcd_batch.backend.cuda.attention import (
    AttentionShape,
    decode_shape,
    merge_shape,
    prefill_shape,
    shared_shape,
    wgmma_prefill_shape,
)
from orcd_batch.backend.cuda.gated_linear import swiglu
from orcd_batch.backend.cuda.kernels import ForwardKernels
from orcd_batch.backend.cuda.plan import ModelShape
from orcd_batch.backend.cuda.sampling import Sampling
from orcd_batch.backend.ops import SampleBatch
from orcd_batch.errors import DeviceError

# Shared memory per block of sm_89 and sm_120, sm_80, sm_90.
CARDS = {99 << 10: "RTX", 163 << 10: "A100", 227 << 10: "H200"}
HEADS = [(32, 32, 96), (14, 2, 64), (9, 3, 64), (32, 8, 128), (24, 1, 64), (3, 3, 16)]


def card(shared_memory: int) -> SimpleNamespace:
    return SimpleNamespace(
        name=CARDS[shared_memory],
        max_shared_memory=shared_memory,
        compute_capability=(9, 0),
        sm_count=132,
    )


@pytest.mark.parametrize("shared_memory", CARDS)
@pytest.mark.parametrize("heads", HEADS)
def test_attention_fits_every_cards_shared_memory(
    shared_memory: int, heads: tuple[int, int, int]
) -> None:
    for shape in (decode_shape(card(shared_memory), *heads, 512), prefill_shape(*heads)):
        assert 0 < shape.shared_bytes <= shared_memory
        assert 1 <= shape.num_warps <= 12
        assert shape.num_warps * (100 + heads[2]) <= 2048, "registers"
    assert merge_shape(*heads).shared_bytes == 0


def test_more_sequences_than_shared_memory_can_list_are_refused() -> None:
    with pytest.raises(DeviceError, match=r"engine\.max_num_seqs"):
        decode_shape(card(99 << 10), 32, 8, 128, 10_000)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ((2, 2, 24), "head dim is 24"),
        ((2, 2, 256), "head dim is 256"),
        ((5, 2, 64), "5 query heads"),
    ],
)
def test_heads_the_kernel_does_not_have_are_refused(
    heads: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(DeviceError, match=message):
        decode_shape(card(227 << 10), *heads, 1)
    with pytest.raises(DeviceError, match=message):
        prefill_shape(*heads)


@pytest.mark.parametrize("head_dim", range(16, 129, 16))
def test_the_prefill_with_wgmma_fits_hoppers_shared_memory(head_dim: int) -> None:
    shape = wgmma_prefill_shape(2, 2, head_dim)
    assert shape.shared_bytes <= 227 << 10
    assert shape.arch == "sm_90a"
    assert shape.threads == (shape.num_warps + 4) * 32


@pytest.mark.parametrize("head_dim", range(16, 129, 16))
@pytest.mark.parametrize("group", [1, 2, 24])
def test_shared_splits_fit_hoppers_shared_memory(head_dim: int, group: int) -> None:
    shape = shared_shape(card(227 << 10), 2 * group, 2, head_dim)
    assert shape.shared_bytes <= 227 << 10
    assert shape.num_stages >= 4, "keys and values, and the next under way"
    assert shape.threads == (shape.num_warps + 4) * 32


@given(st.integers(1, 4096), st.sampled_from(HEADS), st.sampled_from([99 << 10, 227 << 10]))
def test_decode_has_room_for_what_it_keeps(
    num_seqs: int, heads: tuple[int, int, int], shared_memory: int
) -> None:
    shape = decode_shape(card(shared_memory), *heads, num_seqs)
    rows = min(shape.group, 16)
    item_bytes = shape.partial_floats(1, 1) // (heads[1] * -(-shape.group // 16)) * 4
    tiles = shape.num_stages * (64 * 2 + rows) * heads[2] * 2
    lists = 14 * num_seqs + 4
    warp_bytes = tiles + shape.whole_runs * item_bytes
    assert shape.shared_bytes == shape.num_warps * warp_bytes + lists
    assert shape.shared_bytes + 256 <= shared_memory


@given(
    st.lists(st.integers(1, 700), min_size=1, max_size=20),
    st.sampled_from(HEADS),
    st.sampled_from([prefill_shape, wgmma_prefill_shape]),
)
def test_prefill_has_a_block_for_every_row_of_every_sequence(
    lengths: list[int],
    heads: tuple[int, int, int],
    layout: Callable[[int, int, int], AttentionShape],
) -> None:
    shape = layout(*heads)
    rows = shape.num_warps * max(shape.row_tiles, 1) * 16
    starts = np.cumsum([0, *lengths])
    # As the kernel numbers them: see first_row_block in kernels/attention_prefill.cu.
    first = [int(start) * shape.group // rows + s for s, start in enumerate(starts)]
    for s, length in enumerate(lengths):
        assert (first[s + 1] - first[s]) * rows >= length * shape.group
    assert first[-1] == shape.num_row_blocks(int(starts[-1]), len(lengths))


def test_every_model_size_is_checked_before_a_kernel_is_compiled() -> None:
    kernels = ForwardKernels()
    odd = DeviceArray(0, (3, 100), np.dtype(np.float32))
    with pytest.raises(DeviceError, match="hidden size is 100"):
        kernels.rms_norm(odd, odd, 1e-5)
    with pytest.raises(DeviceError, match="FFN size is 50"):
        swiglu(kernels, odd, DeviceArray(0, (3, 50), np.dtype(np.float16)))  # type: ignore[arg-type]


def test_the_work_space_grows_with_tokens_sequences_and_context() -> None:
    kernels = ForwardKernels()
    kernels.device = card(227 << 10)
    small = kernels.reserve_buffers(ModelShape(2, 64, 96, 4, 2, 16, 300, 512), 64, 4)
    large = kernels.reserve_buffers(ModelShape(2, 64, 96, 4, 2, 16, 300, 4096), 128, 8)
    assert all(large[name] > size for name, size in small.items() if name != "sample_batch")
    assert small["residual"] == 64 * 64 * 4
    assert small["attention_partials"] == 4 * 2 * 2 * 2 * (16 + 2) * 4


def test_sampling_knows_the_type_of_every_parameter() -> None:
    from orcd_batch.backend.cuda import sampling

    assert set(sampling._TYPES) == {field.name for field in fields(SampleBatch)}
    assert list(sampling._TYPES)[-1] == "seen_ids", "its length moves what lies behind it"
    assert Sampling.buffers(1000, 512, 4)["sample_results"] == 4 * 24
