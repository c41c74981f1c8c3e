"""The `llama` kind: SentencePiece's BPE, which merges the neighbours whose piece scores best.

Written here rather than built on `tokenizers`: its BPE gives every pair a rank of its own, while
real vocabularies score pieces alike (Llama's runs of spaces, whole languages added later), and
then the leftmost pair goes first. Algorithm: llama.cpp's `llm_tokenizer_spm_session`.
"""

import re
from heapq import heapify, heappop, heappush

from orcd_batch.errors import TokenizerError
from orcd_batch.text.vocabulary import Vocabulary

SPACE = "▁"
_MAX_CACHED_WORD = 48
_MAX_CACHED_WORDS = 1 << 16
_POSITION_BITS = 32
_POSITION_MASK = (1 << _POSITION_BITS) - 1


class ScoredPieces:
    """Encodes raw text (no special tokens) of one `llama` vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ids = vocabulary.ids
        self._add_space_prefix = vocabulary.add_space_prefix
        scores = sorted(set(vocabulary.scores), reverse=True)
        rank_of_score = {score: rank for rank, score in enumerate(scores)}
        ranks = (rank_of_score[score] for score in vocabulary.scores)
        self._ranks = dict(zip(vocabulary.tokens, ranks, strict=True))
        self._byte_ids = _byte_ids(vocabulary)
        words_end_at_spaces = not any(
            SPACE in text.lstrip(SPACE) for text in vocabulary.tokens if SPACE in text
        )
        self._words = (
            re.compile(f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+") if words_end_at_spaces else None
        )
        self._cache: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str, at_start: bool) -> list[int]:
        """Ids of `text`; at_start: it opens the prompt or follows a special token.

        Where no piece holds a space behind another character, no merge crosses a word's start, so
        words are merged one by one and remembered.
        """
        if at_start and self._add_space_prefix:
            text = " " + text
        text = text.replace(" ", SPACE)
        ids: list[int] = []
        for word in self._words.findall(text) if self._words else (text,):
            found = self._cache.get(word)
            if found is None:
                found = tuple(self._merge(word))
                if len(word) <= _MAX_CACHED_WORD:
                    if len(self._cache) >= _MAX_CACHED_WORDS:
                        self._cache.clear()
                    self._cache[word] = found
            ids.extend(found)
        return ids

    def _merge(self, text: str) -> list[int]:
        """Merge characters until no neighbours form a piece: best score first, then leftmost.

        The queue holds (rank of the joined piece, position of its left part) in one integer; an
        entry whose parts have changed meanwhile is stale and skipped.
        """
        rank_of = self._ranks.get
        length = len(text)
        end = list(range(1, length + 1))
        start_before = list(range(-1, length - 1))
        queue = [
            rank << _POSITION_BITS | left
            for left in range(length - 1)
            if (rank := rank_of(text[left : left + 2])) is not None
        ]
        heapify(queue)
        while queue:
            entry = heappop(queue)
            left = entry & _POSITION_MASK
            middle = end[left]
            if middle == 0 or middle == length:
                continue
            right_end = end[middle]
            if rank_of(text[left:right_end]) != entry >> _POSITION_BITS:
                continue
            end[left], end[middle] = right_end, 0
            if right_end < length:
                start_before[right_end] = left
                rank = rank_of(text[left : end[right_end]])
                if rank is not None:
                    heappush(queue, rank << _POSITION_BITS | left)
            before = start_before[left]
            if before >= 0:
                rank = rank_of(text[before:right_end])
                if rank is not None:
                    heappush(queue, rank << _POSITION_BITS | before)
        return self._pieces(text, end)

    def _pieces(self, text: str, end: list[int]) -> list[int]:
        ids: list[int] = []
        left = 0
        while left < len(text):
            piece = text[left : end[left]]
            token = self._ids.get(piece)
            if token is None:
                ids.extend(self._byte_ids[byte] for byte in piece.encode())
            else:
                ids.append(token)
            left = end[left]
        return ids


def _byte_ids(vocabulary: Vocabulary) -> tuple[int, ...]:
    ids = []
    for byte in range(256):
        token = vocabulary.ids.get(f"<0x{byte:02X}>")
        if token is None:
            raise TokenizerError(
                f"The llama vocabulary has no byte token <0x{byte:02X}>, so some texts could not "
                "be encoded; use a GGUF whose vocabulary has all 256."
            )
        ids.append(token)
    return tuple(ids)
