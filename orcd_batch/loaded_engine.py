"""An engine with a job's runner over it: what computes rows, in this process or in a worker."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, Self

from orcd_batch.config import JobOptions, SamplingOptions
from orcd_batch.data import InputRow
from orcd_batch.engine_factory import EngineChoice, build_engine
from orcd_batch.model import Progress
from orcd_batch.model_source import ModelSource
from orcd_batch.prompts import RequestBuilder
from orcd_batch.row_runner import FinishedRows, RowRunner


class Runner(Protocol):
    """Rows in, finished rows out; what RowRunner does over one engine.

    max_num_seqs: how many rows are worth giving between two steps. num_tokens: completion tokens
    of each job. num_sampled_tokens: of all jobs, unfinished rows included.
    """

    @property
    def has_room(self) -> bool: ...
    @property
    def has_unfinished(self) -> bool: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def num_tokens(self) -> Sequence[int]: ...
    @property
    def num_sampled_tokens(self) -> int: ...
    @property
    def note(self) -> str: ...
    def submit(self, row: InputRow, jobs: Iterable[int]) -> None: ...
    def step(self) -> Sequence[FinishedRows]: ...
    def drop(self, job: int) -> None: ...


class Machinery(Protocol):
    """What computes a job's rows, and what is to be told of it."""

    @property
    def runner(self) -> Runner: ...
    def describe(self) -> dict[str, Any]:
        """The engine, for the manifest."""
        ...

    def workers(self) -> list[dict[str, Any]]:
        """Each worker, for the manifest; none where the job runs in one process."""
        ...

    def memory(self) -> dict[str, int]: ...
    def statistics(self) -> dict[str, float]: ...


class LoadedEngine:
    """One engine in this process; a context manager that closes it."""

    def __init__(
        self,
        source: ModelSource,
        options: JobOptions,
        sampling: Sequence[SamplingOptions],
        choice: EngineChoice,
        progress: Progress | None = None,
    ) -> None:
        """options: of the first job. sampling: of each job. Raises as `build_engine` does."""
        self.built = build_engine(source, options.engine, choice, progress, debug=options.debug)
        builder = RequestBuilder(source.tokenizer, source.template, options.model.chat)
        self.runner = RowRunner(self.built.engine, source.tokenizer, builder, sampling)

    def describe(self) -> dict[str, Any]:
        return self.built.describe()

    def workers(self) -> list[dict[str, Any]]:
        return []

    def memory(self) -> dict[str, int]:
        return self.built.memory()

    def statistics(self) -> dict[str, float]:
        return self.built.engine.statistics()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:
        self.built.__exit__(*raised)
