"""Finding tokens in text that stand for themselves: `<|end|>` is one token, not six."""

from collections.abc import Iterator
from dataclasses import dataclass

from orcd_batch.text.token_names import NEVER_STRIPPING
from orcd_batch.text.vocabulary import Attribute, Vocabulary

_ASCII_SPACE = " \t\n\v\f\r"


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """is_control: matched only where special tokens are asked for."""

    id: int
    text: str
    is_control: bool
    strips_right: bool


class SpecialTokens:
    """The special tokens of one vocabulary, longest text (in UTF-8 bytes) first."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        special = Attribute.CONTROL | Attribute.USER_DEFINED | Attribute.UNKNOWN
        found = [
            SpecialToken(
                id=token,
                text=vocabulary.tokens[token],
                is_control=bool(attribute & (Attribute.CONTROL | Attribute.UNKNOWN)),
                strips_right=vocabulary.strips_right
                and vocabulary.tokens[token] not in NEVER_STRIPPING,
            )
            for token, attribute in sorted(vocabulary.attributes.items())
            if attribute & special
        ]
        found.sort(key=lambda token: -len(token.text.encode("utf-8", "surrogatepass")))
        self._all = tuple(found)
        self._always = tuple(token for token in found if not token.is_control)

    def split(self, text: str, parse_special: bool) -> list[str | int]:
        """Cut `text` into raw text and token ids, in order; no empty text is left.

        User-defined tokens are always cut out, control tokens with `parse_special`. The longest
        token goes first through the whole text, as llama.cpp's `tokenizer_st_partition` does it.
        """
        fragments: list[str | int] = [text] if text else []
        for token in self._all if parse_special else self._always:
            if token.text in text:
                fragments = [part for whole in fragments for part in _cut(whole, token)]
        return fragments


def _cut(fragment: str | int, token: SpecialToken) -> Iterator[str | int]:
    if isinstance(fragment, int):
        yield fragment
        return
    first, *others = fragment.split(token.text)
    if first:
        yield first
    for text in others:
        yield token.id
        if token.strips_right:
            text = text.lstrip(_ASCII_SPACE)
        if text:
            yield text
