"""Rows in, finished rows out: the samples of one job, or of several jobs, over one engine."""

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from orcd_batch.config import SamplingOptions
from orcd_batch.data import InputRow, SampleResult
from orcd_batch.engine.engine import Engine
from orcd_batch.engine.request import Completion, Request
from orcd_batch.errors import RowError
from orcd_batch.prompts import RequestBuilder
from orcd_batch.reproducibility.hashes import numerics_hash, token_hash
from orcd_batch.text import Tokenizer, cut_at_stop

log = logging.getLogger(__name__)


@dataclass(slots=True)
class JobRow:
    """An input row on its way through one of the runner's jobs; done when every sample is in.

    job: index among the runner's jobs.
    """

    job: int
    row: InputRow
    num_samples: int
    stop: tuple[str, ...] = ()
    results: list[SampleResult] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.results) == self.num_samples

    @property
    def error(self) -> str | None:
        """Why the row, or one of its samples, could not be run."""
        return next((result.error for result in self.results if result.error is not None), None)


class RowRunner:
    """One engine at work on the rows of jobs that differ in nothing but sampling.

    Rows are given with `submit` while there is room; `step` returns those that became done, their
    samples in order. A row that cannot be run comes back with error results.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        builder: RequestBuilder,
        sampling: Sequence[SamplingOptions],
    ) -> None:
        """sampling: of each job."""
        self._engine, self._tokenizer, self._builder = engine, tokenizer, builder
        self._sampling = sampling
        self._dropped: set[int] = set()
        self._pending: dict[tuple[int, int], JobRow] = {}
        self._queued: deque[Request] = deque()
        self._done: list[JobRow] = []
        self.num_tokens = [0] * len(sampling)

    @property
    def has_room(self) -> bool:
        """Whether less than one batch of samples waits for the engine."""
        self._feed()
        return not self._queued

    @property
    def has_unfinished(self) -> bool:
        return bool(self._done or self._queued or self._engine.has_unfinished)

    def submit(self, row: InputRow, jobs: Iterable[int] = (0,)) -> None:
        """Queues the row for each of the jobs, side by side: its prompt is read once."""
        try:
            prompt = self._builder.prompt(row)
        except RowError as error:
            for job in jobs:
                self._fail(self._started(row, job), str(error))
            return
        for job in jobs:
            self._submit_to(job, row, prompt)
        self._feed()

    def step(self) -> list[JobRow]:
        """Computes one batch; the rows that are done now."""
        self._feed()
        if self._engine.has_unfinished:
            for completion in self._engine.step():
                self._take(completion)
        done, self._done = self._done, []
        return [row for row in done if row.job not in self._dropped]

    def drop(self, job: int) -> None:
        """Forgets a job: what is queued of it is not run, what is running is not returned."""
        self._dropped.add(job)
        self._queued = deque(r for r in self._queued if _key(r.key)[0] != job)

    def _submit_to(self, job: int, row: InputRow, prompt: tuple[int, ...]) -> None:
        started = self._started(row, job)
        try:
            requests = self._builder.requests(row, prompt, self._sampling[job], job)
        except RowError as error:
            self._fail(started, str(error))
            return
        started.stop = requests[0].params.stop
        self._pending[job, row.index] = started
        self._queued.extend(requests)

    def _started(self, row: InputRow, job: int) -> JobRow:
        return JobRow(job, row, self._builder.num_samples(row, self._sampling[job]))

    def _fail(self, started: JobRow, reason: str) -> None:
        for sample in range(started.num_samples):
            started.results.append(_failed(started.row, sample, reason))
        self._done.append(started)

    def _feed(self) -> None:
        while self._queued and self._engine.num_waiting < self._engine.max_num_seqs:
            self._engine.add(self._queued.popleft())

    def _take(self, completion: Completion) -> None:
        job, index, sample = _key(completion.key)
        started = self._pending[job, index]
        if completion.error is not None:
            started.results.append(_failed(started.row, sample, completion.error))
        else:
            self.num_tokens[job] += len(completion.token_ids)
            started.results.append(self._result(started, sample, completion))
        if started.is_done:
            del self._pending[job, index]
            started.results.sort(key=lambda result: result.sample_index)
            self._done.append(started)

    def _result(self, started: JobRow, sample: int, completion: Completion) -> SampleResult:
        ids = completion.token_ids
        return SampleResult(
            row_index=started.row.index,
            sample_index=sample,
            id=started.row.id,
            completion=self._text(completion, started.stop),
            completion_ids=ids,
            finish_reason=completion.finish_reason,
            prompt_tokens=len(completion.prompt_token_ids),
            completion_tokens=len(ids),
            logprob=float(sum(completion.logprobs)),
            token_logprobs=completion.logprobs,
            margins=completion.margins,
            fingerprints=completion.fingerprints,
            token_hash=token_hash(completion.prompt_token_ids, ids),
            numerics_hash=numerics_hash(completion.fingerprints),
        )

    def _text(self, completion: Completion, stop: tuple[str, ...]) -> str:
        ids = completion.token_ids
        if ids and ids[-1] in self._tokenizer.stop_token_ids:
            ids = ids[:-1]
        return cut_at_stop(self._tokenizer.decode(ids, after=completion.prompt_token_ids[-1]), stop)


def _key(key: object) -> tuple[int, int, int]:
    """(job, row index, sample index), as RequestBuilder names its requests."""
    assert isinstance(key, tuple), f"not a key of ours: {key!r}"
    job, index, sample = key
    return job, index, sample


def _failed(row: InputRow, sample: int, reason: str) -> SampleResult:
    log.warning("row %d (id %r): %s", row.index, row.id, reason)
    return SampleResult.failed(row.index, sample, row.id, reason, "input")
