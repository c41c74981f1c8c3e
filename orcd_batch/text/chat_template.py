"""Chat templates: a conversation to the one string the model was trained to continue."""

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date as Date
from typing import Any, Self

from orcd_batch.errors import ClosedError, ConfigError, TemplateError
from orcd_batch.text.template_process import TemplateProcess, WorkerDied

_MAX_SOURCE = 1 << 20
_WALL_TIMES_CPU = 25
_NEXT_STEP = "use model.chat=false with plain prompts, or a file with another template."


class ChatTemplate:
    """One template of one model, rendered in a process of its own that has hard limits."""

    def __init__(
        self,
        source: str,
        bos_token: str,
        eos_token: str,
        date: str,
        *,
        time_limit_s: float = 0.5,
        memory_limit_bytes: int = 128 << 20,
        output_limit: int = 4 << 20,
    ) -> None:
        """Remember what to render; the process starts with the first `render`.

        date: what `strftime_now` sees, as YYYY-MM-DD. time_limit_s: processor time of one
        rendering. memory_limit_bytes: beyond what the idle process uses. output_limit: characters.
        Raises ConfigError for a date that is none.
        """
        try:
            Date.fromisoformat(date)
        except ValueError as error:
            raise ConfigError(
                f"The chat date is {date!r:.40}, which is not of the form 2024-07-26."
            ) from error
        self._settings: dict[str, Any] = {
            "source": source,
            "bos_token": bos_token,
            "eos_token": eos_token,
            "date": date,
            "time_limit_s": time_limit_s,
            "memory_limit_bytes": memory_limit_bytes,
            "output_limit": output_limit,
        }
        self._process: TemplateProcess | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._broken = ""
        if len(source) > _MAX_SOURCE:
            self._broken = (
                f"The chat template is {len(source)} characters long, more than the {_MAX_SOURCE} "
                f"allowed; {_NEXT_STEP}"
            )

    def render(self, messages: Sequence[Mapping[str, object]]) -> str:
        """The prompt for `messages`, ending where the assistant is to speak.

        Each message needs a `role` (a text that is not empty) and a `content` (a text).
        Raises TemplateError when the messages are malformed, the template refuses them or fails,
        or goes beyond its limits; ClosedError after `close`.
        """
        _check_messages(messages)
        with self._lock:
            if self._closed:
                raise ClosedError("This chat template is closed; open the model again.")
            answer = self._ask([dict(message) for message in messages])
        if "error" in answer:
            raise TemplateError(f"The chat template failed: {_reason(answer)}")
        text: str = answer["text"]
        return text

    def start(self) -> None:
        """Starts the process in the background, so that the first `render` need not wait for it.

        What goes wrong with it is told by `render`.
        """
        threading.Thread(target=self._start, name="chat-template", daemon=True).start()

    def close(self) -> None:
        """End the process; a second call does nothing."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, messages: list[dict[str, object]]) -> dict[str, Any]:
        """The process's answer. One that something else killed gets a second try."""
        for is_last in (False, True):
            try:
                return self._running().ask(messages)
            except WorkerDied as error:
                if error.beyond_limits:
                    raise TemplateError(self._too_long()) from error
                if is_last:
                    raise TemplateError(
                        f"The chat template's process ended twice ({error}); {_NEXT_STEP}"
                    ) from error
            except (TypeError, ValueError) as error:
                raise TemplateError(
                    f"The messages cannot be given to a template ({error}); {_NEXT_STEP}"
                ) from error
        raise AssertionError("the second try neither answered nor failed")

    def _start(self) -> None:
        with self._lock, suppress(TemplateError, WorkerDied):
            if not self._closed:
                self._running()

    def _running(self) -> TemplateProcess:
        """The process, started if need be; a template that is bad in itself is not tried again."""
        if self._broken:
            raise TemplateError(self._broken)
        if self._process is None or self._process.ended:
            wall_limit_s = self._settings["time_limit_s"] * _WALL_TIMES_CPU
            try:
                self._process = TemplateProcess(self._settings, wall_limit_s)
            except WorkerDied as error:
                self._broken = self._too_long() if error.beyond_limits else ""
                raise
            if "error" in self._process.greeting:
                self._process.end()
                self._broken = f"The chat template is not valid: {_reason(self._process.greeting)}"
                raise TemplateError(self._broken)
        return self._process

    def _too_long(self) -> str:
        limit_s = self._settings["time_limit_s"]
        return f"The chat template took more than {limit_s:g} s of processor time; {_NEXT_STEP}"


def _reason(answer: Mapping[str, Any]) -> str:
    return f"{str(answer['error']).rstrip('.')}; {_NEXT_STEP}"


def _check_messages(messages: Sequence[Mapping[str, object]]) -> None:
    if not messages:
        raise TemplateError("There are no messages to render; give at least one.")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TemplateError(
                f"Message {index} must be a role and a content, found {message!r:.60}."
            )
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise TemplateError(f"The role of message {index} must be a text, found {role!r:.60}.")
        if not isinstance(content, str):
            raise TemplateError(
                f"The content of message {index} must be a text, found {content!r:.60}."
            )
