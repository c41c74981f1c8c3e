"""Loading weights: split and fused files are one model, and sizes are known beforehand."""

from pathlib import Path

import numpy as np
import pytest
from support.gguf_factory import write_model

from orcd_batch import LlamaInferenceAdapter
from orcd_batch.backend.numpy_ops import NumpyOps
from orcd_batch.checkpoint import GGUFFile, read_model_config, weight_map
from orcd_batch.memory import available_memory_bytes
from orcd_batch.model import load_weights, weight_bytes

IDS = [5, 17, 99, 3, 3, 240]


@pytest.mark.parametrize("architecture", ["phi3", "llama", "qwen2"])
def test_a_fused_and_a_split_file_of_one_model_give_the_same_bits(
    architecture: str, tmp_path: Path
) -> None:
    logits = []
    for fused in (False, True):
        path = tmp_path / f"{fused}.gguf"
        write_model(path, architecture, fused=fused)
        with LlamaInferenceAdapter.load(path, engine="numpy", max_num_seqs=2) as model:
            logits.append(model.prefill(IDS))
    assert np.array_equal(*logits)


@pytest.mark.parametrize("tied", [True, False])
def test_the_bytes_told_beforehand_are_the_bytes_loaded(tied: bool, tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", "qwen2", tied=tied)
    ops = NumpyOps(1)
    with GGUFFile.open(tmp_path / "m.gguf") as gguf:
        config = read_model_config(gguf)
        sources = weight_map(gguf, config)
        weights = load_weights(gguf, sources, config, ops, max_model_len=64)
    ops.close()
    linears = {id(w): w for w in (weights.token_embd, weights.output)}
    loaded = [w.num_rows * w.rows.shape[1] for w in linears.values()] + [weights.output_norm.size]
    for layer in weights.layers:
        for name in layer.__slots__:
            weight = getattr(layer, name)
            rows = getattr(weight, "num_rows", None)
            loaded.append(weight.size if rows is None else rows * weight.rows.shape[1])
    assert len(linears) == (1 if tied else 2)
    assert weight_bytes(sources, config, 4) == 4 * sum(loaded)
    assert weights.rope_table.shape == (64, 2, config.head_dim // 2)


def test_free_memory_is_known() -> None:
    assert 1 << 20 < available_memory_bytes() < 1 << 50
