"""The loop of a run: rows into the engine, finished samples into the store."""

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from orcd_batch.config import JobOptions
from orcd_batch.data import InputDataset, InputRow, PartStore, SampleResult
from orcd_batch.engine.engine import Engine
from orcd_batch.engine.request import Completion, Request
from orcd_batch.errors import RowError
from orcd_batch.interrupts import Interrupts
from orcd_batch.model_source import ModelSource
from orcd_batch.prompts import RequestBuilder
from orcd_batch.reproducibility.hashes import numerics_hash, token_hash
from orcd_batch.text import Tokenizer, cut_at_stop
from orcd_batch.view import JobView

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _PendingRow:
    """An input row whose samples are still being generated."""

    row: InputRow
    num_samples: int
    stop: tuple[str, ...] = ()
    results: list[SampleResult] = field(default_factory=list)


class Generation:
    """The loop between the input, the engine and the store."""

    def __init__(
        self,
        options: JobOptions,
        dataset: InputDataset,
        source: ModelSource,
        engine: Engine,
        store: PartStore,
        view: JobView,
    ) -> None:
        self._raise_errors = options.dataset.on_error == "raise"
        self._tokenizer: Tokenizer = source.tokenizer
        self._builder = RequestBuilder(
            source.tokenizer, source.template, options.sampling, options.model.chat
        )
        self._engine = engine
        self._dataset, self._source, self._store, self._view = dataset, source, store, view
        self._pending: dict[int, _PendingRow] = {}
        self._queued: deque[Request] = deque()
        self.num_rows = 0
        self.num_tokens = 0

    def run(self, interrupts: Interrupts) -> None:
        """Runs every row that the store does not have yet.

        Raises Interrupted after committing what is finished, RowError under on_error=raise.
        """
        rows = self._dataset.rows(skip=self._store.is_done)
        self._view.start_rows(self._store.num_done_rows, self._dataset.num_rows)
        try:
            while self._admit(rows) or self._engine.has_unfinished:
                interrupts.stop_if_requested()
                for completion in self._engine.step():
                    self._finish_sample(completion)
                self._view.rows(self._store.num_done_rows, self._engine.sampled_tokens)
                self._commit(force=False)
        finally:
            self._commit(force=True)

    def _admit(self, rows: Iterator[InputRow]) -> bool:
        """Keeps the engine's queue one batch ahead; False once nothing is left to queue.

        At most one batch of rows is read at a time, so that a stretch of rows that cannot be run
        is committed like any other.
        """
        for _ in range(self._engine.max_num_seqs):
            while self._queued and self._engine.num_waiting < self._engine.max_num_seqs:
                self._engine.add(self._queued.popleft())
            if self._queued:
                return True
            row = next(rows, None)
            if row is None:
                return False
            self._submit(row)
        return True

    def _submit(self, row: InputRow) -> None:
        num_samples = self._builder.num_samples(row)
        self._pending[row.index] = _PendingRow(row, num_samples)
        try:
            requests = self._builder.requests(row)
        except RowError as error:
            for sample in range(num_samples):
                self._keep(row.index, self._failed(row, sample, str(error)))
            return
        self._pending[row.index].stop = requests[0].params.stop
        self._queued.extend(requests)

    def _finish_sample(self, completion: Completion) -> None:
        assert isinstance(completion.key, tuple), f"not a key of ours: {completion.key!r}"
        index, sample = completion.key
        row, stop = self._pending[index].row, self._pending[index].stop
        if completion.error is not None:
            self._keep(index, self._failed(row, sample, completion.error))
            return
        ids = completion.token_ids
        self.num_tokens += len(ids)
        self._keep(
            index,
            SampleResult(
                row_index=index,
                sample_index=sample,
                id=row.id,
                completion=self._text(completion, stop),
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
            ),
        )

    def _text(self, completion: Completion, stop: tuple[str, ...]) -> str:
        ids = completion.token_ids
        if ids and ids[-1] in self._tokenizer.stop_token_ids:
            ids = ids[:-1]
        return cut_at_stop(self._tokenizer.decode(ids, after=completion.prompt_token_ids[-1]), stop)

    def _failed(self, row: InputRow, sample: int, reason: str) -> SampleResult:
        if self._raise_errors:
            raise RowError(
                f"Row {row.index} (id {row.id!r}) cannot be run: {reason} Finished rows are kept; "
                "dataset.on_error=record goes on and writes an error row instead."
            )
        log.warning("row %d (id %r): %s", row.index, row.id, reason)
        return SampleResult.failed(row.index, sample, row.id, reason, "input")

    def _keep(self, index: int, result: SampleResult) -> None:
        pending = self._pending[index]
        pending.results.append(result)
        if len(pending.results) < pending.num_samples:
            return
        del self._pending[index]
        self._store.add(sorted(pending.results, key=lambda r: r.sample_index))
        self.num_rows += pending.num_samples

    def _commit(self, force: bool) -> None:
        if force or self._store.commit_due:
            self._source.confirm_hash()
            self._store.commit()
