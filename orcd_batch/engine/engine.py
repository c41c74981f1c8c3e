"""The engine loop: schedule, forward, sample, append."""

from collections.abc import Sequence as Items

from orcd_batch.backend.ops import BLOCK_SIZE, Ops, Sampled
from orcd_batch.engine.batch_arrays import make_batch, make_sample_batch
from orcd_batch.engine.block_manager import BlockManager
from orcd_batch.engine.request import Completion, Request
from orcd_batch.engine.scheduler import Chunk, Scheduler
from orcd_batch.engine.sequence import Sequence
from orcd_batch.errors import ConfigError
from orcd_batch.model import ModelConfig, Weights, forward


class Engine:
    """Continuous batching over a paged KV cache.

    max_num_seqs: sequences running at once. max_num_batched_tokens: tokens of one step, at least
    max_num_seqs. num_blocks: cache blocks of BLOCK_SIZE positions. max_model_len: prompt and
    completion together. None of them, nor prefix_caching, changes a bit of a completion (except
    that max_model_len ends one). Raises ConfigError where they contradict each other.
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
    ) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ConfigError(
                f"engine.max_num_batched_tokens={max_num_batched_tokens} is less than "
                f"engine.max_num_seqs={max_num_seqs}, so that not every running sequence could "
                "get a token in each step; raise the first or lower the second."
            )
        self.config, self.weights, self.ops = config, weights, ops
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.max_model_len = max_model_len
        self.caches = ops.allocate_kv_cache(
            config.num_layers, num_blocks, config.num_kv_heads, config.head_dim
        )
        self.block_manager = BlockManager(num_blocks, prefix_caching)
        self.scheduler = Scheduler(self.block_manager, max_num_seqs, max_num_batched_tokens)
        self._refused: list[Completion] = []
        self.num_steps = self.prefill_tokens = self.decode_tokens = 0

    def add(self, request: Request) -> None:
        """Queues one request; one that cannot be run comes out of `step` as an error."""
        sequence = Sequence.of(request, self.max_model_len)
        reason = self._refusal(sequence)
        if reason is None:
            self.scheduler.waiting.append(sequence)
        else:
            sequence.fail(reason)
            self._refused.append(sequence.completion)

    def step(self) -> list[Completion]:
        """Computes one batch of tokens and returns the requests that are finished now."""
        refused, self._refused = self._refused, []
        chunks = self.scheduler.schedule()
        if not chunks:
            return refused
        batch = self.ops.place(make_batch(chunks))
        logits = forward(self.ops, self.config, self.weights, self.caches, batch)
        sampling = [chunk.sequence for chunk in chunks if chunk.gives_logits]
        sampled = self.ops.sample(logits, make_sample_batch(sampling)) if sampling else None
        return refused + self._advance(chunks, sampled)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._refused or self.scheduler.waiting or self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    def statistics(self) -> dict[str, int]:
        """Counts since the engine was built: steps, and tokens by how they came about."""
        return {
            "steps": self.num_steps,
            "prefill_tokens": self.prefill_tokens,
            "decode_tokens": self.decode_tokens,
            "shared_prompt_tokens": self.scheduler.num_shared_tokens,
        }

    def reset(self) -> None:
        """Drops all requests; the cache and its reusable prompt blocks stay."""
        self.scheduler.reset()
        self._refused.clear()

    def close(self) -> None:
        """Drops all requests and closes the ops."""
        self.reset()
        self.ops.close()

    def _advance(self, chunks: Items[Chunk], sampled: Sampled | None) -> list[Completion]:
        self.num_steps += 1
        finished = []
        row = 0
        for chunk in chunks:
            sequence, gives_logits = chunk.sequence, chunk.gives_logits
            self.scheduler.advance(chunk)
            if sequence.completion.token_ids:
                self.decode_tokens += 1
            else:
                self.prefill_tokens += chunk.num_tokens
            if gives_logits:
                assert sampled is not None, "a chunk gives logits and nothing was sampled"
                if self._take_token(sequence, sampled, row):
                    self.scheduler.finish(sequence)
                    finished.append(sequence.completion)
                row += 1
        return finished

    def _take_token(self, sequence: Sequence, sampled: Sampled, row: int) -> bool:
        """Appends the sampled row to its sequence; True when the sequence is finished."""
        if not sampled.finite[row]:
            sequence.fail(
                f"The logits at position {len(sequence.token_ids) - 1} are not finite (infinity "
                "or NaN): the model overflows on this prompt; shorten or change it."
            )
            return True
        return sequence.append(
            int(sampled.token_ids[row]),
            float(sampled.logprobs[row]),
            float(sampled.margins[row]),
            int(sampled.fingerprints[row]),
        )

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
