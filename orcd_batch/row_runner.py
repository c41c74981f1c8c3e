"""Rows in, finished rows out: the samples of one job, or of several jobs, over one engine."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

from orcd_batch.config import SamplingOptions
from orcd_batch.data import InputRow, PartStore, SampleResult
from orcd_batch.engine.engine import Engine
from orcd_batch.engine.request import Completion, Request
from orcd_batch.errors import RowError
from orcd_batch.prompts import RequestBuilder, num_samples
from orcd_batch.reproducibility.hashes import numerics_hash, token_hash
from orcd_batch.text import Tokenizer, cut_at_stop

# Of a sample: (job, row index, sample index).
SampleKey = tuple[int, int, int]


# A row's index and id, and why it could not be run.
Refused = tuple[int, int | str, str]


class FinishedRows(Protocol):
    """Rows of one job that are done."""

    @property
    def job(self) -> int: ...
    @property
    def num_results(self) -> int: ...
    @property
    def refused(self) -> Sequence[Refused]:
        """The rows that, or a sample of which, could not be run."""
        ...

    def keep_in(self, store: PartStore) -> None: ...


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
    def num_results(self) -> int:
        return len(self.results)

    @property
    def refused(self) -> Sequence[Refused]:
        """The row, when it or one of its samples could not be run."""
        errors = (result.error for result in self.results if result.error is not None)
        return [(self.row.index, self.row.id, error) for error in islice(errors, 1)]

    def keep_in(self, store: PartStore) -> None:
        store.add(self.results)


class RowRunner:
    """One engine at work on the rows of jobs that differ in nothing but sampling.

    Rows are given with `submit` while there is room; `step` returns those that became done, their
    samples in order. A row that cannot be run comes back with error results. Samples of a row whose
    parameters decide on the same completion, as greedy ones of every seed do, are one request.

    num_tokens: completion tokens of each job's finished samples.
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
        self.note = ""

    @property
    def max_num_seqs(self) -> int:
        """Rows worth giving between two steps."""
        return self._engine.max_num_seqs

    @property
    def num_sampled_tokens(self) -> int:
        """Of all jobs, those of unfinished rows included."""
        return self._engine.sampled_tokens

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
        distinct: dict[tuple[object, ...], Request] = {}
        for job in jobs:
            self._submit_to(job, row, prompt, distinct)
        self._queued.extend(distinct.values())
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
        for request in self._queued:
            samples = _samples(request.key)
            samples[:] = [key for key in samples if key[0] != job]
        self._queued = deque(request for request in self._queued if request.key)

    def _submit_to(
        self,
        job: int,
        row: InputRow,
        prompt: tuple[int, ...],
        distinct: dict[tuple[object, ...], Request],
    ) -> None:
        """distinct: the row's requests so far, by what decides on their completions."""
        started = self._started(row, job)
        try:
            requests = self._builder.requests(row, prompt, self._sampling[job], job)
        except RowError as error:
            self._fail(started, str(error))
            return
        started.stop = requests[0].params.stop
        self._pending[job, row.index] = started
        for sample, request in enumerate(requests):
            first = distinct.setdefault(_deciding(request), replace(request, key=[]))
            _samples(first.key).append((job, row.index, sample))

    def _started(self, row: InputRow, job: int) -> JobRow:
        return JobRow(job, row, num_samples(row, self._sampling[job]))

    def _fail(self, started: JobRow, reason: str) -> None:
        for sample in range(started.num_samples):
            started.results.append(_failed(started.row, sample, reason))
        self._done.append(started)

    def _feed(self) -> None:
        while self._queued and self._engine.num_waiting < self._engine.max_num_seqs:
            self._engine.add(self._queued.popleft())

    def _take(self, completion: Completion) -> None:
        for key in _samples(completion.key):
            self._take_sample(*key, completion)

    def _take_sample(self, job: int, index: int, sample: int, completion: Completion) -> None:
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


def _samples(key: object) -> list[SampleKey]:
    """The samples that a request of ours is for, which it has as its key."""
    assert isinstance(key, list), f"not a key of ours: {key!r}"
    return key


def _deciding(request: Request) -> tuple[object, ...]:
    """What decides on a completion, next to the prompt: equal values, equal bits.

    A greedy one depends on no random number and on no filter.
    """
    p = request.params
    common = (p.repetition_penalty, p.max_tokens, p.stop, p.ignore_eos)
    if p.temperature == 0:
        return common
    return (*common, p.temperature, p.top_k, p.top_p, p.min_p, p.seed, request.stream)


def _failed(row: InputRow, sample: int, reason: str) -> SampleResult:
    return SampleResult.failed(row.index, sample, row.id, reason, "input")
