"""The engine loop: schedule, forward, sample, append."""

import time
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

from orcd_batch.backend.ops import BLOCK_SIZE, Batch, Ops, SampleBatch, Sampled
from orcd_batch.engine.batch_arrays import StepArrays, make_copies
from orcd_batch.engine.block_manager import BlockManager
from orcd_batch.engine.request import Completion, Request
from orcd_batch.engine.scheduler import Chunk, Scheduler
from orcd_batch.engine.sequence import Sequence
from orcd_batch.errors import ConfigError
from orcd_batch.model import ModelConfig, Weights, forward


@dataclass(frozen=True, slots=True)
class _Step:
    """A launched step. sampling: the sequences that get a token from it, row by row.

    prefilled, decoded: the chunks' sequences and tokens. results: what `Ops.collect` takes.
    """

    sampling: list[Sequence]
    prefilled: int
    decoded: list[Sequence]
    results: Any


class Engine:
    """Continuous batching over a paged KV cache.

    max_num_seqs: sequences running at once. max_num_batched_tokens: tokens of one step, at least
    max_num_seqs. num_blocks: cache blocks of BLOCK_SIZE positions. max_model_len: prompt and
    completion together. run_ahead: a step is launched before the results of the one before it are
    read, for ops that do not wait for results; a sample's end is then noticed one step late, and
    what was computed beyond it is dropped. None of them, nor prefix_caching, changes a bit of a
    completion (except that max_model_len ends one). Raises ConfigError where they contradict each
    other.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        ops: Ops,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_blocks: int,
        max_model_len: int,
        prefix_caching: bool = True,
        run_ahead: bool = False,
    ) -> None:
        check_limits(max_num_seqs, max_num_batched_tokens)
        self.config, self.weights, self.ops = config, weights, ops
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.max_model_len = max_model_len
        self.caches = ops.allocate_kv_cache(
            config.num_layers, num_blocks, config.num_kv_heads, config.head_dim
        )
        self.block_manager = BlockManager(num_blocks, prefix_caching)
        self.scheduler = Scheduler(self.block_manager, max_num_seqs, max_num_batched_tokens)
        self._refused: list[Completion] = []
        self._run_ahead = run_ahead
        self._launched: deque[_Step] = deque()
        self._arrays = StepArrays()
        self.num_steps = self.prefill_tokens = self.decode_tokens = self.sampled_tokens = 0
        self._prefill_s = self._decode_s = self._clock = 0.0

    def add(self, request: Request) -> None:
        """Queues one request; one that cannot be run comes out of `step` as an error."""
        sequence = Sequence.of(request, self.max_model_len)
        reason = self._refusal(sequence)
        if reason is None:
            self.scheduler.add(sequence)
        else:
            sequence.fail(reason)
            self._refused.append(sequence.completion)

    def step(self) -> list[Completion]:
        """Computes one batch of tokens and returns the requests that are known to be finished."""
        finished, self._refused = self._refused, []
        chunks = self.scheduler.schedule()
        if not self._launched:
            self._clock = time.perf_counter()
        if chunks:
            self._launch(chunks)
        while len(self._launched) > (self._run_ahead and bool(chunks)):
            finished += self._collect()
        return finished

    @property
    def has_unfinished(self) -> bool:
        scheduler = self.scheduler
        return bool(self._refused or scheduler.waiting or scheduler.running or self._launched)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    def statistics(self) -> dict[str, float]:
        """Since the engine was built: steps, tokens by how they came about, and wall time.

        prefill_s: seconds until the results of steps that computed prompt tokens were read,
        whatever else they computed; decode_s: those of all others. With run_ahead they include
        what the host did meanwhile.
        """
        return {
            "steps": self.num_steps,
            "prefill_tokens": self.prefill_tokens,
            "decode_tokens": self.decode_tokens,
            "shared_prompt_tokens": self.scheduler.num_shared_tokens,
            "prefill_s": round(self._prefill_s, 4),
            "decode_s": round(self._decode_s, 4),
        }

    def reset(self) -> None:
        """Drops all requests; the cache and its reusable prompt blocks stay."""
        self._launched.clear()
        self._arrays = StepArrays()
        self.scheduler.reset()
        self._refused.clear()

    def close(self) -> None:
        """Drops all requests and closes the ops."""
        self.reset()
        self.ops.close()

    def _launch(self, chunks: Items[Chunk]) -> None:
        sampling = [chunk.sequence for chunk in chunks if chunk.gives_logits]
        batch = self._arrays.batch(chunks)
        copies = make_copies(chunks)
        if copies is not None:
            self.ops.copy_blocks(self.caches, copies)
        parameters = self._arrays.sample_batch(sampling) if sampling else None
        results = self.ops.launch(self._compute, batch, parameters)
        decoded = [chunk.sequence for chunk in chunks if chunk.sequence.is_decoding]
        prefilled = sum(chunk.num_tokens for chunk in chunks) - len(decoded)
        self._launched.append(_Step(sampling, prefilled, decoded, results))
        self.scheduler.advance(chunks)
        for row, sequence in enumerate(sampling):
            sequence.num_pending += 1
            sequence.pending_row = row

    def _compute(self, batch: Batch, sampling: SampleBatch | None) -> Sampled | None:
        logits = forward(self.ops, self.config, self.weights, self.caches, batch)
        return None if sampling is None else self.ops.sample(logits, sampling)

    def _collect(self) -> list[Completion]:
        """Reads the oldest launched step."""
        sampled = self.ops.collect(self._launched[0].results)
        step = self._launched.popleft()
        self._take_time(step)
        self.num_steps += 1
        self.prefill_tokens += step.prefilled
        self.decode_tokens += sum(not sequence.is_finished for sequence in step.decoded)
        finished = []
        assert sampled is not None or not step.sampling, "nothing was sampled"
        columns = _host_columns(sampled) if sampled is not None else [[]]
        assert len(columns[0]) >= len(step.sampling), f"{len(columns[0])} rows: too few"
        # Padding comes last.
        for sequence, finite, *values in zip(step.sampling, *columns, strict=False):
            sequence.num_pending -= 1
            if sequence.is_finished:
                self.scheduler.release(sequence)
                continue
            self.sampled_tokens += 1
            if not finite:
                sequence.fail(_not_finite(sequence))
            if not finite or sequence.append(*values):
                self.scheduler.finish(sequence)
                finished.append(sequence.completion)
        return finished

    def _take_time(self, step: _Step) -> None:
        now = time.perf_counter()
        if step.prefilled:
            self._prefill_s += now - self._clock
        else:
            self._decode_s += now - self._clock
        self._clock = now

    def _refusal(self, sequence: Sequence) -> str | None:
        """Why the request can never run, or None."""
        prompt = sequence.request.prompt_token_ids
        if not prompt:
            return "The prompt is empty: give it at least one token."
        if len(prompt) >= self.max_model_len:
            return (
                f"The prompt has {len(prompt)} tokens, and the context of {self.max_model_len} "
                "has no room for one more; shorten it."
            )
        if not (min(prompt) >= 0 and max(prompt) < self.config.vocab_size):
            bad = next(i for i in prompt if not 0 <= i < self.config.vocab_size)
            return (
                f"Token id {bad} of the prompt is outside the vocabulary of "
                f"{self.config.vocab_size} tokens (0 … {self.config.vocab_size - 1})."
            )
        return self._too_large(sequence.num_cache_positions)

    def _too_large(self, num_positions: int) -> str | None:
        capacity = self.block_manager.num_blocks * BLOCK_SIZE
        if num_positions <= capacity:
            return None
        return (
            f"Prompt and max_tokens need {num_positions} cache positions and the KV cache has "
            f"{capacity}; raise engine.kv_cache_bytes or lower max_tokens."
        )


def check_limits(max_num_seqs: int, max_num_batched_tokens: int) -> None:
    """Raises ConfigError where not every running sequence could get a token in each step."""
    if max_num_batched_tokens < max_num_seqs:
        raise ConfigError(
            f"engine.max_num_batched_tokens={max_num_batched_tokens} is less than "
            f"engine.max_num_seqs={max_num_seqs}, so that not every running sequence could "
            "get a token in each step; raise the first or lower the second."
        )


def _host_columns(sampled: Sampled) -> list[list[Any]]:
    """finite, token, logprob, margin and fingerprint of all rows, as plain values."""
    names = ("finite", "token_ids", "logprobs", "margins", "fingerprints")
    return [getattr(sampled, name).tolist() for name in names]


def _not_finite(sequence: Sequence) -> str:
    return (
        f"The logits at position {len(sequence.token_ids) - 1} are not finite (infinity "
        "or NaN): the model overflows on this prompt; shorten or change it."
    )
