"""Typed, bounded access to the metadata keys of a file's own architecture."""

import math

from orcd_batch.checkpoint.gguf_file import GGUFFile
from orcd_batch.checkpoint.header_reader import quoted, shown
from orcd_batch.errors import CheckpointError

MAX_COUNT = 2**31 - 1


def contradiction(gguf: GGUFFile, what: str) -> CheckpointError:
    return CheckpointError(f"{gguf.path} contradicts itself: {what}; convert it again.")


def unsupported(
    gguf: GGUFFile, what: str, next_step: str = "choose a plain llama, phi3 or qwen2 model"
) -> CheckpointError:
    return CheckpointError(f"{gguf.path} cannot be run: {what}; {next_step}.")


class ArchitectureFacts:
    """Reads `{architecture}.{key}`. Every method raises CheckpointError naming the whole key."""

    def __init__(self, gguf: GGUFFile, architecture: str) -> None:
        self._gguf = gguf
        self._prefix = f"{architecture}."

    def names(self) -> list[str]:
        """The keys there are, without the architecture in front."""
        return [
            key.removeprefix(self._prefix)
            for key in self._gguf.metadata
            if key.startswith(self._prefix)
        ]

    def get(self, key: str) -> object:
        """The value as it is, or None."""
        return self._gguf.metadata.get(self._prefix + key)

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """A count from `minimum` to MAX_COUNT; without a default the key must be there."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "must be one integer")
        if not minimum <= value <= MAX_COUNT:
            raise self._wrong(key, f"must lie between {minimum} and {MAX_COUNT}")
        return value

    def number(self, key: str, default: float | None = None, minimum: float = 0.0) -> float:
        """A finite number of at least `minimum`; without a default the key must be there."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "must be one number")
        if not math.isfinite(value) or value < minimum:
            raise self._wrong(key, f"must be finite and at least {minimum}")
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self._required(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "must be a string")
        return value

    def _required(self, key: str, default: object) -> object:
        value = self.get(key)
        if value is None and default is None:
            raise CheckpointError(
                f"{self._gguf.path} lacks the metadata key {quoted(self._prefix + key)}, "
                "without which the model cannot be built; convert it again."
            )
        return default if value is None else value

    def _wrong(self, key: str, rule: str) -> CheckpointError:
        return CheckpointError(
            f"{self._gguf.path} sets {quoted(self._prefix + key)} to "
            f"{shown(self.get(key))}, which {rule}; convert it again."
        )
