"""Opening GGUF files: the same facts as gguf.GGUFReader, and every contradiction refused."""

import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from fuzz_gguf import header_fields
from gguf import GGUFReader, GGUFValueType
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import _type_traits
from support.gguf_factory import write_model
from support.paths import require_real_model, require_vocab, vocabularies

from orcd_batch.checkpoint import GGUFFile
from orcd_batch.checkpoint.ggml_types import GGML_TYPES
from orcd_batch.errors import CheckpointError, ClosedError

SMALL = {"num_layers": 1, "hidden_size": 64, "num_heads": 2, "num_kv_heads": 1}


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_model(path, tensor_type="Q8_0", intermediate_size=64, **SMALL)
    return path.read_bytes()


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "case.gguf"
    path.write_bytes(data)
    return path


def patched(data: bytes, what: str, value: int | bytes) -> bytes:
    field = header_fields(data)[what]
    raw = value if isinstance(value, bytes) else value.to_bytes(field.size, "little")
    assert len(raw) == field.size, "a patch keeps the field's size"
    return data[: field.offset] + raw + data[field.offset + field.size :]


def assert_same_as_reader(path: Path) -> None:
    reader = GGUFReader(path)
    with GGUFFile.open(path) as ours:
        theirs = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
        assert list(ours.metadata) == list(theirs)
        for key, field in theirs.items():
            if field.types[0] == GGUFValueType.ARRAY and field.types[1] != GGUFValueType.STRING:
                expected = np.concatenate([field.parts[i] for i in field.data])
                found = ours.metadata[key]
                assert isinstance(found, np.ndarray)
                np.testing.assert_array_equal(found, expected)
            else:
                assert ours.metadata[key] == field.contents(), key
        assert list(ours.tensors) == [tensor.name for tensor in reader.tensors]
        for tensor in reader.tensors:
            info = ours.tensors[tensor.name]
            assert info.shape == tuple(reversed(tensor.shape.tolist()))
            assert info.ggml_type == tensor.tensor_type.name
            assert (info.offset, info.num_bytes) == (tensor.data_offset, tensor.n_bytes)
            assert info.num_elements == tensor.n_elements
            np.testing.assert_array_equal(
                ours.raw(tensor.name), tensor.data.reshape(-1).view(np.uint8)
            )


@pytest.mark.parametrize("architecture", ["llama", "phi3", "qwen2"])
@pytest.mark.parametrize("tokenizer", ["gpt2", "llama"])
def test_small_files_read_as_gguf_reader_reads_them(
    tmp_path: Path, architecture: str, tokenizer: str
) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, architecture, tokenizer=tokenizer, tensor_type="Q4_1", **SMALL)
    assert_same_as_reader(path)


def test_the_real_model_reads_as_gguf_reader_reads_it() -> None:
    assert_same_as_reader(require_real_model())


def test_the_smallest_real_vocabulary_reads_as_gguf_reader_reads_it() -> None:
    assert_same_as_reader(require_vocab("phi-3"))


@pytest.mark.parametrize("name", vocabularies("qwen2", "llama-bpe"))
def test_a_vocabulary_of_150000_tokens_opens_within_half_a_second(name: str) -> None:
    path = require_vocab(name)
    started = time.process_time()
    with GGUFFile.open(path) as gguf:
        assert len(gguf.metadata["tokenizer.ggml.merges"]) > 150_000  # type: ignore[arg-type]
    assert time.process_time() - started < 0.5


def test_our_type_table_agrees_with_the_gguf_package() -> None:
    theirs = {t.value: (t.name, *sizes) for t, sizes in GGML_QUANT_SIZES.items()}
    ours = {n: (t.name, t.block_size, t.block_bytes) for n, t in GGML_TYPES.items()}
    assert {number: ours[number] for number in theirs} == theirs
    dequantizable = {t.name for t in _type_traits}
    runnable = {t.name for t in GGML_TYPES.values() if t.runnable}
    known = {t.name for t in GGMLQuantizationType}
    assert runnable & known == (dequantizable | {"F32", "F16"}) & known


def test_version_2_reads_like_version_3(tmp_path: Path, small_file: bytes) -> None:
    with GGUFFile.open(written(tmp_path, patched(small_file, "version", 2))) as gguf:
        assert gguf.version == 2
        assert "token_embd.weight" in gguf.tensors


def test_an_own_alignment_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "aligned.gguf"
    write_model(path, extra_metadata={"general.alignment": 32}, **SMALL)
    with GGUFFile.open(path) as gguf:
        offsets = [tensor.offset for tensor in gguf.tensors.values()]
    assert all(offset % 32 == 0 for offset in offsets)
    coarse = patched(path.read_bytes(), "value of general.alignment", 4096)
    with pytest.raises(CheckpointError, match="alignment 4096"):
        GGUFFile.open(written(tmp_path, coarse))


MALFORMED: list[tuple[str, int | bytes, str]] = [
    ("magic", b"GGML", "begins with b'GGML'"),
    ("version", 1, "version is 1"),
    ("version", 0, "version is 0"),
    ("version", b"\0\0\0\3", "big-endian"),
    ("number of tensors", 2**60, "number of tensors is"),
    ("number of tensors", 10_000_000, "number of tensors is 10000000"),
    ("number of metadata entries", 2**64 - 1, "number of metadata entries"),
    ("length of key 0", 0, "empty"),
    ("length of key 0", 70_000, "at most 65535"),
    ("text of key 0", b"\xff" * 20, "not valid UTF-8"),
    ("type of general.name", 13, "value type 13"),
    ("length of general.name", 2**63, "9223372036854775808 bytes"),
    ("value of tokenizer.ggml.add_bos_token", 2, "boolean with the value 2"),
    ("item type of tokenizer.ggml.tokens", 9, "array of arrays"),
    ("item type of tokenizer.ggml.tokens", 99, "element type 99"),
    ("count of tokenizer.ggml.tokens", 2**61, "number of strings"),
    ("count of tokenizer.ggml.token_type", 2**62, "number of values"),
    ("length of tokenizer.ggml.tokens[5]", 2**40, "string 5 of"),
    ("text of tokenizer.ggml.tokens[0]", b"\xc3\x28" + b"x" * 11, "string 0 of .* not valid UTF-8"),
    ("number of dimensions of token_embd.weight", 5, "5 dimensions"),
    ("number of dimensions of token_embd.weight", 0, "0 dimensions"),
    ("dimension 0 of token_embd.weight", 48, "not a multiple of the 32 values"),
    ("dimension 1 of token_embd.weight", 0, "dimension of size 0"),
    ("dimension 1 of token_embd.weight", 2**63, "cut short"),
    ("type of token_embd.weight", 31, "GGML type 31"),
    ("offset of blk.0.attn_q.weight", 7, "not a multiple of the alignment"),
    ("offset of blk.0.attn_q.weight", 0, "overlaps tensor"),
    ("offset of blk.0.attn_q.weight", 2**40, "cut short"),
    ("length of tensor name 0", 65, "at most 64"),
]


@pytest.mark.parametrize(("what", "value", "sentence"), MALFORMED)
def test_a_malformed_header_is_refused_in_one_sentence(
    tmp_path: Path, small_file: bytes, what: str, value: int | bytes, sentence: str
) -> None:
    path = written(tmp_path, patched(small_file, what, value))
    with pytest.raises(CheckpointError, match=sentence) as caught:
        GGUFFile.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_repeated_key_is_refused(tmp_path: Path, small_file: bytes) -> None:
    twice = small_file.replace(b"general.name", b"general.type", 1)
    with pytest.raises(CheckpointError, match=r"'general\.type' occurs twice"):
        GGUFFile.open(written(tmp_path, twice))


def test_a_repeated_tensor_is_refused(tmp_path: Path, small_file: bytes) -> None:
    twice = small_file.replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight", 1)
    with pytest.raises(CheckpointError, match="occurs twice"):
        GGUFFile.open(written(tmp_path, twice))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, small_file: bytes) -> None:
    for size in [*range(0, 400, 7), *range(400, len(small_file), 1009), len(small_file) - 32]:
        with pytest.raises(CheckpointError):
            GGUFFile.open(written(tmp_path, small_file[:size]))


def test_an_array_that_ends_in_its_last_length_is_refused(tmp_path: Path) -> None:
    key = b"names"
    data = struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, len(key)) + key
    data += struct.pack("<IIQQ", 9, 8, 2, 8) + b"01234567" + b"\0" * 7
    with pytest.raises(CheckpointError, match="ends after 1 of 2 strings"):
        GGUFFile.open(written(tmp_path, data))


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path, tmp_path / "pipe.gguf", tmp_path / "missing.gguf", Path("a\0b")):
        with pytest.raises(CheckpointError):
            GGUFFile.open(path)


def test_views_outlive_the_file_that_was_closed(tmp_path: Path, small_file: bytes) -> None:
    with GGUFFile.open(written(tmp_path, small_file)) as gguf:
        view = gguf.raw("output_norm.weight")
    assert not view.flags.writeable
    assert view.view(np.float32).shape == (64,)
    with pytest.raises(ClosedError):
        gguf.raw("output_norm.weight")
    gguf.close()


def test_an_unknown_tensor_name_is_an_error(tmp_path: Path, small_file: bytes) -> None:
    with (
        GGUFFile.open(written(tmp_path, small_file)) as gguf,
        pytest.raises(CheckpointError, match=r"no tensor 'blk\.9"),
    ):
        gguf.raw("blk.9.attn_q.weight")
