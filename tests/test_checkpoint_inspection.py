"""What `inspect` says: of models that run, of those that do not, and of two that differ."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from support.gguf_factory import write_model
from support.paths import require_real_model, require_vocab

from orcd_batch.checkpoint.inspection import Inspection, inspect_file
from orcd_batch.checkpoint.inspection_report import as_json, render_markdown, render_terminal
from orcd_batch.checkpoint.inspection_sections import bytes_text
from orcd_batch.errors import CheckpointError, TokenizerError

SHAPE = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2}
SHAPE |= {"intermediate_size": 96, "context_length": 128}


def model(tmp_path: Path, name: str = "model.gguf", architecture: str = "llama", **options: object):
    path = tmp_path / name
    write_model(path, architecture, **(SHAPE | options))  # type: ignore[arg-type]
    return path


def terminal_text(inspection: Inspection) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render_terminal(inspection))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_real_model_has_the_numbers_of_the_specification() -> None:
    found = inspect_file(require_real_model())
    assert found.runnable
    assert (found.derived.attention, found.derived.heads_per_kv_head) == ("GQA", 3)
    assert found.derived.num_parameters == 134_515_008
    assert found.derived.fp16_bytes == 269_030_016
    assert found.derived.kv_cache_bytes_per_token == 23_040
    assert found.derived.kv_cache_bytes_full_context == 23_040 * 8192
    assert {share.ggml_type for share in found.type_shares} == {"Q4_1", "Q8_0", "F32"}
    assert sum(share.num_bytes for share in found.type_shares) == found.derived.file_bytes


def test_a_vocabulary_only_file_is_described_and_cannot_run() -> None:
    found = inspect_file(require_vocab("phi-3"))
    assert not found.runnable
    assert "a vocabulary and no weights" in found.reasons[0]
    assert found.derived.kv_cache_bytes_per_token == 393_216
    assert (found.derived.attention, found.derived.heads_per_kv_head) == ("MHA", 1)
    assert "tied_output" not in found.configuration
    text = terminal_text(found)
    assert "none: the file holds no tensors" in text
    assert "MHA, 1:1" in text


def test_an_unsupported_architecture_is_described_with_the_reason(tmp_path: Path) -> None:
    found = inspect_file(model(tmp_path, architecture="gemma2"))
    assert not found.runnable
    assert "'gemma2', and the supported ones are llama, phi3, qwen2" in found.reasons[0]
    assert found.configuration["num_heads"] == 4
    assert found.configuration["head_dim"] == 16
    assert found.derived.kv_cache_bytes_per_token == 2 * 2 * 2 * 2 * 16
    assert found.derived.num_parameters > 0


def test_a_file_without_any_facts_is_described_too(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    found = inspect_file(path)
    assert "general.architecture is None" in found.reasons[0]
    assert found.derived.attention is None
    assert "unknown" in terminal_text(found)
    assert json.loads(json.dumps(as_json(found)))["runnable"] is False


def test_a_refused_feature_is_the_reason(tmp_path: Path) -> None:
    found = inspect_file(model(tmp_path, extra_metadata={"llama.rope.scaling.type": "yarn"}))
    assert "'yarn'" in found.reasons[0]
    assert found.configuration["num_layers"] == 2


def test_further_checks_add_their_reasons(tmp_path: Path) -> None:
    def build_tokenizer(gguf: object) -> None:
        raise TokenizerError("no such tokenizer.")

    found = inspect_file(model(tmp_path), checks=[build_tokenizer])
    assert found.reasons == ("no such tokenizer.",)


def test_one_kv_head_is_multi_query_attention(tmp_path: Path) -> None:
    found = inspect_file(model(tmp_path, num_kv_heads=1))
    assert (found.derived.attention, found.derived.heads_per_kv_head) == ("MQA", 4)


def test_parameters_are_those_that_were_written(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    arrays = write_model(path, "phi3", tensor_type="Q8_0", **SHAPE)  # type: ignore[arg-type]
    found = inspect_file(path)
    assert found.derived.num_parameters == sum(array.size for array in arrays.values())
    assert found.derived.fp32_bytes == 4 * found.derived.num_parameters


def test_the_same_file_does_not_differ(tmp_path: Path) -> None:
    path = model(tmp_path)
    found = inspect_file(path, path)
    assert found.difference is not None
    assert found.difference.is_empty
    assert found.difference.num_equal_tensors == len(found.tensors)
    assert "is the same" in render_markdown(found)


def test_every_kind_of_difference_is_found(tmp_path: Path) -> None:
    here = model(tmp_path, tensor_type={"": "F32"}, rope_theta=10000.0)
    there = model(
        tmp_path,
        "other.gguf",
        tensor_type={"": "F32", "ffn_down": "Q8_0"},
        rope_theta=20000.0,
        extra_metadata={"general.author": "someone"},
        extra_tensors={"output_norm.weight": np.full(64, 2, np.float32)},
        omit=["blk.1.attn_k.weight"],
    )
    found = inspect_file(here, there).difference
    assert found is not None
    assert {item.name for item in found.configuration} == {"rope_theta"}
    metadata = {item.name: (item.here, item.there) for item in found.metadata}
    assert metadata == {
        "llama.rope.freq_base": (10000.0, 20000.0),
        "general.author": (None, "someone"),
    }
    tensors = {item.name: (item.here, item.there) for item in found.tensors}
    assert tensors["blk.0.ffn_down.weight"] == ("F32 (64, 96)", "Q8_0 (64, 96)")
    assert tensors["blk.1.attn_k.weight"] == ("F32 (32, 64)", None)
    assert tensors["output_norm.weight"] == ("F32 (64,)", "F32 (64,), other bytes")
    assert len(tensors) == 4
    assert found.num_equal_tensors == len(inspect_file(here).tensors) - 4


def test_arrays_differ_at_their_first_different_value(tmp_path: Path) -> None:
    here = model(tmp_path, extra_metadata={"x.names": ["a", "b", "c"], "x.sizes": [1, 2]})
    other = {"x.names": ["a", "B", "c"], "x.sizes": [1, 2, 3]}
    found = inspect_file(here, model(tmp_path, "other.gguf", extra_metadata=other)).difference
    assert found is not None
    shown = {item.name: (item.here, item.there) for item in found.metadata}
    assert shown["x.names"] == ("string[3] with b at 1", "string[3] with B at 1")
    assert shown["x.sizes"] == ("int32[2]", "int32[3] with 3 at 2")


def test_a_file_that_is_no_gguf_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model at all")
    with pytest.raises(CheckpointError):
        inspect_file(tmp_path / "text.gguf")
    with pytest.raises(CheckpointError):
        inspect_file(model(tmp_path), tmp_path / "text.gguf")


HOSTILE = "[red]a[/red] | `b` <c>\n\x1b[2J *d* _e_ [l](m)"


def test_what_a_file_says_is_never_taken_as_markup(tmp_path: Path) -> None:
    found = inspect_file(model(tmp_path, extra_metadata={"general.name": HOSTILE}))
    text = terminal_text(found)
    assert "[red]a[/red]" in text
    assert "\x1b" not in text
    markdown = render_markdown(found)
    assert "\x1b" not in markdown
    assert r"\[red\]a\[/red\] \| \`b\` \<c>" in markdown
    widths = {
        line.replace(r"\|", "").count("|") for line in markdown.splitlines() if line[:1] == "|"
    }
    assert widths == {3, 4, 5, 6}


def test_the_report_names_every_tensor_and_key(tmp_path: Path) -> None:
    found = inspect_file(model(tmp_path))
    for text in (render_markdown(found), terminal_text(found)):
        for name in [entry.key for entry in found.metadata] + [t.name for t in found.tensors]:
            assert name in text


def test_the_json_document_holds_no_nan(tmp_path: Path) -> None:
    path = model(tmp_path, extra_metadata={"x.value": float("nan")})
    document = json.loads(json.dumps(as_json(inspect_file(path, path)), allow_nan=False))
    assert {"key": "x.value", "value_type": "float32", "value": "nan"} in document["metadata"]
    assert document["difference"]["metadata"] == []
    assert document["tensors"][0]["shape"]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(393_216, "393,216 B"), (7_640_000_000, "7.64 GB (7,640,000,000 B)"), (0, "0 B")],
)
def test_bytes_are_shown_in_full_and_in_decimal_units(num_bytes: int, text: str) -> None:
    assert bytes_text(num_bytes) == text
