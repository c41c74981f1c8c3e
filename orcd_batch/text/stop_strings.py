"""Stop strings: noticing them while tokens come, and cutting the finished text."""

from collections.abc import Sequence

from orcd_batch.errors import ConfigError
from orcd_batch.text.tokenizer import Tokenizer


class StopStringCheck:
    """Whether a growing completion has come to contain one of the stop strings.

    Call it with all completion ids so far, after each token or every few; it looks only at the new
    ones, and at as many characters before them as a stop string could have begun in.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], after: int | None = None) -> None:
        """after: the prompt's last token if `decode` is given it too. Raises ConfigError."""
        self._stop = _checked(stop)
        self._stream = tokenizer.stream(after)
        self._num_seen = 0
        self._overlap = max(map(len, self._stop), default=1) - 1
        self._tail = ""
        self._found = False

    def __call__(self, ids: Sequence[int]) -> bool:
        """True from the token on that completed a stop string."""
        while self._num_seen < len(ids) and not self._found:
            text = self._tail + self._stream.push(ids[self._num_seen])
            self._num_seen += 1
            self._found = any(stop in text for stop in self._stop)
            self._tail = text[-self._overlap :] if self._overlap else ""
        return self._found


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """`text` up to the earliest place where a stop string begins; all of it if there is none.

    Raises ConfigError for an empty stop string.
    """
    places = (text.find(string) for string in _checked(stop))
    return text[: min((place for place in places if place >= 0), default=len(text))]


def _checked(stop: Sequence[str]) -> tuple[str, ...]:
    if isinstance(stop, str) or not all(isinstance(string, str) and string for string in stop):
        raise ConfigError(
            f"Stop strings must be a list of texts that are not empty, found {stop!r:.100}."
        )
    return tuple(stop)
