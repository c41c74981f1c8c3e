"""Jobs on one page: config → rows → requests → engine → rows → Parquet."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orcd_batch.config import JobOptions
from orcd_batch.data import DatasetOptions, InputDataset, preview
from orcd_batch.engine_factory import BuiltEngine, build_engine, choose_engine
from orcd_batch.errors import OrcdError
from orcd_batch.generation import Generation
from orcd_batch.interrupts import Interrupts
from orcd_batch.job_run import JobRun, output_of
from orcd_batch.model_source import ModelSource
from orcd_batch.prompts import sampling_params
from orcd_batch.provenance import job_identity, manifest, run_totals
from orcd_batch.reproducibility.environment import environment
from orcd_batch.view import JobView

# Rows shown at the end of a run.
_NUM_SAMPLES = 4

Result = dict[str, Any] | OrcdError


def run_job(options: JobOptions, directory: Path) -> dict[str, Any]:
    """Runs one job, or what is left of it, and returns the document of its last line of stdout.

    directory: the run directory (log file, default output). Raises an OrcdError whose sentence
    says what to do; finished rows are kept in every case.
    """
    (result,) = run_jobs([(options, directory)])
    if isinstance(result, OrcdError):
        raise result
    return result


def run_jobs(jobs: Sequence[tuple[JobOptions, Path]]) -> list[Result]:
    """Runs jobs that differ in nothing but sampling and output over one loaded model.

    Each job's output is what it would have been alone, bit for bit. Returns each job's document,
    or the error that ended it alone; raises what ends them all.
    """
    started = time.perf_counter()
    options = jobs[0][0]
    if len(jobs) == 1:
        sampling_params(options.sampling, {})  # out of range: refused before any work
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        view = stack.enter_context(JobView())
        dataset = InputDataset.open(options.data, _dataset_options(options))
        source = stack.enter_context(ModelSource.open(options.model))
        source.check_input(dataset.kind, dataset.columns.input)
        choice = choose_engine(options.engine.kind)
        surroundings = environment(choice.kind)
        input_hash = dataset.content_hash()

        def opened(job: JobOptions, directory: Path) -> JobRun | OrcdError:
            identity = job_identity(job, source, input_hash, choice, surroundings)
            try:
                run = JobRun.open(job, output_of(job, directory), identity, dataset)
            except OrcdError as error:
                return error
            stack.callback(run.close)
            return run

        def loading(part: str, done: int, total: int) -> None:
            view.loading(part, done, total)
            interrupts.stop_if_requested()

        runs = [opened(*job) for job in jobs]
        unfinished = [run for run in runs if isinstance(run, JobRun) and run.goes_on]
        if unfinished:
            source.begin_confirmation()
            built = stack.enter_context(build_engine(source, options.engine, choice, loading))
            view.say(
                f"{source.config.name} on {choice.device} ({choice.kind} engine: {choice.reason})"
            )
            loaded = time.perf_counter()
            generation = Generation(unfinished, dataset, source, built.engine, view)
            generation.run(interrupts)
            seconds = {"start_s": loaded - started, "generate_s": time.perf_counter() - loaded}
            for run, num_tokens in zip(unfinished, generation.num_tokens, strict=True):
                statistics = _statistics(seconds, num_tokens, built)
                _finish(run, dataset, source, built, statistics, surroundings)
        return [_result(run, dataset, unfinished, view) for run in runs]


def _statistics(seconds: dict[str, float], num_tokens: int, built: BuiltEngine) -> dict[str, Any]:
    """Times and counts of this run; the engine's are those of all jobs that ran on it."""
    return {
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: round(value, 3) for name, value in seconds.items()},
        "tokens_computed": num_tokens,
        "tokens_per_s": round(num_tokens / seconds["generate_s"], 2),
        **built.engine.statistics(),
        **built.memory(),
    }


def _finish(
    run: JobRun,
    dataset: InputDataset,
    source: ModelSource,
    built: BuiltEngine,
    statistics: dict[str, Any],
    surroundings: dict[str, Any],
) -> None:
    """Writes the output with its manifest; an error ends this job alone."""
    if run.error is not None:
        return
    try:
        totals = run_totals(run.store)
        run.check_errors(totals.num_errors)
        run.store.assemble(
            dataset,
            manifest(run.options, run.identity, source, built, totals, statistics, surroundings),
        )
    except OrcdError as error:
        run.error = error


def _result(
    run: JobRun | OrcdError, dataset: InputDataset, computed: Sequence[JobRun], view: JobView
) -> Result:
    if isinstance(run, OrcdError):
        return run
    if run.error is not None:
        return run.error
    if run not in computed:
        view.say(f"{run.output} is already complete; overwrite=true computes it again.")
    document = run.document()
    columns = dataset.columns
    samples = preview(run.output, columns.input, dataset.options.output_prefix, _NUM_SAMPLES)
    view.finish(samples, document)
    return document


def _dataset_options(options: JobOptions) -> DatasetOptions:
    names = {f.name for f in fields(DatasetOptions)}
    plain = {k: v for k, v in asdict(options.dataset).items() if k in names}
    return DatasetOptions(**plain)
