"""The tokenizer on small vocabularies that are always there."""

import json
import time
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_text.boundary_vocabulary import boundary_vocabulary
from oracle_text.make_token_answers import HERE
from support.vocabulary import gpt2_vocabulary, llama_vocabulary

from orcd_batch.errors import RowError, TokenizerError
from orcd_batch.text import Tokenizer
from orcd_batch.text.pre_tokenizers import PRE_TOKENIZERS

TEXTS = json.loads((HERE / "texts.json").read_text())
CUTS = json.loads((HERE / "answers" / "pre_tokenizers.json").read_text())
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
PIECES = st.lists(
    st.one_of(
        st.sampled_from([" ", "  ", "\n", "the", " and", "on", "<|end|>", "é", "日"]), UNICODE
    )
).map("".join)


@cache
def tokenizer(kind: str) -> Tokenizer:
    return Tokenizer.from_metadata(gpt2_vocabulary() if kind == "gpt2" else llama_vocabulary())


def changed(metadata: dict[str, object], **keys: object) -> dict[str, object]:
    return {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in keys.items()}}


def without(metadata: dict[str, object], key: str) -> dict[str, object]:
    return {name: value for name, value in metadata.items() if name != f"tokenizer.ggml.{key}"}


@pytest.mark.parametrize("pre", CUTS)
def test_each_pre_tokenizer_cuts_where_llama_cpp_does(pre: str) -> None:
    texts = TEXTS[: len(CUTS[pre])]
    cutting = Tokenizer.from_metadata(boundary_vocabulary(pre, texts))
    for text, expected in zip(texts, CUTS[pre], strict=True):
        assert cutting.encode(text, add_bos=False, parse_special=False) == expected, repr(text)


def test_every_supported_pre_tokenizer_is_covered_by_an_answer_of_its_family() -> None:
    covered = {PRE_TOKENIZERS[name] for name in CUTS}
    assert covered == set(PRE_TOKENIZERS.values())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@given(text=PIECES)
@settings(max_examples=150, deadline=None)
def test_any_text_survives_encoding_and_decoding(kind: str, text: str) -> None:
    expected = text if kind == "gpt2" else text.replace("▁", " ")
    ids = tokenizer(kind).encode(text, parse_special=False)
    assert tokenizer(kind).decode(ids) == expected


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_stream_gives_the_decoded_text_and_never_half_a_character(
    kind: str, data: st.DataObject
) -> None:
    size = tokenizer(kind).vocab_size
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=30))
    after = data.draw(st.one_of(st.none(), st.integers(0, size - 1)))
    stream = tokenizer(kind).stream(after)
    pieces = [stream.push(token) for token in ids]
    assert "".join([*pieces, stream.finish()]) == tokenizer(kind).decode(ids, after)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_character_of_several_tokens_comes_out_whole_with_its_last_token(kind: str) -> None:
    ids = tokenizer(kind).encode("x😀y", add_bos=False, parse_special=False)
    stream = tokenizer(kind).stream()
    pieces = [stream.push(token) for token in ids]
    assert pieces.count("😀") == 1
    assert "\ufffd" not in "".join(pieces)
    assert stream.finish() == ""


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_unfinished_character_becomes_one_replacement_character(kind: str) -> None:
    ids = tokenizer(kind).encode("x😀", add_bos=False)[:-1]
    assert tokenizer(kind).decode(ids) == "x\ufffd"


def test_special_tokens_are_found_in_text_only_when_asked_for_and_left_out_of_text() -> None:
    found = tokenizer("gpt2").encode("a<|im_end|>b")
    plain = tokenizer("gpt2").encode("a<|im_end|>b", parse_special=False)
    assert found.count(2) == 1
    assert 2 not in plain
    assert tokenizer("gpt2").decode(found) == "ab"
    assert tokenizer("gpt2").decode(plain) == "a<|im_end|>b"


def test_a_llama_text_gets_a_space_at_the_start_and_after_special_tokens_only() -> None:
    spm = tokenizer("llama")
    tokens = llama_vocabulary()["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    ids = spm.encode("to<|user|>to  to", add_bos=False)
    texts = [tokens[token] for token in ids]
    assert texts == ["▁to", "<|user|>", "▁to", "▁", "▁to"]
    assert spm.decode(ids) == "toto  to"


def test_a_completion_keeps_its_first_space_unless_a_special_token_came_before() -> None:
    spm = tokenizer("llama")
    to, user = spm.encode("to", add_bos=False), spm.encode("<|user|>", add_bos=False)
    assert spm.decode(to) == "to"
    assert spm.decode(to, after=user[0]) == "to"
    assert spm.decode(to, after=to[0]) == " to"


def test_without_add_space_prefix_a_llama_text_is_encoded_as_it_is() -> None:
    spm = Tokenizer.from_metadata(changed(llama_vocabulary(), add_space_prefix=False))
    ids = spm.encode(" to", add_bos=False)
    assert len(ids) == 1
    assert spm.decode(ids) == " to"


def test_phi_3_swallows_white_space_after_its_special_tokens() -> None:
    metadata = {**llama_vocabulary(), "general.name": "My Phi-3 tune"}
    phi, plain = Tokenizer.from_metadata(metadata), tokenizer("llama")
    assert phi.encode("<|user|> \n\t x") == plain.encode("<|user|>x")
    assert phi.encode("<|endoftext|>  x") == plain.encode("<|endoftext|>  x")
    assert phi.encode("<|user|>\u3000x") == plain.encode("<|user|>\u3000x")


def test_equal_scores_merge_from_the_left() -> None:
    metadata = llama_vocabulary()
    tokens = [*metadata["tokenizer.ggml.tokens"], "xy", "yx"]  # type: ignore[misc]
    scores = [*metadata["tokenizer.ggml.scores"], 5.0, 5.0]  # type: ignore[misc]
    types = [*metadata["tokenizer.ggml.token_type"], 1, 1]  # type: ignore[misc]
    tied = Tokenizer.from_metadata(
        changed(metadata, tokens=tokens, scores=scores, token_type=types, add_space_prefix=False)
    )
    ids = tied.encode("xyxyxyx", add_bos=False)
    assert [tokens[token] for token in ids] == ["xy", "xy", "xy", "x"]
    ids = tied.encode("yxyxyxy", add_bos=False)
    assert [tokens[token] for token in ids] == ["yx", "yx", "yx", "y"]


def test_a_user_defined_token_is_found_even_where_special_tokens_are_not_asked_for() -> None:
    metadata = gpt2_vocabulary()
    tokens = [*metadata["tokenizer.ggml.tokens"], "[TOOL]"]  # type: ignore[misc]
    types = [*metadata["tokenizer.ggml.token_type"], 4]  # type: ignore[misc]
    tools = Tokenizer.from_metadata(changed(metadata, tokens=tokens, token_type=types))
    ids = tools.encode("a[TOOL]b", parse_special=False)
    assert len(tokens) - 1 in ids
    assert tools.decode(ids) == "a[TOOL]b"


def test_a_byte_that_is_missing_from_the_vocabulary_is_lost_without_joining_its_neighbours() -> (
    None
):
    metadata = gpt2_vocabulary()
    tokens = list(metadata["tokenizer.ggml.tokens"])  # type: ignore[call-overload]
    tokens[tokens.index("Ą")] = "!!"
    missing = Tokenizer.from_metadata(
        changed(metadata, tokens=tokens, merges=[*metadata["tokenizer.ggml.merges"], "! !"])  # type: ignore[misc]
    )
    bang = tokens.index("!")
    assert missing.encode("!\x04!", add_bos=False) == [bang, bang]
    assert missing.encode("!!", add_bos=False) == [tokens.index("!!")]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("text", ["a", "the", " ", "\n ", "日本", "1", "-="])
def test_a_long_text_without_spaces_takes_time_in_proportion_to_its_length(
    kind: str, text: str
) -> None:
    length = 50_000
    start = time.process_time()
    ids = tokenizer(kind).encode(text * (length // len(text)), parse_special=False)
    assert time.process_time() - start < 2.0
    assert len(tokenizer(kind).decode(ids)) > length - 10


def test_text_with_a_lone_surrogate_is_refused_by_name() -> None:
    for kind in ("gpt2", "llama"):
        with pytest.raises(RowError, match="U\\+D800 at character 2"):
            tokenizer(kind).encode("ab\ud800")


@pytest.mark.parametrize("token", [-1, 10**6])
def test_decoding_an_id_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(RowError, match=f"Token id {token} is outside"):
        tokenizer("gpt2").decode([token])


def test_the_content_hash_follows_whatever_changes_the_ids() -> None:
    metadata = gpt2_vocabulary()
    merges = list(metadata["tokenizer.ggml.merges"])  # type: ignore[call-overload]
    variants: list[dict[str, Any]] = [
        metadata,
        changed(metadata, pre="qwen2"),
        changed(metadata, merges=merges[::-1]),
        changed(metadata, add_bos_token=True),
        changed(metadata, eos_token_id=0),
        {**metadata, "general.name": "phi-3"},
    ]
    hashes = [Tokenizer.from_metadata(variant).content_hash for variant in variants]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == tokenizer("gpt2").content_hash


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "tokenizer.ggml.model must be 'llama' or 'gpt2'"),
        (changed(gpt2_vocabulary(), model="t5"), "found 't5'"),
        (changed(gpt2_vocabulary(), pre="martian"), "'martian'.*supported are: .*qwen2.*smollm"),
        (changed(gpt2_vocabulary(), pre=["a"]), r"\['a'\]"),
        (without(gpt2_vocabulary(), "tokens"), "no tokenizer.ggml.tokens"),
        (without(gpt2_vocabulary(), "merges"), "needs tokenizer.ggml.merges"),
        (changed(gpt2_vocabulary(), tokens=[]), "0 entries"),
        (changed(gpt2_vocabulary(), tokens=7), "must be an array of str, found int"),
        (changed(gpt2_vocabulary(), tokens=["a", "b", "a"]), "'a' twice, at 0 and 2"),
        (changed(gpt2_vocabulary(), merges=[1]), "merges must be an array of str"),
        (changed(gpt2_vocabulary(), token_type=[1]), "has 1 entries for"),
        (changed(gpt2_vocabulary(), bos_token_id=10**6), "bos_token_id is 1000000, but ids"),
        (changed(gpt2_vocabulary(), add_bos_token=3), "must be true or false, found 3"),
        (
            without(changed(gpt2_vocabulary(), add_bos_token=True), "bos_token_id"),
            "no tokenizer.ggml.bos_token_id",
        ),
        (changed(llama_vocabulary(), scores=[0.0]), "found 1 entries"),
        (
            changed(
                llama_vocabulary(), tokens=["a", "b", "c"], token_type=[1] * 3, scores=[0.0] * 3
            ),
            "no byte token <0x00>",
        ),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_refused_in_a_sentence(
    metadata: dict[str, object], message: str
) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_metadata(metadata)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.one_of(st.text(max_size=3), st.integers(-3, 9)), max_size=5),
)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_damaged_metadata_gives_a_tokenizer_or_a_sentence(kind: str, data: st.DataObject) -> None:
    metadata = gpt2_vocabulary() if kind == "gpt2" else llama_vocabulary()
    for key in data.draw(st.lists(st.sampled_from(sorted(metadata)), max_size=3)):
        value = metadata[key]
        if isinstance(value, list) and value and data.draw(st.booleans()):
            damaged = list(value)
            damaged[data.draw(st.integers(0, len(value) - 1))] = data.draw(VALUES)
            metadata[key] = damaged
        else:
            metadata[key] = data.draw(VALUES)
    with suppress(TokenizerError):
        built = Tokenizer.from_metadata(metadata)
        built.decode(built.encode("the end<|end|> é"))
