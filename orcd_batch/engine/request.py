"""What goes into the engine and what comes out. Token ids only: text stays outside."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

from orcd_batch.errors import ConfigError

# Samples of one row; each is a sequence of its own, so that a mistyped number cannot fill memory.
MAX_SAMPLES = 16_384

FinishReason = Literal["stop", "length", "error"]

# Called after each sampled token with all completion ids so far; True ends the sample ("stop").
StopCheck = Callable[[Sequence[int]], bool]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one row is decoded.

    temperature: 0 is greedy. top_k: 0 keeps all. top_p, min_p: probabilities in [0, 1].
    repetition_penalty: > 0, 1 is off. seed: 0 … 2**64 - 1. max_tokens: at least 1.
    stop: strings that end a sample. n: samples per row. ignore_eos: benchmarks only.
    Raises ConfigError for a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    n: int = 1
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("top_k", "seed", "max_tokens", "n"):
            self._set(name, Integral, int, "a whole number")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            self._set(name, Real, float, "a number")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        checks = (
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k >= -1, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 (off) and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 is off)"),
            ("seed", 0 <= self.seed < 2**64, "between 0 and 18446744073709551615"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("n", 1 <= self.n <= MAX_SAMPLES, f"between 1 and {MAX_SAMPLES}"),
            ("stop", all(self.stop), "strings that are not empty"),
        )
        for name, good, allowed in checks:
            if not good:
                value = getattr(self, name)
                raise ConfigError(f"{name}={value!r} is out of range: it must be {allowed}.")
        object.__setattr__(self, "top_k", max(self.top_k, 0))

    def _set(self, name: str, kind: type, convert: Callable[[Any], object], wanted: str) -> None:
        """The field as a plain Python number; numpy's are taken too. Raises ConfigError."""
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ConfigError(f"{name}={value!r} must be {wanted}.")
        object.__setattr__(self, name, convert(value))


@dataclass(frozen=True, slots=True)
class Request:
    """One sample of one row.

    key: whatever the caller recognises it by. stream: the 64-bit digest of (typed id, sample
    index) that selects the row's random numbers. stop_token_ids end the sample ("stop").
    make_stop_check: builds a fresh StopCheck for stop strings, or None.
    """

    key: object
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    stream: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    make_stop_check: Callable[[], StopCheck] | None = None


@dataclass(slots=True)
class Completion:
    """The result of one request; the per-token lists have one entry per completion id.

    token_ids include the token that ended the sample. logprobs: natural log, under the model
    before temperature and filters. margins: best minus second-best logit. fingerprints: signed
    64-bit hashes of the fp32 logits rows. error is None when fine, else the reason.
    """

    key: object
    prompt_token_ids: tuple[int, ...]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    fingerprints: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    error: str | None = None
