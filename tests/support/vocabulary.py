"""Two vocabularies of a few hundred tokens that are real: any text encodes and decodes.

`gpt2` is byte-level BPE, `llama` is SentencePiece-style BPE with scores and byte fallback. Both
come as the `tokenizer.ggml.*` metadata that a converter would write for a large one.
"""

import string
from collections.abc import Mapping

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6

CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n'"
    " + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_WORDS = ["the", "and", "in", "on", "er", "ing", "at", "it", "is", "to", "of", "ion", "ed"]
_WORDS += ["re", "he", "or", "an", "en", "es", "st", "al", "ar", "as", "ou", "le", "ve"]


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level BPE, as GPT-2 chose them.

    Printable Latin-1 bytes stand for themselves; the others take the code points from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _left_to_right_merges(words: list[str]) -> list[tuple[str, str]]:
    merges = {(word[:end], word[end]): None for word in words for end in range(1, len(word))}
    return sorted(merges, key=lambda pair: len(pair[0]))


def gpt2_vocabulary(pre: str = "smollm") -> dict[str, object]:
    """Metadata of a byte-level BPE: 3 control tokens (ids 0 to 2), 256 bytes, then merges.

    pre: the name of the pre-tokenizer regex. 1 is BOS, 2 is EOS; BOS is not added by itself.
    """
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = _left_to_right_merges([*("Ġ" + word for word in _WORDS), *_WORDS])
    tokens = control + byte_alphabet() + [left + right for left, right in merges]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }


def llama_vocabulary() -> dict[str, object]:
    """Metadata of an SPM-style BPE: <unk>, <s>, </s>, 256 byte tokens, pieces, Phi-3's turn marks.

    Longer pieces score higher than single characters; 1 is BOS, 2 is EOS; BOS is added.
    """
    merges = _left_to_right_merges([*("▁" + word for word in _WORDS), *_WORDS])
    pieces = [left + right for left, right in merges]
    letters = ["▁", *string.ascii_lowercase, *string.ascii_uppercase, *string.digits, *".,!?'\"-"]
    turns = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256
    types += [NORMAL] * (len(pieces) + len(letters)) + [CONTROL] * len(turns)
    scores = [0.0] * len(head) + [-float(rank) for rank in range(len(pieces) + len(letters))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": head + pieces + letters + turns,
        "tokenizer.ggml.scores": scores + [-1000.0] * len(turns),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
    }


def num_tokens(vocabulary: Mapping[str, object]) -> int:
    tokens = vocabulary["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list), "a vocabulary lists its tokens"
    return len(tokens)
