"""The model file of a job: its facts, tokenizer, chat template and content hash."""

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Self

from orcd_batch.checkpoint import GGUFFile, ModelConfig, read_model_config
from orcd_batch.checkpoint.content_hash import (
    cached_model_hash,
    model_hash,
    remember_model_hash,
)
from orcd_batch.checkpoint.hub import resolve_model_path
from orcd_batch.config import ModelOptions
from orcd_batch.errors import CheckpointError, ConfigError
from orcd_batch.text import ChatTemplate, Tokenizer


def cache_directory() -> Path:
    """Where facts worth keeping between runs live: $XDG_CACHE_HOME/orcd_batch or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "orcd_batch"


class ModelSource:
    """An open model file with what a job needs to know of it before weights are loaded."""

    def __init__(self, gguf: GGUFFile, options: ModelOptions) -> None:
        """Raises CheckpointError or TokenizerError when the file cannot be run as asked."""
        self.gguf = gguf
        self.options = options
        self.config: ModelConfig = read_model_config(gguf, options.sliding_window)
        if options.architectures and self.config.architecture not in options.architectures:
            raise CheckpointError(
                f"{gguf.path} holds architecture {self.config.architecture!r}, but "
                f"model={options.name} expects {' or '.join(options.architectures)}: "
                "choose the model option that fits the file."
            )
        self.tokenizer = Tokenizer.from_metadata(gguf.metadata)
        source = gguf.metadata.get("tokenizer.chat_template")
        self._template_source = source if isinstance(source, str) else None
        self.template = self._open_template()
        self._confirmation: Future[str] | None = None
        remembered = cached_model_hash(gguf.path, cache_directory())
        self._is_remembered = remembered is not None
        self.content_hash = remembered or self._computed_hash()

    @classmethod
    def open(cls, options: ModelOptions) -> Self:
        """Opens `options.path`, downloading it first when it is an hf:// path."""
        try:
            path = resolve_model_path(options.path)
        except CheckpointError as error:
            if options.hub is None or options.path.startswith("hf://"):
                raise
            raise CheckpointError(f"{error} Or fetch it with model.path={options.hub}.") from error
        gguf = GGUFFile.open(path)
        try:
            return cls(gguf, options)
        except BaseException:
            gguf.close()
            raise

    @property
    def template_hash(self) -> str | None:
        """Hex SHA-256 of the chat template's text, None without a template."""
        if self._template_source is None:
            return None
        return hashlib.sha256(self._template_source.encode()).hexdigest()

    def check_input(self, kind: str, column: str) -> None:
        """Raises ConfigError when the input needs a chat template and the file has none.

        Where it has one, its process starts. kind: what the column holds: "prompt", "messages" or
        "token_ids".
        """
        if kind == "token_ids":
            return
        if self.template is not None:
            if kind == "messages" or self.options.chat:
                self.template.start()
            return
        if kind == "messages":
            raise ConfigError(
                f"{self.gguf.path} has no chat template, which the messages in the column "
                f"{column!r} need: give plain prompts instead."
            )
        if self.options.chat:
            raise ConfigError(
                f"{self.gguf.path} has no chat template: model.chat=false sends each prompt as "
                "plain text."
            )

    def begin_confirmation(self) -> None:
        """Starts to hash the file in the background when a remembered hash was used to start."""
        if self._is_remembered and self._confirmation is None:
            hasher = ThreadPoolExecutor(1, "model-hash")
            self._confirmation = hasher.submit(self._computed_hash)
            hasher.shutdown(wait=False)

    def confirm_hash(self) -> None:
        """Waits for the file's real hash when `begin_confirmation` was called.

        Raises CheckpointError, at every call, when the file is not the one remembered.
        """
        if self._confirmation is None:
            return
        if self._confirmation.result() != self.content_hash:
            raise CheckpointError(
                f"{self.gguf.path} changed while its size and time stayed the same: nothing of "
                "this run is kept; run it again, over an older output with overwrite=true."
            )
        self._confirmation, self._is_remembered = None, False

    def close(self) -> None:
        """Ends the template worker and unmaps the file."""
        if self._confirmation is not None:
            wait([self._confirmation])
        if self.template is not None:
            self.template.close()
        self.gguf.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_template(self) -> ChatTemplate | None:
        if self._template_source is None:
            return None
        return ChatTemplate(
            self._template_source,
            self.tokenizer.bos_token,
            self.tokenizer.eos_token,
            self.options.chat_date,
        )

    def _computed_hash(self) -> str:
        found = model_hash(self.gguf)
        remember_model_hash(self.gguf.path, cache_directory(), found, self.gguf.identity)
        return found


def described(config: ModelConfig) -> dict[str, Any]:
    """The model's shape facts as a plain dict, for the manifest."""
    return {name: getattr(config, name) for name in config.__slots__}
