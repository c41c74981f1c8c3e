"""What Hydra calls with each composed job: to run it at once, or to collect it for a sweep."""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from orcd_batch.config import JobOptions, resolve
from orcd_batch.errors import ConfigError, Interrupted, OrcdError
from orcd_batch.job_logs import JobLogs, lines_about
from orcd_batch.job_run import Result, shown_path
from orcd_batch.sweep.groups import SweepJob, named, run_sweep

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one job."""

    document: dict[str, Any]
    error: OrcdError | None = None
    code: int = 0


@dataclass(frozen=True, slots=True)
class _Collected:
    """One job of a multirun before it runs; `job` is the error where its config is bad.

    name: what sets it apart from the others. handlers, level: the log that Hydra has opened for it.
    """

    name: str
    directory: Path
    job: SweepJob | OrcdError
    handlers: list[logging.Handler]
    level: int
    debug: bool


class Jobs:
    """The task function: Hydra calls it with each job's config, its directory and log in place.

    Called, it runs the job at once; the fused launcher uses `collect` and `run_collected`.
    outcomes: of the jobs so far, in order. is_alone: this is no multirun. bug: the exception that
    no user should see.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self._args = args
        self._swept: list[str] | None = None
        self._collected: list[_Collected] = []
        self.outcomes: list[Outcome] = []
        self.is_alone = False
        self.bug: Exception | None = None

    def __call__(self, cfg: DictConfig) -> None:
        self.is_alone = HydraConfig.get().mode != RunMode.MULTIRUN
        try:
            self._take(partial(self._run, cfg), _run_directory(), cfg.debug)
        except Exception as error:
            self.bug = error
            raise
        if not self.is_alone:
            _tell_errors([(self._name(), self.outcomes[-1])])
        if self.interrupt is not None:
            raise KeyboardInterrupt

    def collect(self, cfg: DictConfig) -> None:
        """Takes one job of a multirun."""
        root, directory = logging.getLogger(), _run_directory()
        job: SweepJob | OrcdError
        try:
            job = SweepJob(self._options(cfg), directory, self._name(), self._swept_values())
        except OrcdError as error:
            job = error
        except Exception as error:
            self.bug = error
            raise
        logged = root.handlers[:], root.level
        self._collected.append(_Collected(self._name(), directory, job, *logged, cfg.debug))

    def run_collected(self, sweep_directory: Path) -> None:
        """Runs what was collected; what ends one job does not touch the others.

        An interrupt ends them all, and those that Hydra would launch next.
        """
        collected, self._collected = self._collected, []
        handlers = {job.directory: job.handlers for job in collected}
        try:
            with JobLogs(handlers, min(job.level for job in collected)):
                self._run_all(collected, sweep_directory)
        except Exception as error:
            self.bug = error
            raise
        if self.interrupt is not None:
            raise KeyboardInterrupt

    @property
    def interrupt(self) -> Interrupted | None:
        """What ended the jobs before their time."""
        errors = (outcome.error for outcome in self.outcomes)
        return next((error for error in errors if isinstance(error, Interrupted)), None)

    def _run_all(self, collected: Sequence[_Collected], sweep_directory: Path) -> None:
        good = [job.job for job in collected if isinstance(job.job, SweepJob)]
        swept = [job for job in good if job.options.check is None]
        results = iter(run_sweep(swept, sweep_directory)) if swept else iter(())
        for job in collected:
            with lines_about(job.directory):
                self._take(partial(self._result_of, job, results), job.directory, job.debug)
        names = [job.name for job in collected]
        _tell_errors(zip(names, self.outcomes[-len(names) :], strict=True))

    def _take(self, run: Callable[[], Outcome], directory: Path, debug: bool) -> None:
        """The outcome of one job; where it failed, the log says why."""
        try:
            self.outcomes.append(run())
        except OrcdError as error:
            log.error("%s", error, exc_info=debug)
            document = {"error": str(error), "directory": shown_path(directory)}
            self.outcomes.append(Outcome(document, error, error.exit_code))

    def _result_of(self, job: _Collected, results: Iterator[Result]) -> Outcome:
        """What the sweep gave for the job; a check runs now. Raises the error that ended it."""
        if isinstance(job.job, OrcdError):
            raise job.job
        if job.job.options.check is not None:
            if self.interrupt is not None:
                raise self.interrupt
            return _run_alone(job.job.options, job.directory)
        result = next(results)
        if isinstance(result, OrcdError):
            raise result
        return Outcome(result)

    def _run(self, cfg: DictConfig) -> Outcome:
        return _run_alone(self._options(cfg), _run_directory())

    def _options(self, cfg: DictConfig) -> JobOptions:
        """The checked options of a job. Raises ConfigError."""
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            _refuse_swept_columns(self._swept_keys(), cfg.dataset.sampling_columns)
        return resolve(cfg)

    def _name(self) -> str:
        """What sets this job of a multirun apart."""
        swept = self._swept_values()
        return " ".join(f"{k}={v}" for k, v in swept.items()) or _run_directory().name

    def _swept_keys(self) -> list[str]:
        """What the multirun varies: on the command line, or in the sweeper's own parameters."""
        if self._swept is None:
            overrides = [a for a in self._args if "=" in a and not a.startswith("-")]
            hydra: Any = HydraConfig.get()
            params = OmegaConf.select(hydra, "sweeper.params") or {}
            overrides += [f"{key}={value}" for key, value in params.items()]
            parsed = OverridesParser.create().parse_overrides(overrides)
            swept = (o.key_or_group for o in parsed if o.is_sweep_override())
            self._swept = list(dict.fromkeys(swept))
        return self._swept

    def _swept_values(self) -> dict[str, str]:
        """Those of this job's overrides that the multirun varies."""
        overrides = (o.lstrip("+").partition("=") for o in HydraConfig.get().overrides.task)
        given = {key: value for key, _, value in overrides}
        return {key: given[key] for key in self._swept_keys() if key in given}


def _run_alone(options: JobOptions, directory: Path) -> Outcome:
    if options.check is not None:
        from orcd_batch.nightly.check import run_check

        document, code = run_check(options, directory)
        return Outcome(document, code=code)
    from orcd_batch.job import run_job

    return Outcome(run_job(options, directory))


def _tell_errors(outcomes: Iterable[tuple[str, Outcome]]) -> None:
    """One line for each error of a multirun's jobs, with those that it ended by name."""
    failed: dict[str, list[str]] = {}
    for name, outcome in outcomes:
        if outcome.error is not None:
            failed.setdefault(str(outcome.error), []).append(name)
    for sentence, names in failed.items():
        print(f"orcd-batch: {named(names)}: {sentence}", file=sys.stderr)


def _run_directory() -> Path:
    return Path(HydraConfig.get().runtime.output_dir)


def _refuse_swept_columns(swept: Sequence[str], columns: Sequence[str]) -> None:
    """A sweep over an option that every row overrides would compute the same job many times."""
    for key in swept:
        field = key.removeprefix("sampling.")
        if field in columns:
            raise ConfigError(
                f"sampling.{field} is swept, but dataset.sampling_columns takes it from the "
                f"column {field!r} of each row: drop one of the two."
            )
