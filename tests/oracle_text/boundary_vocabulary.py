"""A byte-level vocabulary whose ids show every place where a pre-tokenizer cut the text.

All 256 bytes, and a token for every pair of the bytes that `texts.json` uses: merging pairs up the
bytes of a piece from its start, so a cut anywhere else gives other ids.
"""

from collections.abc import Sequence

from orcd_batch.text.byte_pairs import BYTE_CHARACTERS

NORMAL = 1


def boundary_vocabulary(pre: str, texts: Sequence[str]) -> dict[str, object]:
    """`tokenizer.ggml.*` metadata of kind gpt2 with pre-tokenizer `pre` for these texts."""
    used = sorted(set("".join(texts).encode()))
    merges = [(BYTE_CHARACTERS[left], BYTE_CHARACTERS[right]) for left in used for right in used]
    tokens = [*BYTE_CHARACTERS, *(left + right for left, right in merges)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [NORMAL] * len(tokens),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }
