"""Stop strings: seen while tokens come, cut from the finished text."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vocabulary import gpt2_vocabulary

from orcd_batch.errors import ConfigError
from orcd_batch.text import StopStringCheck, Tokenizer, cut_at_stop

LETTERS = st.text("ab é", max_size=12)
STOPS = st.lists(st.text("ab é", min_size=1, max_size=4), min_size=1, max_size=3)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_metadata(gpt2_vocabulary())


@given(text=LETTERS, stop=STOPS)
@settings(deadline=None)
def test_the_check_turns_true_at_the_token_that_completes_a_stop_string(
    text: str, stop: list[str]
) -> None:
    ids = tokenizer().encode(text, add_bos=False)
    check = StopStringCheck(tokenizer(), stop)
    for count in range(len(ids) + 1):
        stream = tokenizer().stream()
        whole = "".join(stream.push(token) for token in ids[:count])
        assert check(ids[:count]) is any(string in whole for string in stop)


@given(text=LETTERS, stop=STOPS)
def test_the_text_is_cut_where_the_earliest_stop_string_begins(text: str, stop: list[str]) -> None:
    kept = cut_at_stop(text, stop)
    assert text.startswith(kept)
    assert not any(string in kept for string in stop)
    if kept != text:
        assert any(text[len(kept) :].startswith(string) for string in stop)


def test_a_stop_string_may_span_tokens() -> None:
    ids = tokenizer().encode("x the end", add_bos=False)
    check = StopStringCheck(tokenizer(), ["e e"])
    assert [check(ids[:count]) for count in range(1, len(ids) + 1)].count(True) > 0
    assert cut_at_stop("x the end", ["e e"]) == "x th"


def test_the_check_looks_only_at_what_is_new() -> None:
    counted = CountingTokenizer(tokenizer())
    check = StopStringCheck(counted, ["never there"])  # type: ignore[arg-type]
    ids = tokenizer().encode("and so it is" * 50, add_bos=False)
    for count in range(1, len(ids) + 1):
        assert not check(ids[:count])
    assert counted.pushed == len(ids)


def test_no_stop_strings_never_stop() -> None:
    assert not StopStringCheck(tokenizer(), [])([5, 6, 7])
    assert cut_at_stop("text", []) == "text"


@pytest.mark.parametrize("stop", [[""], ["a", ""], "ab", [3]])
def test_a_stop_string_that_is_empty_or_no_text_is_refused(stop: list[str]) -> None:
    with pytest.raises(ConfigError, match="not empty"):
        StopStringCheck(tokenizer(), stop)
    with pytest.raises(ConfigError, match="not empty"):
        cut_at_stop("text", stop)


class CountingTokenizer:
    """Counts how many tokens its streams are given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.pushed = 0

    def stream(self, after: int | None = None) -> "CountingTokenizer":
        self._stream = self._tokenizer.stream(after)
        return self

    def push(self, token: int) -> str:
        self.pushed += 1
        return self._stream.push(token)
