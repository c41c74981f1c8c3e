"""Real vocabularies, id for id against llama.cpp. They are not committed; without them: skipped."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from oracle_text.make_token_answers import HERE
from support.paths import VOCAB_DIR, require_real_model, require_vocab

from orcd_batch.checkpoint import GGUFFile
from orcd_batch.text import Tokenizer

if not VOCAB_DIR.is_dir():
    pytest.skip(f"no shared vocabularies at {VOCAB_DIR}", allow_module_level=True)

SHARED = ["llama-bpe", "llama-spm", "phi-3", "qwen2"]
_opened: dict[str, Tokenizer] = {}


def vocabulary_path(name: str) -> Path:
    return require_real_model() if name == "smollm2" else require_vocab(name)


def tokenizer(name: str) -> Tokenizer:
    if name not in _opened:
        with GGUFFile.open(vocabulary_path(name)) as gguf:
            _opened[name] = Tokenizer.from_metadata(gguf.metadata)
    return _opened[name]


def stored(name: str) -> Any:
    return json.loads((HERE / name).read_text())


@pytest.mark.parametrize("name", ["llama-bpe", "phi-3", "qwen2"])
def test_every_shared_case_is_tokenized_as_its_out_file_says(name: str) -> None:
    path = require_vocab(name)
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")[:-1]
    lines = Path(f"{path}.out").read_text().splitlines()
    assert len(texts) == len(lines) > 40
    for text, line in zip(texts, lines, strict=True):
        ids = tokenizer(name).encode(text, add_bos=False, parse_special=False)
        assert ids == [int(token) for token in line.split()], repr(text)
        assert tokenizer(name).decode(ids) == text


@pytest.mark.parametrize("name", SHARED)
def test_nasty_texts_get_the_ids_that_llama_cpp_gives_them(name: str) -> None:
    texts, answers = stored("texts.json"), stored(f"answers/{name}.json")
    for text, (plain, special) in zip(texts, answers, strict=True):
        for parse_special, expected in ((False, plain), (True, special or plain)):
            ids = tokenizer(name).encode(text, add_bos=False, parse_special=parse_special)
            assert ids == expected, (text, parse_special)


@pytest.mark.parametrize("name", SHARED)
def test_nasty_texts_survive_encoding_and_decoding(name: str) -> None:
    spaces = {"▁": " "} if name in ("llama-spm", "phi-3") else {}
    for text in stored("texts.json"):
        ids = tokenizer(name).encode(text, parse_special=False)
        assert tokenizer(name).decode(ids) == text.translate(str.maketrans(spaces))


@pytest.mark.parametrize(
    ("name", "stops", "bos", "eos"),
    [
        ("llama-bpe", {128001, 128009}, "<|begin_of_text|>", "<|end_of_text|>"),
        ("llama-spm", {2}, "<s>", "</s>"),
        ("phi-3", {2, 32000, 32007}, "<s>", "<|endoftext|>"),
        ("qwen2", {128247, 151643, 151645}, "<|endoftext|>", "<|endoftext|>"),
        ("smollm2", {0, 2}, "<|im_start|>", "<|im_end|>"),
    ],
)
def test_stop_tokens_are_those_named_by_key_and_those_known_by_text(
    name: str, stops: set[int], bos: str, eos: str
) -> None:
    assert tokenizer(name).stop_token_ids == stops
    assert (tokenizer(name).bos_token, tokenizer(name).eos_token) == (bos, eos)


@pytest.mark.parametrize(
    ("name", "first"),
    [("llama-bpe", 128000), ("llama-spm", 1), ("phi-3", 1), ("qwen2", None), ("smollm2", None)],
)
def test_bos_comes_first_only_where_the_file_asks_for_it(name: str, first: int | None) -> None:
    without = tokenizer(name).encode("Hi", add_bos=False)
    expected = without if first is None else [first, *without]
    assert tokenizer(name).encode("Hi") == expected


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2"])
def test_a_vocabulary_of_150000_tokens_opens_quickly(name: str) -> None:
    path = require_vocab(name)
    for _ in range(3):
        start = time.process_time()
        with GGUFFile.open(path) as gguf:
            Tokenizer.from_metadata(gguf.metadata)
        took_s = time.process_time() - start
        if took_s < 1.5:
            break
    assert took_s < 1.5
