"""One request on its way through the engine."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from orcd_batch.engine.block_manager import BlockCopy
from orcd_batch.engine.request import Completion, FinishReason, Request, StopCheck


@dataclass(slots=True, eq=False)
class Sequence:
    """A request with its tokens and its place in the cache.

    token_ids: prompt, then completion. num_computed_tokens: how many of them have keys and values
    in the cache. max_tokens: prompt and completion together may not grow beyond this. block_table:
    the cache blocks of positions 0, 64, 128, …, reserved in full on admission. seen_ids: distinct
    token ids so far, kept only where a repetition penalty asks for them. num_pending: tokens that
    launched steps sample and nobody has read yet, the last one in row pending_row of its step.
    copy: what must be copied into its blocks before its first step. num_admitted_before: sequences
    that the scheduler had admitted when this one was queued.
    """

    request: Request
    max_tokens: int
    token_ids: list[int]
    completion: Completion
    stop_check: StopCheck | None = None
    seen_ids: set[int] | None = None
    num_computed_tokens: int = 0
    num_pending: int = 0
    pending_row: int = 0
    is_finished: bool = False
    block_table: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    copy: BlockCopy | None = None
    is_admitted: bool = False
    num_admitted_before: int = 0

    @classmethod
    def of(cls, request: Request, max_model_len: int) -> "Sequence":
        prompt = request.prompt_token_ids
        penalized = request.params.repetition_penalty != 1.0
        return cls(
            request=request,
            max_tokens=min(len(prompt) + request.params.max_tokens, max_model_len),
            token_ids=list(prompt),
            completion=Completion(request.key, prompt),
            stop_check=request.make_stop_check() if request.make_stop_check else None,
            seen_ids=set(prompt) if penalized else None,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and completion, the pending ones too."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether its next chunk is a token that was sampled."""
        return self.num_computed_tokens >= len(self.request.prompt_token_ids)

    @property
    def num_cache_positions(self) -> int:
        """Cache positions it can ever fill: the last sampled token's are never needed."""
        return self.max_tokens - 1

    def append(self, token: int, logprob: float, margin: float, fingerprint: int) -> bool:
        """Takes a sampled token; True when it ends the sample (finish_reason is then set)."""
        self.token_ids.append(token)
        if self.seen_ids is not None:
            self.seen_ids.add(token)
        completion = self.completion
        completion.token_ids.append(token)
        completion.logprobs.append(logprob)
        completion.margins.append(margin)
        completion.fingerprints.append(fingerprint)
        reason = self._finish_reason(token)
        if reason is not None:
            completion.finish_reason = reason
            self.is_finished = True
        return self.is_finished

    def fail(self, reason: str) -> None:
        """Turns the completion into an error; what was generated so far is dropped."""
        request = self.request
        self.completion = Completion(
            request.key, request.prompt_token_ids, finish_reason="error", error=reason
        )
        self.is_finished = True

    def _finish_reason(self, token: int) -> FinishReason | None:
        request = self.request
        if token in request.stop_token_ids and not request.params.ignore_eos:
            return "stop"
        if self.stop_check is not None and self.stop_check(self.completion.token_ids):
            return "stop"
        return "length" if len(self.token_ids) >= self.max_tokens else None
