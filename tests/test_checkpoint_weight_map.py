"""Names and shapes: every layout finds its weights, and nothing in a file is left over unseen."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.gguf_factory import write_model
from support.paths import require_real_model, require_vocab

from orcd_batch.checkpoint import GGUFFile, WeightMap, WeightSource, read_model_config, weight_map
from orcd_batch.errors import CheckpointError

SHAPE = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2}
SHAPE |= {"intermediate_size": 96}


def map_of(tmp_path: Path, architecture: str, **options: object) -> tuple[WeightMap, GGUFFile]:
    path = tmp_path / "model.gguf"
    write_model(path, architecture, **(SHAPE | options))  # type: ignore[arg-type]
    gguf = GGUFFile.open(path)
    return weight_map(gguf, read_model_config(gguf)), gguf


def values(gguf: GGUFFile, sources: tuple[WeightSource, ...]) -> NDArray[np.float32]:
    """The weight of F32 sources, with rows put in halves order where a source asks for it."""
    parts = []
    for source in sources:
        rows = gguf.raw(source.tensor).view(np.float32).reshape(source.tensor.shape)
        if source.rope_head_dim:
            heads = rows.reshape(-1, source.rope_head_dim // 2, 2, *rows.shape[1:])
            rows = heads.swapaxes(1, 2).reshape(rows.shape)
        parts.append(rows)
    return np.concatenate(parts)


def with_type(path: Path, name: str, type_number: int) -> None:
    """Overwrites the type of a one-dimensional tensor in a file's header."""
    data = path.read_bytes()
    at = data.index(name.encode()) + len(name) + 4 + 8
    path.write_bytes(data[:at] + type_number.to_bytes(4, "little") + data[at + 4 :])


@pytest.mark.parametrize("architecture", ["llama", "phi3", "qwen2"])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_fused_and_split_files_give_the_same_weights(
    tmp_path: Path, architecture: str, qkv_bias: bool
) -> None:
    split, split_file = map_of(tmp_path, architecture, fused=False, qkv_bias=qkv_bias)
    (tmp_path / "fused").mkdir()
    fused, fused_file = map_of(tmp_path / "fused", architecture, fused=True, qkv_bias=qkv_bias)
    assert "blk.0.attn_qkv.weight" in fused_file.tensors
    for a, b in zip(split.layers, fused.layers, strict=True):
        for part in ("attn_qkv", "ffn_gate_up", "attn_output", "ffn_down", "attn_norm"):
            np.testing.assert_array_equal(
                values(split_file, getattr(a, part)), values(fused_file, getattr(b, part))
            )
        assert bool(a.attn_qkv_bias) is qkv_bias
        if qkv_bias:
            assert values(split_file, a.attn_qkv_bias).shape == (128,)
            np.testing.assert_array_equal(
                values(split_file, a.attn_qkv_bias), values(fused_file, b.attn_qkv_bias)
            )


def test_only_queries_and_keys_of_a_neighbours_paired_file_are_reordered(tmp_path: Path) -> None:
    found, _ = map_of(tmp_path, "llama", qkv_bias=True)
    layer = found.layers[0]
    assert [source.rope_head_dim for source in layer.attn_qkv] == [16, 16, 0]
    assert [source.rope_head_dim for source in layer.attn_qkv_bias] == [16, 16, 0]
    found, _ = map_of(tmp_path, "qwen2")
    assert [source.rope_head_dim for source in found.layers[0].attn_qkv] == [0, 0, 0]


def test_weights_are_the_arrays_that_were_written(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    arrays = write_model(path, "phi3", rope_freqs=[1.0, 2.0] * 4, **SHAPE)
    with GGUFFile.open(path) as gguf:
        found = weight_map(gguf, read_model_config(gguf))
        for name, sources in {
            "token_embd.weight": found.token_embd,
            "output.weight": found.output,
            "output_norm.weight": found.output_norm,
            "rope_freqs.weight": found.rope_freqs,
            "blk.1.attn_qkv.weight": found.layers[1].attn_qkv,
            "blk.1.ffn_up.weight": found.layers[1].ffn_gate_up,
        }.items():
            np.testing.assert_array_equal(values(gguf, sources), arrays[name])


def test_a_tied_output_is_the_embedding(tmp_path: Path) -> None:
    found, _ = map_of(tmp_path, "qwen2", tied=True)
    assert found.output == found.token_embd
    assert found.rope_freqs == ()


def test_a_quantized_fused_matrix_is_cut_between_its_rows(tmp_path: Path) -> None:
    found, gguf = map_of(tmp_path, "llama", fused=True, tensor_type="Q8_0")
    sources = found.layers[0].attn_qkv
    assert [source.tensor.num_bytes for source in sources] == [64 * 68, 32 * 68, 32 * 68]
    whole = gguf.raw("blk.0.attn_qkv.weight")
    parts = np.concatenate([gguf.raw(source.tensor) for source in sources])
    np.testing.assert_array_equal(parts, whole)


def test_a_fused_bias_is_not_cut_inside_a_block(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    heads = {"num_heads": 6, "num_kv_heads": 1, "head_dim": 16, "qkv_bias": True, "fused": True}
    write_model(path, **(SHAPE | heads))  # type: ignore[arg-type]
    with_type(path, "blk.0.attn_qkv.bias", 8)
    with (
        GGUFFile.open(path) as gguf,
        pytest.raises(CheckpointError, match=r"blk\.0\.attn_qkv\.bias .* cut at row 96"),
    ):
        weight_map(gguf, read_model_config(gguf))


def test_the_real_model_uses_every_tensor() -> None:
    with GGUFFile.open(require_real_model()) as gguf:
        found = weight_map(gguf, read_model_config(gguf))
    assert len(found.layers) == 30
    assert [s.tensor.shape for s in found.layers[0].attn_qkv] == [
        (576, 576),
        (192, 576),
        (192, 576),
    ]


def test_a_vocabulary_only_file_has_no_weights() -> None:
    with (
        GGUFFile.open(require_vocab("phi-3")) as gguf,
        pytest.raises(CheckpointError, match="a vocabulary and no weights"),
    ):
        weight_map(gguf, read_model_config(gguf))


VECTOR = np.ones(64, np.float32)
SQUARE = np.ones((64, 64), np.float32)

REFUSED: list[tuple[dict[str, object], str]] = [
    ({"omit": ["blk.1.ffn_down.weight"]}, r"tensor blk\.1\.ffn_down\.weight of shape \(64, 96\)"),
    ({"omit": ["output_norm.weight"]}, "output_norm.weight .* is missing"),
    ({"omit": ["token_embd.weight"]}, "token_embd.weight .* is missing"),
    ({"omit": ["blk.0.attn_v.bias"], "qkv_bias": True}, "blk.0.attn_v.bias .* is missing"),
    ({"extra_tensors": {"blk.0.attn_q_norm.weight": VECTOR}}, "'blk.0.attn_q_norm.weight'"),
    ({"extra_tensors": {"blk.0.attn_output.bias": VECTOR}}, "'blk.0.attn_output.bias'"),
    ({"extra_tensors": {"rope_factors_long.weight": VECTOR}}, "'rope_factors_long.weight'"),
    ({"extra_tensors": {"blk.0.ffn_gate_inp.weight": SQUARE}}, "'blk.0.ffn_gate_inp.weight'"),
    ({"extra_tensors": {"blk.2.attn_norm.weight": VECTOR}}, "'blk.2.attn_norm.weight'"),
    ({"extra_tensors": {f"x{i}": VECTOR for i in range(9)}}, "'x3' and 5 more"),
    (
        {"extra_tensors": {"output_norm.weight": SQUARE}},
        r"\(64,\) by the metadata and has \(64, 64",
    ),
    ({"extra_tensors": {"blk.0.attn_k.weight": SQUARE}}, r"shape \(32, 64\) by .* has \(64, 64\)"),
    ({"extra_metadata": {"llama.block_count": 2**31 - 1}}, "blk.2.attn_norm.weight .* is missing"),
    ({"extra_metadata": {"llama.feed_forward_length": 97}}, r"\(97, 64\).* has \(96, 64\)"),
    ({"rope_freqs": [1.0] * 9}, r"rope_freqs.weight should have shape \(8,\)"),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED)
def test_what_does_not_fit_is_refused_by_tensor_name(
    tmp_path: Path, options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        map_of(tmp_path, "llama", **options)


def test_a_tensor_type_that_holds_no_weights_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, **SHAPE)
    with_type(path, "output_norm.weight", 26)
    with (
        GGUFFile.open(path) as gguf,
        pytest.raises(CheckpointError, match=r"output_norm\.weight has type I32"),
    ):
        weight_map(gguf, read_model_config(gguf))
