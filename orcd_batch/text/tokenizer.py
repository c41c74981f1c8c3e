"""The tokenizer of a model, from its GGUF's own keys; llama.cpp is the reference, id for id."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from hashlib import sha256
from typing import Self

from orcd_batch.errors import RowError
from orcd_batch.text.byte_pairs import BytePairs
from orcd_batch.text.detokenizer import Detokenizer, TextStream
from orcd_batch.text.scored_pieces import ScoredPieces
from orcd_batch.text.special_tokens import SpecialTokens
from orcd_batch.text.token_names import STOP_TEXTS
from orcd_batch.text.vocabulary import Vocabulary, read_vocabulary


class Tokenizer:
    """Text to token ids and back. Nothing is normalized on the way."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._special_tokens = SpecialTokens(vocabulary)
        self._detokenizer = Detokenizer(vocabulary)
        self._pieces: BytePairs | ScoredPieces = (
            BytePairs(vocabulary) if vocabulary.kind == "gpt2" else ScoredPieces(vocabulary)
        )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> Self:
        """Build from the key-value pairs of a GGUF.

        Raises TokenizerError for a vocabulary that is missing, damaged or of an unsupported kind.
        """
        return cls(read_vocabulary(metadata))

    def encode(self, text: str, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        add_bos: put the beginning-of-sequence token first if the file's `add_bos_token` says so.
        parse_special: recognise control tokens written out in the text, like `<|end|>`.
        Raises RowError for text that is not valid Unicode.
        """
        ids = [self._vocabulary.bos_id] if add_bos and self._vocabulary.add_bos else []
        encoded: list[int] = [token for token in ids if token is not None]
        at_start = True
        for fragment in self._special_tokens.split(_valid(text), parse_special):
            if isinstance(fragment, int):
                encoded.append(fragment)
            else:
                encoded.extend(self._pieces.encode(fragment, at_start))
            at_start = isinstance(fragment, int)
        return encoded

    def decode(self, ids: Iterable[int], after: int | None = None) -> str:
        """Text of `ids`, special tokens left out, U+FFFD for bytes that are not UTF-8.

        after: the token that comes before `ids`, so that a completion that continues a word's
        sentence keeps its first space; None is the start of a text.
        Raises RowError for an id outside the vocabulary.
        """
        return self._detokenizer.decode(ids, after)

    def stream(self, after: int | None = None) -> TextStream:
        """Decode token by token; see `decode` for `after`."""
        return TextStream(self._detokenizer, after)

    @property
    def vocab_size(self) -> int:
        """Number of tokens; ids go from 0 to one less."""
        return len(self._vocabulary.tokens)

    @property
    def bos_token(self) -> str:
        """Text of the beginning-of-sequence token, empty if there is none."""
        return self._text(self._vocabulary.bos_id)

    @property
    def eos_token(self) -> str:
        """Text of the end-of-sequence token, empty if there is none."""
        return self._text(self._vocabulary.eos_id)

    @cached_property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens that end a sample: end of sequence, end of turn, and those known by their text."""
        ids = self._vocabulary.ids
        named = {self._vocabulary.eos_id, self._vocabulary.eot_id}
        named |= {ids[text] for text in STOP_TEXTS if text in ids}
        return frozenset(token for token in named if token is not None)

    @cached_property
    def content_hash(self) -> str:
        """Hex SHA-256 over everything that decides what `encode` and `decode` return."""
        return vocabulary_hash(self._vocabulary)

    def _text(self, token: int | None) -> str:
        return "" if token is None else self._vocabulary.tokens[token]


def vocabulary_hash(vocabulary: Vocabulary) -> str:
    """Hex SHA-256 over the facts of a vocabulary, each list preceded by its length."""
    digest = sha256(b"orcd_batch.tokenizer")
    facts = (
        vocabulary.kind,
        vocabulary.pre,
        vocabulary.bos_id,
        vocabulary.eos_id,
        vocabulary.eot_id,
        vocabulary.add_bos,
        vocabulary.add_space_prefix,
        vocabulary.strips_right,
        sorted((token, int(flags)) for token, flags in vocabulary.attributes.items()),
    )
    digest.update(repr(facts).encode())
    for texts in (vocabulary.tokens, vocabulary.merges, list(map(repr, vocabulary.scores))):
        digest.update(repr([len(texts), *map(len, texts)]).encode())
        digest.update("".join(texts).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"The text holds the lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which no UTF-8 can express; repair the text."
        ) from error
    return text
