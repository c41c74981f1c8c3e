"""The model hash covers every byte that matters, and the memory of it notices a changed file."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from gguf import GGUFReader
from support.gguf_factory import write_model

from orcd_batch.checkpoint import GGUFFile
from orcd_batch.checkpoint.content_hash import cached_model_hash, model_hash, remember_model_hash
from orcd_batch.errors import ClosedError

SHAPE = {"num_layers": 1, "hidden_size": 64, "num_heads": 2, "num_kv_heads": 1}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write_model(path, **SHAPE)
    return path


def hash_of(path: Path, num_threads: int = 0) -> str:
    with GGUFFile.open(path) as gguf:
        return model_hash(gguf, num_threads)


def test_the_hash_is_the_one_the_specification_describes(model: Path) -> None:
    data = model.read_bytes()
    tensors = GGUFReader(model).tensors
    last = tensors[-1].field
    header_end = last.offset + sum(part.nbytes for part in last.parts)
    digests = [hashlib.sha256(data[:header_end]).digest()]
    for tensor in tensors:
        start = tensor.data_offset
        digests.append(hashlib.sha256(data[start : start + tensor.n_bytes]).digest())
    assert hash_of(model) == hashlib.sha256(b"".join(digests)).hexdigest()


def test_the_hash_does_not_depend_on_the_number_of_threads(model: Path) -> None:
    assert hash_of(model, 1) == hash_of(model, 3) == hash_of(model)


def test_one_changed_bit_in_header_or_data_changes_the_hash(model: Path) -> None:
    data = model.read_bytes()
    before = hash_of(model)
    for place in (data.index(b"Random llama"), len(data) - 64):
        changed = bytearray(data)
        changed[place] ^= 1
        model.write_bytes(changed)
        assert hash_of(model) != before


def test_a_closed_file_cannot_be_hashed(model: Path) -> None:
    gguf = GGUFFile.open(model)
    gguf.close()
    with pytest.raises(ClosedError):
        model_hash(gguf)


def test_a_hash_is_remembered_until_the_file_changes(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert cached_model_hash(model, cache) is None
    remember_model_hash(model, cache, "ab" * 32)
    assert cached_model_hash(model, cache) == "ab" * 32
    facts = model.stat()
    os.utime(model, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert cached_model_hash(model, cache) is None


def test_a_replaced_file_of_the_same_size_and_time_is_not_taken_for_the_old_one(
    model: Path, tmp_path: Path
) -> None:
    cache, twin = tmp_path / "cache", tmp_path / "twin.gguf"
    twin.write_bytes(model.read_bytes())
    facts = model.stat()
    os.utime(twin, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    remember_model_hash(model, cache, "ab" * 32)
    twin.replace(model)
    assert cached_model_hash(model, cache) is None


def test_a_hash_is_kept_for_the_file_that_was_opened_not_for_its_successor(
    model: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    with GGUFFile.open(model) as gguf:
        model.rename(tmp_path / "old.gguf")
        model.write_bytes(b"another file")
        remember_model_hash(model, cache, model_hash(gguf), gguf.identity)
    assert cached_model_hash(model, cache) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_hash": 3}', '{"model_hash": "ab"}'])
def test_a_damaged_memory_is_no_memory(model: Path, tmp_path: Path, text: str) -> None:
    cache = tmp_path / "cache"
    remember_model_hash(model, cache, "ab" * 32)
    (record,) = cache.rglob("*.json")
    assert json.loads(record.read_text())["size"] == model.stat().st_size
    record.write_text(text)
    assert cached_model_hash(model, cache) is None


def test_a_cache_that_cannot_be_written_is_no_error(model: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    remember_model_hash(model, blocked, "ab" * 32)
    assert cached_model_hash(model, blocked) is None
    assert cached_model_hash(tmp_path / "missing.gguf", tmp_path) is None
