"""The facts of one vocabulary, read from a GGUF's `tokenizer.ggml.*` keys, checked and frozen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Literal, cast

from orcd_batch.errors import TokenizerError
from orcd_batch.text.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from orcd_batch.text.token_names import FILL_IN_THE_MIDDLE, HARMONY, TURN_ENDS

MODEL_KEY = "tokenizer.ggml.model"
TOKENS_KEY = "tokenizer.ggml.tokens"
MAX_TOKENS = 1 << 22


class Attribute(IntFlag):
    """What a token is; a token whose text ends a turn is CONTROL beside what the file says."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 4
    USER_DEFINED = 8
    UNUSED = 16
    BYTE = 32


_OF_TYPE = {1: 1, 2: 2, 3: 4, 4: 8, 5: 16, 6: 32}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens and how to use them.

    kind: `llama` (scores) or `gpt2` (merges). tokens: text by id; ids: the reverse. attributes:
    flags by id, only of tokens that are not plainly NORMAL. scores: by id, kind `llama` only.
    merges: "left right", best first, kind `gpt2` only. strips_right: special tokens swallow the
    white space that follows them (Phi-3).
    """

    kind: Literal["llama", "gpt2"]
    pre: str
    tokens: Sequence[str]
    ids: Mapping[str, int]
    attributes: Mapping[int, Attribute]
    scores: Sequence[float]
    merges: Sequence[str]
    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    add_bos: bool
    add_space_prefix: bool
    strips_right: bool

    @property
    def pre_tokenizer(self) -> PreTokenizer:
        """How text is cut before merging (kind `gpt2`)."""
        return PRE_TOKENIZERS[self.pre]


def read_vocabulary(metadata: Mapping[str, object]) -> Vocabulary:
    """Check the `tokenizer.ggml.*` keys of `metadata` and gather them.

    Raises TokenizerError naming the key, the value and what is supported. Defaults, and the tokens
    that are special by their text, are those of llama.cpp's `llama_vocab::load`.
    """
    kind = _kind(metadata)
    tokens = _tokens(metadata)
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(ids) != len(tokens):
        raise TokenizerError(_duplicate(tokens))
    pre = _pre(metadata) if kind == "gpt2" else "default"
    bos_id = _token_id(metadata, "bos", len(tokens), 1 if kind == "llama" else None)
    add_bos = _flag(metadata, "add_bos_token")
    if add_bos and bos_id is None:
        raise TokenizerError(
            "tokenizer.ggml.add_bos_token is true but the file has no tokenizer.ggml.bos_token_id; "
            "convert the model again, or set the key to false."
        )
    if add_bos is None:
        add_bos = bos_id is not None and (kind == "llama" or PRE_TOKENIZERS[pre].add_bos)
    add_space_prefix = _flag(metadata, "add_space_prefix")
    name = str(metadata.get("general.name", "")).lower()
    return Vocabulary(
        kind=kind,
        pre=pre,
        tokens=tokens,
        ids=ids,
        attributes=_attributes(metadata, tokens, ids),
        scores=_scores(metadata, len(tokens)) if kind == "llama" else (),
        merges=_merges(metadata) if kind == "gpt2" else (),
        bos_id=bos_id,
        eos_id=_token_id(metadata, "eos", len(tokens), 2 if kind == "llama" else None),
        eot_id=_token_id(metadata, "eot", len(tokens), None),
        add_bos=add_bos,
        add_space_prefix=kind == "llama" and add_space_prefix is not False,
        strips_right="phi-3" in name or "phi3" in name,
    )


def _kind(metadata: Mapping[str, object]) -> Literal["llama", "gpt2"]:
    kind = metadata.get(MODEL_KEY)
    if kind == "llama" or kind == "gpt2":
        return kind
    found = "the file has no such key" if kind is None else f"found {kind!r:.60}"
    raise TokenizerError(
        f"{MODEL_KEY} must be 'llama' or 'gpt2' ({found}); use a GGUF with one of these tokenizers."
    )


def _pre(metadata: Mapping[str, object]) -> str:
    pre = metadata.get("tokenizer.ggml.pre") or "default"
    if isinstance(pre, str) and pre in PRE_TOKENIZERS:
        return pre
    supported = ", ".join(sorted(PRE_TOKENIZERS))
    raise TokenizerError(
        f"tokenizer.ggml.pre is {pre!r:.60}, a pre-tokenizer this program does not know; "
        f"supported are: {supported}."
    )


def _array(metadata: Mapping[str, object], key: str, kinds: tuple[type, ...]) -> list[object]:
    """The array under `key` as a list of plain values, each of one of `kinds`."""
    values = metadata[key]
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, (list, tuple)) or not set(map(type, values)) <= set(kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise TokenizerError(
            f"{key} must be an array of {expected}, found {type(values).__name__}; "
            "the file is damaged, or its converter is not supported."
        )
    return list(values)


def _tokens(metadata: Mapping[str, object]) -> list[str]:
    if TOKENS_KEY not in metadata:
        raise TokenizerError(f"The file has no {TOKENS_KEY}; use a GGUF that carries a tokenizer.")
    tokens = cast(list[str], _array(metadata, TOKENS_KEY, (str,)))
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise TokenizerError(f"{TOKENS_KEY} has {len(tokens)} entries, expected 1 to {MAX_TOKENS}.")
    return [text or f"[EMPTY_{index}]" for index, text in enumerate(tokens)]


def _duplicate(tokens: Sequence[str]) -> str:
    first: dict[str, int] = {}
    for index, text in enumerate(tokens):
        if text in first:
            return (
                f"{TOKENS_KEY} holds {text!r:.60} twice, at {first[text]} and {index}; "
                "a text must have one id, so convert the model again."
            )
        first[text] = index
    raise AssertionError("no token is there twice")


def _scores(metadata: Mapping[str, object], count: int) -> list[float]:
    key = "tokenizer.ggml.scores"
    if key not in metadata:
        return [0.0] * count
    scores = cast(list[float], _array(metadata, key, (float, int)))
    if len(scores) != count or any(score != score for score in scores):
        raise TokenizerError(
            f"{key} must hold one number for each of the {count} tokens, found {len(scores)} "
            "entries (none may be NaN); the file is damaged."
        )
    return scores


def _merges(metadata: Mapping[str, object]) -> list[str]:
    key = "tokenizer.ggml.merges"
    if key not in metadata:
        raise TokenizerError(f"A gpt2 vocabulary needs {key}, which the file does not have.")
    return list(dict.fromkeys(cast(list[str], _array(metadata, key, (str,)))))


def _attributes(
    metadata: Mapping[str, object], tokens: Sequence[str], ids: Mapping[str, int]
) -> dict[int, Attribute]:
    key = "tokenizer.ggml.token_type"
    attributes: dict[int, Attribute] = {}
    if key in metadata:
        types = cast(list[int], _array(metadata, key, (int,)))
        if len(types) != len(tokens):
            raise TokenizerError(
                f"{key} has {len(types)} entries for {len(tokens)} tokens; the file is damaged."
            )
        attributes = {
            token: Attribute(_OF_TYPE.get(kind, 0)) for token, kind in enumerate(types) if kind != 1
        }
    control = set(TURN_ENDS)
    for id_keys, names in FILL_IN_THE_MIDDLE.items():
        if not any(f"tokenizer.ggml.{id_key}_token_id" in metadata for id_key in id_keys):
            control |= names
    for text in control & ids.keys():
        token = ids[text]
        attributes[token] = attributes.get(token, Attribute.NORMAL) | Attribute.CONTROL
    for text in HARMONY & ids.keys():
        attributes[ids[text]] = Attribute.USER_DEFINED
    return attributes


def _token_id(
    metadata: Mapping[str, object], name: str, count: int, default: int | None
) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return default if default is not None and default < count else None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
        raise TokenizerError(
            f"{key} is {value!r:.60}, but ids of this vocabulary go from 0 to {count - 1}; "
            "correct the key, or convert the model again."
        )
    return value


def _flag(metadata: Mapping[str, object], name: str) -> bool | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None or isinstance(value, bool):
        return value
    raise TokenizerError(f"tokenizer.ggml.{name} must be true or false, found {value!r:.60}.")
