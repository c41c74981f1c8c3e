"""Jobs on one page: config → rows → requests → engine → rows → Parquet."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orcd_batch.collector import relaxed_collector
from orcd_batch.config import JobOptions
from orcd_batch.data import DatasetOptions, InputDataset, preview
from orcd_batch.errors import OrcdError
from orcd_batch.generation import Generation
from orcd_batch.interrupts import Interrupts
from orcd_batch.job_logs import lines_about
from orcd_batch.job_run import JobRun, Result, output_of
from orcd_batch.loaded_engine import LoadedEngine, Machinery
from orcd_batch.model_source import ModelSource
from orcd_batch.phases import Phases
from orcd_batch.prompts import sampling_params
from orcd_batch.provenance import (
    choose_here,
    job_identity,
    manifest,
    run_statistics,
    run_totals,
)
from orcd_batch.view import JobView

if TYPE_CHECKING:
    from orcd_batch.scale_out.driver import ScaleOut


def run_job(options: JobOptions, directory: Path, view: JobView | None = None) -> dict[str, Any]:
    """Runs one job, or what is left of it, and returns the document of its last line of stdout.

    directory: the run directory (log file, default output). view: who watches. Raises an OrcdError
    whose sentence says what to do; finished rows are kept in every case.
    """
    (result,) = run_jobs([(options, directory)], view)
    if isinstance(result, OrcdError):
        raise result
    return result


def run_jobs(
    jobs: Sequence[tuple[JobOptions, Path]],
    view: JobView | None = None,
    interrupts: Interrupts | None = None,
) -> list[Result]:
    """Runs jobs that differ in nothing but sampling and output over one loaded model.

    Each job's output is what it would have been alone, bit for bit. interrupts: whoever has more
    to run has entered them. Returns each job's document, or the error that ended it alone; raises
    what ends them all.
    """
    started, phases = time.perf_counter(), Phases()
    phases.end("options and imports")
    options = jobs[0][0]
    if len(jobs) == 1:
        sampling_params(options.sampling, {})  # out of range: refused before any work
    with ExitStack() as stack:
        stack.enter_context(lines_about(*(directory for _, directory in jobs)))
        interrupts = interrupts or stack.enter_context(Interrupts())
        view = stack.enter_context(view or JobView())
        dataset = InputDataset.open(options.data, dataset_options(options))
        phases.end("input")
        source = stack.enter_context(ModelSource.open(options.model))
        source.check_input(dataset.kind, dataset.columns.input)
        phases.end("model file")
        scale_out = stack.enter_context(_scale_out(options, jobs[0][1]))
        check = interrupts.stop_if_requested
        choice, surroundings = (
            scale_out.choose(check) if scale_out else choose_here(options.engine.kind)
        )
        phases.end("device")
        input_hash = dataset.content_hash()

        def opened(job: JobOptions, directory: Path) -> JobRun | OrcdError:
            identity = job_identity(job, source, input_hash, choice, surroundings)
            try:
                run = JobRun.open(job, output_of(job, directory), identity, dataset, directory)
            except OrcdError as error:
                return error
            stack.callback(run.close)
            return run

        def loading(part: str, done: int, total: int) -> None:
            view.loading(part, done, total)
            check()

        runs = [opened(*job) for job in jobs]
        unfinished = [run for run in runs if isinstance(run, JobRun) and run.goes_on]
        if unfinished:
            sampling = [run.options.sampling for run in unfinished]
            machinery: Machinery
            if scale_out:
                num_rows = dataset.num_rows - min(run.store.num_done_rows for run in unfinished)
                identity = unfinished[0].identity
                machinery = scale_out.start(choice, sampling, identity, num_rows, check, view.say)
            else:
                engine = LoadedEngine(source, options, sampling, choice, loading)
                machinery = stack.enter_context(engine)
            view.say(
                f"{source.config.name} on {choice.device} ({choice.kind} engine: {choice.reason})"
            )
            source.begin_confirmation()  # reads the whole file: not beside the loading
            loaded = time.perf_counter()
            phases.end("weights and engine")
            generation = Generation(unfinished, dataset, source, machinery.runner, view, phases)
            stack.enter_context(relaxed_collector())
            generation.run(interrupts)
            seconds = {"start_s": loaded - started, "generate_s": time.perf_counter() - loaded}
            for run, num_tokens in zip(unfinished, generation.num_tokens, strict=True):
                statistics = run_statistics(seconds, num_tokens, generation.num_tokens, machinery)
                statistics["phases_s"] = phases.ends()
                with lines_about(run.directory):
                    _finish(run, dataset, source, machinery, statistics, surroundings)
        results: list[Result] = []
        for outcome, (_, directory) in zip(runs, jobs, strict=True):
            with lines_about(directory):
                results.append(_result(outcome, dataset, unfinished, view))
        return results


def _finish(
    run: JobRun,
    dataset: InputDataset,
    source: ModelSource,
    machinery: Machinery,
    statistics: dict[str, Any],
    surroundings: dict[str, Any],
) -> None:
    """Writes the output with its manifest; an error ends this job alone."""
    if run.error is not None:
        return
    try:
        totals = run_totals(run.store)
        run.check_errors(totals.num_errors)
        identity, options = run.identity, run.options
        run.store.assemble(
            dataset,
            manifest(options, identity, source, machinery, totals, statistics, surroundings),
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
        view.already_complete(run.output)
    document = run.document()
    prefix, shown = dataset.options.output_prefix, view.num_samples
    samples = preview(run.output, dataset.columns.input, prefix, shown) if shown else []
    view.finish(samples, document)
    return document


def _scale_out(options: JobOptions, directory: Path) -> "AbstractContextManager[ScaleOut | None]":
    if options.scale_out.kind == "none":
        return nullcontext()
    from orcd_batch.scale_out.driver import ScaleOut

    return ScaleOut(options, directory)


def dataset_options(options: JobOptions) -> DatasetOptions:
    """How to read the job's input, without what concerns the run."""
    names = {f.name for f in fields(DatasetOptions)}
    plain = {k: v for k, v in asdict(options.dataset).items() if k in names}
    return DatasetOptions(**plain)
