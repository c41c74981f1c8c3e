"""The writer of random models, checked with the `gguf` package's own reader."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants
from oracle.random_models import digest
from support.gguf_factory import write_model
from support.random_blocks import draw

TYPES = "F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_XS".split()  # noqa: SIM905


@pytest.mark.parametrize(
    ("architecture", "fused"), list(product(["llama", "phi3", "qwen2"], [None, True, False]))
)
def test_a_written_file_reads_back_with_every_tensor(
    architecture: str, fused: bool | None, tmp_path: Path
) -> None:
    tensors = write_model(tmp_path / "m.gguf", architecture, fused=fused, tied=fused is None)
    reader = GGUFReader(tmp_path / "m.gguf")
    assert {tensor.name for tensor in reader.tensors} == set(tensors)
    for tensor in reader.tensors:
        values = tensors[tensor.name]
        assert tuple(tensor.shape)[::-1] == values.shape
        assert np.array_equal(tensor.data.reshape(values.shape), values)
    assert reader.fields[f"{architecture}.embedding_length"].contents() == 128


@pytest.mark.parametrize("name", TYPES)
def test_weights_of_a_quantized_type_have_the_wanted_spread(name: str) -> None:
    stored, values = draw(np.random.default_rng(1), (96, 512), 0.05, name)
    assert values.std() == pytest.approx(0.05, rel=0.02)
    assert abs(values.mean()) < 0.01
    decoded = quants.dequantize(stored, GGMLQuantizationType[name])
    assert np.array_equal(decoded.reshape(96, 512), values)


def test_fused_and_split_files_of_one_seed_hold_the_same_rows(tmp_path: Path) -> None:
    fused = write_model(tmp_path / "fused.gguf", fused=True, qkv_bias=True)
    split = write_model(tmp_path / "split.gguf", fused=False, qkv_bias=True)
    for kind in ("weight", "bias"):
        parts = [split[f"blk.1.attn_{part}.{kind}"] for part in "qkv"]
        assert np.array_equal(fused[f"blk.1.attn_qkv.{kind}"], np.concatenate(parts))
    gate_up = [split["blk.0.ffn_gate.weight"], split["blk.0.ffn_up.weight"]]
    assert np.array_equal(fused["blk.0.ffn_up.weight"], np.concatenate(gate_up))


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    first, again, other = (
        digest(write_model(tmp_path / "m.gguf", seed=seed)) for seed in (4, 4, 5)
    )
    assert first == again != other


def test_keys_and_tensors_can_be_added_replaced_and_left_out(tmp_path: Path) -> None:
    write_model(
        tmp_path / "m.gguf",
        extra_metadata={"llama.expert_count": 8, "llama.context_length": 64},
        extra_tensors={"blk.0.attn_q_norm.weight": np.ones(32, np.float32)},
        omit=("output_norm.weight", "llama.rope.freq_base"),
    )
    reader = GGUFReader(tmp_path / "m.gguf")
    names = {tensor.name for tensor in reader.tensors}
    assert "blk.0.attn_q_norm.weight" in names
    assert "output_norm.weight" not in names
    assert "llama.rope.freq_base" not in reader.fields
    assert reader.fields["llama.expert_count"].contents() == 8
    assert reader.fields["llama.context_length"].contents() == 64


def test_a_row_that_is_no_whole_number_of_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Q4_K's block of 256"):
        write_model(tmp_path / "m.gguf", tensor_type="Q4_K")
