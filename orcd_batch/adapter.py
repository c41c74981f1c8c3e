"""The Python API: one class for every supported model, and its tokenizer."""

from collections.abc import Sequence
from functools import cached_property
from operator import index as as_index
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from orcd_batch import text
from orcd_batch.checkpoint import GGUFFile, ModelConfig, read_model_config
from orcd_batch.checkpoint.hub import resolve_model_path
from orcd_batch.config import EngineOptions, check_engine
from orcd_batch.engine.context import Context
from orcd_batch.engine.request import Completion, Request, SamplingParams
from orcd_batch.engine_factory import BuiltEngine, OpenModel, build_engine, choose_engine
from orcd_batch.errors import ClosedError, ConfigError, RowError
from orcd_batch.model import Progress
from orcd_batch.reproducibility.hashes import stream_digest
from orcd_batch.text import StopStringCheck


class Tokenizer(text.Tokenizer):
    """The tokenizer of a GGUF file; see `encode` and `decode`."""

    @classmethod
    def from_gguf(cls, path: str | Path) -> Self:
        """Reads the vocabulary of a model or vocabulary-only GGUF.

        Raises CheckpointError for a file that cannot be read, TokenizerError for its vocabulary.
        """
        with GGUFFile.open(resolve_model_path(str(path))) as gguf:
            return cls.from_metadata(gguf.metadata)


class LlamaInferenceAdapter:
    """A loaded model: logits on demand, or whole batches of completions. Not thread-safe.

    A context manager; after `close()` every call raises ClosedError.
    """

    def __init__(self, built: BuiltEngine, path: Path) -> None:
        """Prefer `load`."""
        self._built = built
        self._path = path
        self._engine = built.engine
        self._context = Context(built.engine)
        self._has_context = self._closed = False

    @classmethod
    def load(
        cls,
        path: str | Path,
        engine: str = "auto",
        *,
        sliding_window: int | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Self:
        """Loads a GGUF file (a path or hf://owner/repo/file.gguf@revision).

        engine: "auto", "cuda" or "numpy". sliding_window: None is as the file says, 0 is off.
        options: fields of `config.EngineOptions`, such as max_num_seqs=64. Raises
        CheckpointError, ConfigError or DeviceError with what to do next.
        """
        try:
            engine_options = EngineOptions(kind=engine, **options)
        except TypeError as error:
            raise ConfigError(
                f"LlamaInferenceAdapter.load has no such option: {error}; the engine's are "
                f"{', '.join(EngineOptions.__slots__[1:])}."
            ) from error
        check_engine(engine_options)
        resolved = resolve_model_path(str(path))
        choice = choose_engine(engine)
        with GGUFFile.open(resolved) as gguf:
            model = OpenModel(gguf, read_model_config(gguf, sliding_window))
            return cls(build_engine(model, engine_options, choice, progress), resolved)

    @property
    def config(self) -> ModelConfig:
        """The facts of the model."""
        return self._built.config

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def hidden_dim(self) -> int:
        return self.config.hidden_size

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    @property
    def vram_usage(self) -> int:
        """Bytes of weights and KV cache in the engine's memory (RAM on the numpy engine)."""
        return self._built.weight_bytes + self._built.kv_cache_bytes

    def prefill(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Starts a fresh context with ids (T,); returns the logits of every position (T, V) fp32.

        Raises RowError for an empty prompt or an id outside the vocabulary, ContextFullError for
        one longer than the context, ClosedError after `close()`.
        """
        self._check_open()
        self._has_context = False
        logits = self._context.prefill([as_index(token) for token in ids])
        self._has_context = True
        return logits

    def decode(self, token_id: int) -> NDArray[np.float32]:
        """Appends one token to the context; returns its logits (V,) fp32.

        Errors as `prefill`; RowError before the first `prefill`.
        """
        self._check_open()
        if not self._has_context:
            raise RowError("There is no context to continue: call prefill first.")
        return self._context.decode(as_index(token_id))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Completes all prompts with continuous batching.

        prompts: token ids. params: one for all (default: greedy) or one per prompt. Returns
        params.n completions per prompt, in order; their key is (prompt index, sample index). A
        prompt that cannot be run gives completions with finish_reason "error" and the reason.
        Raises ConfigError when the numbers of prompts and params differ.
        """
        self._check_open()
        requests = [
            request
            for index, (prompt, chosen) in enumerate(self._paired(prompts, params))
            for request in self._requests(index, prompt, chosen)
        ]
        self._context.release()
        try:
            for request in requests:
                self._engine.add(request)
            finished: dict[object, Completion] = {}
            while self._engine.has_unfinished:
                finished.update((done.key, done) for done in self._engine.step())
        finally:
            self._engine.reset()
        return [finished[request.key] for request in requests]

    def close(self) -> None:
        """Frees weights and cache. Closing twice is harmless."""
        if not self._closed:
            self._closed = True
            self._built.close()
            del self._built.engine.weights, self._built.engine.caches

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self._path)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("This model was closed; load it again to use it.")

    def _paired(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[tuple[Sequence[int], SamplingParams]]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ConfigError(
                f"generate got {len(prompts)} prompts and {len(params)} SamplingParams; give one "
                "for all or one for each."
            )
        return list(zip(prompts, params, strict=True))

    def _requests(self, index: int, prompt: Sequence[int], params: SamplingParams) -> list[Request]:
        stop_ids = frozenset() if params.ignore_eos else self._tokenizer.stop_token_ids
        stop = params.stop
        ids = tuple(as_index(token) for token in prompt)
        after = ids[-1] if ids else None
        make_check = (lambda: StopStringCheck(self._tokenizer, stop, after)) if stop else None
        return [
            Request(
                (index, sample), ids, params, stream_digest(index, sample), stop_ids, make_check
            )
            for sample in range(params.n)
        ]
