"""One job on one page: config → rows → requests → engine → rows → Parquet."""

import os
import time
from contextlib import ExitStack
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orcd_batch.config import JobOptions
from orcd_batch.data import DatasetOptions, InputDataset, PartStore, preview
from orcd_batch.engine_factory import build_engine, choose_engine
from orcd_batch.errors import RowError
from orcd_batch.generation import Generation
from orcd_batch.interrupts import Interrupts
from orcd_batch.model_source import ModelSource
from orcd_batch.prompts import sampling_params
from orcd_batch.provenance import job_identity, manifest, run_totals
from orcd_batch.reproducibility.environment import environment
from orcd_batch.view import JobView

# Rows shown at the end of a run.
_NUM_SAMPLES = 4


def run_job(options: JobOptions, directory: Path) -> dict[str, Any]:
    """Runs one job, or what is left of it, and returns the document of its last line of stdout.

    directory: the run directory (log file, default output). Raises an OrcdError whose sentence
    says what to do; finished rows are kept in every case.
    """
    sampling_params(options.sampling, {})  # out-of-range options are refused before any work
    started = time.perf_counter()
    output = options.output or _shown(directory / "completions.parquet")
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        view = stack.enter_context(JobView())
        dataset = InputDataset.open(options.data, _dataset_options(options))
        source = stack.enter_context(ModelSource.open(options.model))
        source.check_input(dataset.kind, dataset.columns.input)
        choice = choose_engine(options.engine.kind)
        surroundings = environment(choice.kind)
        identity = job_identity(options, source, dataset.content_hash(), choice, surroundings)
        dataset.check_output(output)
        store = PartStore.open(output, identity, options.overwrite)
        stack.callback(store.close)
        if store.state == "complete":
            view.say(f"{output} is already complete; overwrite=true computes it again.")
            assert store.manifest is not None, "a complete output has a manifest"
            _check_errors(options, store.manifest["totals"]["num_errors"])
            return _document(store, dataset, output, 0, {}, view)

        def loading(part: str, done: int, total: int) -> None:
            view.loading(part, done, total)
            interrupts.stop_if_requested()

        source.begin_confirmation()
        built = stack.enter_context(build_engine(source, options.engine, choice, loading))
        view.say(f"{source.config.name} on {choice.device} ({choice.kind} engine: {choice.reason})")
        loaded = time.perf_counter()
        generation = Generation(options, dataset, source, built.engine, store, view)
        generation.run(interrupts)
        seconds = time.perf_counter() - loaded
        totals = run_totals(store)
        _check_errors(options, totals.num_errors)
        statistics = {
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "start_s": round(loaded - started, 3),
            "generate_s": round(seconds, 3),
            "tokens_computed": generation.num_tokens,
            "tokens_per_s": round(generation.num_tokens / seconds, 2),
            **built.engine.statistics(),
            **built.memory(),
        }
        store.assemble(
            dataset,
            manifest(options, identity, source, built, totals, statistics, surroundings),
        )
        return _document(store, dataset, output, generation.num_rows, statistics, view)


def _check_errors(options: JobOptions, num_errors: int) -> None:
    """Under on_error=raise, error rows that an earlier run recorded count as well."""
    if options.dataset.on_error == "raise" and num_errors:
        raise RowError(
            f"{num_errors} output rows of an earlier run of this job are errors, and `error` says "
            "why; dataset.on_error=record keeps them."
        )


def _dataset_options(options: JobOptions) -> DatasetOptions:
    names = {f.name for f in fields(DatasetOptions)}
    plain = {k: v for k, v in asdict(options.dataset).items() if k in names}
    return DatasetOptions(**plain)


def _shown(path: Path) -> str:
    """The path as a user would type it: relative when it lies below the current directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _document(
    store: PartStore,
    dataset: InputDataset,
    output: str,
    computed: int,
    statistics: dict[str, Any],
    view: JobView,
) -> dict[str, Any]:
    """The run as its last line of stdout, out of the finished output's own manifest."""
    assert store.manifest is not None, "the output is not complete"
    totals = store.manifest["totals"]
    document = {
        "rows": totals["num_rows"],
        "rows_computed": computed,
        "rows_resumed": totals["num_rows"] - computed,
        "errors": totals["num_errors"],
        "tokens": totals["num_tokens"],
        "tokens_per_s": statistics.get("tokens_per_s", 0.0),
        "run_hash": store.manifest["run_hash"],
        "output": output,
    }
    samples = preview(output, dataset.columns.input, dataset.options.output_prefix, _NUM_SAMPLES)
    view.finish(samples, document)
    return document
