"""A check on one page: the same job many times in different ways, and what they prove together."""

import json
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from orcd_batch.checkpoint import GGUFFile
from orcd_batch.checkpoint.hub import resolve_model_path
from orcd_batch.checkpoint.part_hashes import PartHashes
from orcd_batch.config import CheckOptions, JobOptions
from orcd_batch.data import InputDataset, read_manifest
from orcd_batch.data.durable import put
from orcd_batch.data.location import Location
from orcd_batch.errors import ConfigError, InputError, Interrupted, OrcdError
from orcd_batch.interrupts import Interrupts
from orcd_batch.job import dataset_options
from orcd_batch.nightly.inputs import InputVariations
from orcd_batch.nightly.outcome import judge, judge_baseline, judge_reference
from orcd_batch.nightly.plan import REFERENCE, JobFacts, plan
from orcd_batch.nightly.runs import NightRuns, RunResult
from orcd_batch.nightly.summary import Night, document
from orcd_batch.nightly.view import NightView
from orcd_batch.reproducibility.baseline import Baseline
from orcd_batch.reproducibility.environment import source_hashes
from orcd_batch.reproducibility.history import SCHEMA, History
from orcd_batch.reproducibility.junit import junit_xml


def run_check(options: JobOptions, directory: Path) -> tuple[dict[str, Any], int]:
    """Runs the job in every way that `options.check` asks for and compares the results.

    directory: the night's own. Returns the document of the last line of stdout and the exit code.
    Raises an OrcdError for what is wrong before the first comparison, and Interrupted.
    """
    assert options.check is not None, "this job is not a check"
    directory = _as_typed(directory)
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        view = NightView()
        started = time.perf_counter()
        check = options.check
        history = stack.enter_context(History(check.history)) if check.history else None
        night = _begin(options, directory, history)
        baseline = _open_baseline(check, night)
        try:
            runs = _prepare(options, directory, interrupts)
            stack.callback(runs.close)
            _run_all(night, runs, check, view)
        except Interrupted as error:
            raise Interrupted("The check was interrupted; nothing of it is recorded.") from error
        _judge_baseline(night, baseline, view)
        night.seconds = time.perf_counter() - started
        found = document(night)
        paths = _write(night, found, check, history)
        view.finish(found | paths)
        shown = {k: v for k, v in (found | paths).items() if k != "facts"}
        return shown, found["exit_code"]


def _as_typed(path: Path) -> Path:
    """Relative where it lies below the current directory, as the check's other paths are given."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else Path(relative)


def _begin(options: JobOptions, directory: Path, history: History | None) -> Night:
    """The night before its first run: what the model file and the code are, read afresh."""
    night = Night(_name(options, directory), directory, datetime.now(UTC), {})
    if history is not None:
        history.check_new(night.name)
        night.last_good, night.failing_since = history.last_good(), history.failing_since()
    options.model.path = str(resolve_model_path(options.model.path))
    with GGUFFile.open(options.model.path) as gguf:
        parts = PartHashes.of(gguf)
    night.own_facts = {
        "model.hash": parts.model_hash,
        **{f"model.metadata.{name}": value for name, value in parts.metadata.items()},
        **{f"model.tensors.{name}": value for name, value in parts.tensors.items()},
        **{f"code.{name}": value for name, value in source_hashes().items()},
    }
    return night


def _name(options: JobOptions, directory: Path) -> str:
    """The night's directory, as it is called below all nights; in a multirun two levels."""
    assert options.check is not None, "this job is not a check"
    nights = Path(options.check.directory, "nights").resolve()
    found = directory.resolve()
    return str(found.relative_to(nights)) if found.is_relative_to(nights) else directory.name


def _open_baseline(check: CheckOptions, night: Night) -> Baseline | None:
    """Raises InputError where the golden results are damaged, before any work."""
    if check.baseline is None:
        return None
    baseline = Baseline(check.baseline)
    baseline.check()
    if len(baseline.run_hashes) > 1:
        raise ConfigError(
            f"check.baseline={check.baseline} holds {len(baseline.run_hashes)} golden results and "
            "a check has one: name a directory of its own."
        )
    night.baseline_facts = baseline.facts
    return baseline


def _prepare(options: JobOptions, directory: Path, interrupts: Interrupts) -> NightRuns:
    dataset = InputDataset.open(options.data, dataset_options(options))
    if dataset.num_rows == 0:
        raise InputError(f"data={', '.join(options.data)} has no rows, which proves nothing.")
    assert options.check is not None, "this job is not a check"
    inputs = InputVariations(dataset, options, directory / "inputs")
    return NightRuns(inputs, directory, interrupts, options.check.timeout_s)


def _run_all(night: Night, runs: NightRuns, check: CheckOptions, view: NightView) -> None:
    view.begin(REFERENCE)
    reference = runs.run(REFERENCE)
    if reference.kind in (ConfigError.__name__, InputError.__name__):
        raise ConfigError(str(reference.error))
    model_hash = night.own_facts["model.hash"]
    night.outcomes.append(judge_reference(reference, model_hash))
    view.end(night.reference)
    if not night.reference.equal:
        return
    variations = plan(check, _facts_of(reference, runs.inputs.num_rows))
    night.skipped = [variation for variation in variations if variation.reason is not None]
    for variation in variations:
        if variation.reason is None:
            view.begin(variation)
            night.outcomes.append(judge(runs.run(variation), reference.output, model_hash))
            view.end(night.outcomes[-1])


def _facts_of(reference: RunResult, num_rows: int) -> JobFacts:
    engine = read_manifest(str(reference.output))["engine"]
    limits = {name: engine[name] for name in ("max_num_seqs", "max_num_batched_tokens")}
    has_ray = find_spec("ray") is not None
    return JobFacts(
        engine["kind"], num_rows, **limits, gpu_names=reference.gpu_names, has_ray=has_ray
    )


def _judge_baseline(night: Night, baseline: Baseline | None, view: NightView) -> None:
    """Against the golden results; the first night that agrees with itself becomes them."""
    result = night.reference.result
    if baseline is None or result is None or not night.reference.equal:
        return
    if baseline.exists:
        outcome = judge_baseline(baseline, result.output)
        night.outcomes.append(outcome)
        night.baseline_status = outcome.status
        view.end(outcome)
    elif night.passed:
        facts = document(night)["facts"]
        baseline.update(str(result.output), f"There was none: the night {night.name}.", facts)
        night.baseline_status = "created"
    night.baseline_hash = next(iter(baseline.run_hashes.values()), None)


def _write(
    night: Night, found: dict[str, Any], check: CheckOptions, history: History | None
) -> dict[str, str | None]:
    """The history's row, then night.json, the JUnit report and the page; their paths."""
    junit = Path(check.junit or night.directory / "junit.xml")
    paths: dict[str, str | None] = {
        "history": check.history,
        "baseline": check.baseline,
        "junit": str(junit),
        "report": None,
    }
    if history is not None:
        row = {name: found[name] for name in SCHEMA.names}
        versions = list(found["versions"].items())
        facts = json.dumps(found["facts"])
        history.append(row | {"started": night.started, "versions": versions, "facts": facts})
    junit.parent.mkdir(parents=True, exist_ok=True)
    _put(junit, junit_xml(found))
    if check.report and check.history is not None:
        paths["report"] = _report(Path(check.history), found | paths, night.directory)
    _put(night.directory / "night.json", json.dumps(found | paths, indent=1).encode())
    return paths


def _report(history: Path, found: Mapping[str, Any], directory: Path) -> str | None:
    """The HTML page's path, or None, with the reason on the terminal."""
    try:
        from orcd_batch.reproducibility.report_nightly import write_nightly_report

        return str(write_nightly_report(history, found, directory))
    except (ImportError, OrcdError) as error:
        NightView().say(f"No report page was written: {error}")
        return None


def _put(path: Path, data: bytes) -> None:
    put(Location.parse(str(path)), data)
