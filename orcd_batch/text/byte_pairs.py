"""The `gpt2` kind: byte-level BPE, done by the `tokenizers` library."""

from typing import Any

from orcd_batch.errors import TokenizerError
from orcd_batch.text.vocabulary import Vocabulary


def _byte_characters() -> list[str]:
    """The character that stands for each byte: itself where it prints, else one above 255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


class BytePairs:
    """Encodes raw text (no special tokens) of one `gpt2` vocabulary.

    Bytes that the vocabulary lacks are lost, as in llama.cpp. (SmolLM2 lacks 21: some control
    characters and the bytes that only begin code points from U+40000 or are never in UTF-8.) They
    get ids of their own while merging, so that their neighbours are not joined over them.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        missing = [character for character in BYTE_CHARACTERS if character not in vocabulary.ids]
        size = len(vocabulary.tokens)
        self._first_missing = size if missing else None
        ids = {**vocabulary.ids, **{text: size + at for at, text in enumerate(missing)}}
        self._encode: Any = _build(vocabulary, ids).encode_batch_fast

    def encode(self, text: str, at_start: bool) -> list[int]:
        """Ids of `text`; where it stands makes no difference to this kind."""
        ids: list[int] = self._encode([text], add_special_tokens=False)[0].ids
        if self._first_missing is not None:
            return [token for token in ids if token < self._first_missing]
        return ids


def _build(vocabulary: Vocabulary, ids: dict[str, int]) -> Any:
    """A `tokenizers.Tokenizer`: the model from plain objects, which is twice as fast as JSON."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    pre = vocabulary.pre_tokenizer
    merges = [(left, right) for left, _, right in map(_partition, vocabulary.merges) if right]
    try:
        model = models.BPE(vocab=ids, merges=merges, ignore_merges=pre.ignore_merges)
    except Exception:  # nearly always merges of texts that are no tokens, which never apply
        merges = [(a, b) for a, b in merges if a in ids and b in ids and a + b in ids]
        try:
            model = models.BPE(vocab=ids, merges=merges, ignore_merges=pre.ignore_merges)
        except Exception as error:
            raise TokenizerError(
                f"The tokenizers library refuses the gpt2 vocabulary ({error!s:.200}); the file "
                "is damaged, so fetch or convert it again."
            ) from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _partition(merge: str) -> tuple[str, str, str]:
    left, space, right = merge[1:].partition(" ")
    return merge[:1] + left, space, right
