"""Rows become requests: one prompt as token ids, with its sampling parameters, per sample."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from orcd_batch.config import SamplingOptions
from orcd_batch.data import InputRow
from orcd_batch.engine.request import MAX_SAMPLES, Request, SamplingParams, StopCheck
from orcd_batch.errors import OrcdError, RowError
from orcd_batch.reproducibility.hashes import stream_digest
from orcd_batch.text import ChatTemplate, StopStringCheck, Tokenizer

# A template may print any role; one that no supported model was trained on is a mistake in the row.
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


def sampling_params(options: SamplingOptions, overrides: Mapping[str, Any]) -> SamplingParams:
    """The job's sampling options with one row's overrides on top.

    Raises RowError when an override is out of range.
    """
    params = SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        max_tokens=options.max_tokens,
        stop=tuple(options.stop),
        n=options.n,
        ignore_eos=options.ignore_eos,
    )
    if not overrides:
        return params
    try:
        return replace(params, **overrides)
    except OrcdError as error:
        raise RowError(str(error)) from error


def num_samples(row: InputRow, options: SamplingOptions) -> int:
    """How many output rows the row gets, even when it cannot be run."""
    n = row.overrides.get("n", options.n)
    return n if isinstance(n, int) and 1 <= n <= MAX_SAMPLES else options.n


class RequestBuilder:
    """Turns input rows into engine requests with one tokenizer and one chat template."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None, wrap_prompts: bool
    ) -> None:
        """wrap_prompts: render a string prompt as one user message of the template."""
        self._tokenizer = tokenizer
        self._template = template
        self._wrap_prompts = wrap_prompts

    def prompt(self, row: InputRow) -> tuple[int, ...]:
        """The row's prompt as token ids. Raises RowError with the reason it cannot be run."""
        if row.error is not None:
            raise RowError(row.error)
        prompt = tuple(self._token_ids(row))
        if not prompt:
            raise RowError("The prompt is empty after tokenization: give it some text.")
        return prompt

    def requests(
        self, row: InputRow, prompt: tuple[int, ...], options: SamplingOptions, job: int = 0
    ) -> list[Request]:
        """One request per sample of the row, with the key (job, row index, sample index).

        Raises RowError when one of the row's own sampling parameters is out of range.
        """
        params = sampling_params(options, row.overrides)
        stop_ids = frozenset() if params.ignore_eos else self._tokenizer.stop_token_ids
        return [
            Request(
                key=(job, row.index, sample),
                prompt_token_ids=prompt,
                params=params,
                stream=stream_digest(row.id, sample),
                stop_token_ids=stop_ids,
                make_stop_check=self._stop_check(params.stop, prompt[-1]),
            )
            for sample in range(params.n)
        ]

    def _token_ids(self, row: InputRow) -> Sequence[int]:
        if row.token_ids is not None:
            return row.token_ids
        if row.messages is not None:
            return self._rendered(row.messages)
        assert row.prompt is not None, f"row {row.index} has no prompt, messages or token ids"
        if self._wrap_prompts:
            return self._rendered([{"role": "user", "content": row.prompt}])
        return self._tokenizer.encode(row.prompt, add_bos=True)

    def _rendered(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[int]:
        assert self._template is not None, "messages without a chat template"
        for index, message in enumerate(messages):
            if (role := message.get("role")) not in KNOWN_ROLES:
                raise RowError(
                    f"The role {role!r:.60} of message {index} is unknown; use one of "
                    f"{', '.join(KNOWN_ROLES)}."
                )
        return self._tokenizer.encode(self._template.render(messages), add_bos=False)

    def _stop_check(self, stop: tuple[str, ...], after: int) -> Callable[[], StopCheck] | None:
        if not stop:
            return None
        return lambda: StopStringCheck(self._tokenizer, stop, after)
