"""From token ids back to text, all at once or as they come."""

from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence

from orcd_batch.errors import RowError, TokenizerError
from orcd_batch.text.byte_pairs import BYTE_OF_CHARACTER
from orcd_batch.text.scored_pieces import SPACE
from orcd_batch.text.vocabulary import Attribute, Vocabulary

_HIDDEN = Attribute.CONTROL | Attribute.UNKNOWN
_SPECIAL = _HIDDEN | Attribute.USER_DEFINED
_Utf8Decoder = getincrementaldecoder("utf-8")


class Detokenizer:
    """The bytes of every token of one vocabulary, worked out when first asked for.

    Control, unknown and unused tokens have none. A user-defined token is its own text.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._bytes: list[bytes | None] = [None] * len(vocabulary.tokens)
        self._drops_space = vocabulary.add_space_prefix
        _check_byte_tokens(vocabulary)

    def decode(self, ids: Iterable[int], after: int | None = None) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD.

        after: the token before `ids`; None is the start of a text. The space that `encode` puts
        before a text, and after every special token, is dropped again in the same places.
        Raises RowError for an id outside the vocabulary.
        """
        stream = TextStream(self, after)
        return b"".join(map(stream.next_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, without regard to its place."""
        if not 0 <= token < len(self._bytes):
            raise RowError(
                f"Token id {token} is outside the vocabulary, whose ids go from 0 to "
                f"{len(self._bytes) - 1}."
            )
        found = self._bytes[token]
        if found is None:
            found = self._bytes[token] = self._work_out(token)
        return found

    def opens_text(self, token: int | None) -> bool:
        """Whether text that follows `token` got a space of `encode`'s own before it."""
        if not self._drops_space:
            return False
        return token is None or bool(
            self._vocabulary.attributes.get(token, Attribute.NORMAL) & _SPECIAL
        )

    def _work_out(self, token: int) -> bytes:
        attribute = self._vocabulary.attributes.get(token, Attribute.NORMAL)
        text = self._vocabulary.tokens[token]
        if attribute & _HIDDEN:
            return b""
        if attribute & Attribute.USER_DEFINED:
            return text.encode("utf-8", "surrogateescape")
        if attribute & Attribute.BYTE:
            return bytes([int(text[3:5], 16)])
        if not attribute & Attribute.NORMAL:
            return b""
        if self._vocabulary.kind == "llama":
            return text.replace(SPACE, " ").encode("utf-8", "surrogateescape")
        try:
            return bytes([BYTE_OF_CHARACTER[character] for character in text])
        except KeyError:
            return text.encode("utf-8", "surrogateescape")


class TextStream:
    """Text of one growing list of tokens, each character as soon as it is whole.

    Everything returned by `push` and then `finish`, joined, equals `decode` of the same ids.
    """

    def __init__(self, detokenizer: Detokenizer, after: int | None = None) -> None:
        self._detokenizer = detokenizer
        self._drop_space = detokenizer.opens_text(after)
        self._decoder = _Utf8Decoder("replace")

    def next_bytes(self, token: int) -> bytes:
        """The bytes of the next token in its place; use this or `push`, not both."""
        found = self._detokenizer.token_bytes(token)
        if self._drop_space and found:
            found = found.removeprefix(b" ")
            self._drop_space = False
        if self._detokenizer.opens_text(token):
            self._drop_space = True
        return found

    def push(self, token: int) -> str:
        """Take the next token and return the characters that it completes, possibly none."""
        return self._decoder.decode(self.next_bytes(token))

    def finish(self) -> str:
        """The end of the text: U+FFFD where a character was left unfinished, else nothing."""
        return self._decoder.decode(b"", final=True)


def _check_byte_tokens(vocabulary: Vocabulary) -> None:
    for token in _tokens_with(vocabulary, Attribute.BYTE):
        text = vocabulary.tokens[token]
        try:
            well_formed = f"<0x{int(text[3:5], 16):02X}>" == text
        except ValueError:
            well_formed = False
        if not well_formed:
            raise TokenizerError(
                f"Token {token} is marked as a byte but its text is {text!r:.60} instead of "
                "<0x00> to <0xFF>; the file is damaged."
            )


def _tokens_with(vocabulary: Vocabulary, wanted: Attribute) -> Sequence[int]:
    return [token for token, found in vocabulary.attributes.items() if found & wanted]
