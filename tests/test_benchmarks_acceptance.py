"""The scripts that prove the promises on a GPU, run on a small model with the numpy engine."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.gguf_factory import write_model
from support.paths import REPO_ROOT

from orcd_batch import LlamaInferenceAdapter, SamplingParams, Tokenizer
from orcd_batch.checkpoint import GGUFFile, read_model_config, weight_map

TINY = {
    "num_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 500,
    "context_length": 256,
}
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO_ROOT / "benchmarks"))


def tiny_shape(name):
    from true_shapes import SHAPES

    shape = SHAPES[name]
    heads = HEADS if shape.num_heads != shape.num_kv_heads else HEADS | {"num_kv_heads": 4}
    return replace(shape, **TINY, **heads)


@pytest.mark.parametrize("name", ["phi3", "qwen2_5", "llama3", "smollm2"])
def test_a_made_model_is_read_with_its_shape_and_runs(name: str, tmp_path: Path):
    from make_model import make_model

    path, shape = tmp_path / "model.gguf", tiny_shape(name)
    assert make_model(path, shape) == path.stat().st_size
    with GGUFFile.open(path) as gguf:
        config = read_model_config(gguf)
        weight_map(gguf, config)
        assert "tokenizer.chat_template" in gguf.metadata
    for field in (*TINY, *HEADS, "architecture", "rope_theta"):
        assert getattr(config, field) == getattr(shape, field)
    assert config.tied_output == shape.tied
    assert config.sliding_window == 0
    assert config.has_rope_freqs == (name == "llama3")
    assert config.qkv_bias == (name == "qwen2_5")
    tokenizer = Tokenizer.from_gguf(path)
    assert tokenizer.vocab_size == shape.vocab_size
    assert tokenizer.decode(tokenizer.encode("Any text.")).strip() == "Any text."
    with LlamaInferenceAdapter.load(path, engine="numpy", max_num_seqs=2) as model:
        logits = model.prefill(list(range(5, 60)))
        (done,) = model.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert np.isfinite(logits).all()
    assert 1 < logits.std() < 8
    assert done.error is None


def test_a_made_model_has_the_same_bytes_whatever_the_number_of_threads(tmp_path: Path):
    from make_model import make_model

    shape = replace(tiny_shape("phi3"), vocab_size=20_000)
    files = []
    for threads, seed in ((1, 0), (7, 0), (2, 1)):
        files.append(tmp_path / f"{threads}.gguf")
        make_model(files[-1], shape, num_threads=threads, seed=seed)
    first, second, other = (file.read_bytes() for file in files)
    assert first == second
    assert first != other


def test_a_scaled_residual_stream_leaves_the_logits_alone(tmp_path: Path):
    from make_model import make_model

    logits = []
    for scale in (1.0, 10_000.0):
        path = tmp_path / "model.gguf"
        make_model(path, tiny_shape("phi3"), residual_scale=scale)
        with LlamaInferenceAdapter.load(path, engine="numpy", max_num_seqs=1) as model:
            logits.append(model.prefill([5, 6, 7, 8, 9]))
    np.testing.assert_allclose(logits[0], logits[1], atol=0.05)


@pytest.mark.slow
def test_every_line_of_the_bit_exactness_table_holds(tmp_path: Path, monkeypatch, capsys):
    import bit_exactness

    path = tmp_path / "tiny.gguf"
    write_model(path, num_layers=1, hidden_size=64, num_heads=2, num_kv_heads=1,
                intermediate_size=64)  # fmt: skip
    arguments = ["--engine", "numpy", "--results", str(tmp_path), "--repeats", "2"]
    arguments += ["--rows", "16", "--tokens", "4", "--job-rows", "1200"]
    monkeypatch.setattr(sys, "argv", ["bit_exactness.py", str(path), *arguments])
    with pytest.raises(SystemExit) as ended:
        bit_exactness.main()
    assert ended.value.code == 0, capsys.readouterr().out
    (stored,) = tmp_path.glob("*-cpu-bit-exactness-tiny.json")
    document = json.loads(stored.read_text())
    lines = {line["name"]: line for line in document["lines"]}
    assert len(lines) == 17
    assert lines["kill -9 and resume"]["rows"] == 1200
    assert lines["ten repeated runs"]["rows"] == 2 * 16
    assert all(line["rows"] == line["numerics_hash_equal"] > 0 for line in lines.values())


def test_one_different_bit_of_one_row_makes_a_line_fail(tmp_path: Path, monkeypatch, capsys):
    import bit_exactness

    path = tmp_path / "tiny.gguf"
    write_model(path, num_layers=1, hidden_size=64, num_heads=2, num_kv_heads=1,
                intermediate_size=64)  # fmt: skip
    trials = bit_exactness.Trials(path, "numpy", bit_exactness.Sizes(9, 3, 40, 1, 0))
    with trials._engine() as engine:
        trials._add("reference", lambda: trials._reference(engine))
    row = trials.rows[4]
    tokens, numerics = trials._expected[row.id]
    good = [(r, trials._expected[r.id]) for r in trials.rows[:4]]
    trials._add("wrong", lambda: ([*good, (row, (tokens, "0" + numerics[1:]))], ""))
    trials._add("nothing", lambda: ([], ""))
    reference, wrong, nothing = trials.lines
    assert reference.equal
    assert (wrong.rows, wrong.token_hash_equal, wrong.numerics_hash_equal) == (5, 5, 4)
    assert not wrong.equal
    assert not nothing.equal
    assert capsys.readouterr().out.count("DIFFERS") == 2
