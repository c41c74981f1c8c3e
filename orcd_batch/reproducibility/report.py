"""Tables over finished runs: what each produced, and how far they agree with each other."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import pyarrow.compute as pc

from orcd_batch.data.manifest import shortened
from orcd_batch.reproducibility.run_output import RunOutput, find_outputs, num_passes
from orcd_batch.reproducibility.verify import match

__all__ = ["Agreement", "Report", "RunSummary", "as_dict", "render", "report"]


@dataclass(slots=True)
class RunSummary:
    """One run. num_rows counts output rows (samples); the means are over rows without an error.

    mean_tokens: completion tokens a row. mean_logprob: natural log, per token. model, engine,
    sampling, tokens_per_s and run_hash are the manifest's.
    """

    path: str
    model: str | None
    engine: str | None
    sampling: dict[str, Any]
    run_hash: str | None
    tokens_per_s: float | None
    num_rows: int = 0
    num_tokens: int = 0
    mean_tokens: float | None = None
    mean_logprob: float | None = None
    finish_reasons: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How many samples (typed id, sample index) two runs share, and how many of them agree."""

    a: int
    b: int
    num_shared: int
    num_same_tokens: int
    num_same_bits: int


@dataclass(frozen=True, slots=True)
class Report:
    """The runs in the order given, and the agreement of every pair (by position in `runs`)."""

    runs: list[RunSummary]
    agreements: list[Agreement]


def report(runs: Sequence[str]) -> Report:
    """Reads output files, run directories, or sweep directories of runs.

    Raises InputError for a path that holds no complete run.
    """
    outputs = [RunOutput(path) for run in runs for path in find_outputs(run)]
    found = Report([_summary(output) for output in outputs], _agreements(outputs))
    for output in outputs:
        output.close()
    return found


def as_dict(found: Report) -> dict[str, Any]:
    """The report as plain JSON values."""
    return asdict(found)


def render(found: Report) -> Any:
    """A rich renderable: the runs, their results beside the sampling that differs, agreement."""
    from rich.console import Group

    parts = [_runs_table(found), _results_table(found)]
    if found.agreements:
        parts.append(_agreement_table(found))
    return Group(*parts)


def _summary(output: RunOutput) -> RunSummary:
    manifest = output.manifest
    identity = _section(manifest, "identity")
    rate = _section(manifest, "statistics").get("tokens_per_s")
    summary = RunSummary(
        path=output.path,
        model=_section(manifest, "model").get("name"),
        engine=identity.get("engine"),
        sampling=_section(identity, "sampling"),
        run_hash=manifest.get("run_hash"),
        tokens_per_s=float(rate) if isinstance(rate, int | float) else None,
        num_rows=output.num_rows,
    )
    reasons: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    logprob = 0.0
    columns = ("finish_reason", "completion_tokens", "logprob", "error_kind")
    for _, batch in output.batches(columns):
        reasons.update(batch.column(0).to_pylist())
        summary.num_tokens += pc.sum(batch.column(1)).as_py() or 0
        logprob += pc.sum(batch.column(2)).as_py() or 0.0
        errors.update(kind for kind in batch.column(3).to_pylist() if kind is not None)
    summary.finish_reasons = dict(sorted(reasons.items()))
    summary.errors = dict(sorted(errors.items()))
    good = output.num_rows - errors.total()
    summary.mean_tokens = summary.num_tokens / good if good else None
    summary.mean_logprob = logprob / summary.num_tokens if summary.num_tokens else None
    return summary


def _section(document: dict[str, Any], name: str) -> dict[str, Any]:
    section = document.get(name)
    return section if isinstance(section, dict) else {}


def _agreements(outputs: Sequence[RunOutput]) -> list[Agreement]:
    pairs = list(combinations(range(len(outputs)), 2))
    counts = {pair: [0, 0, 0] for pair in pairs}
    passes = num_passes(outputs)
    for part in range(passes if pairs else 0):
        rows = [output.keyed_rows(part, passes) for output in outputs]
        for pair in pairs:
            joined = match(rows[pair[0]], rows[pair[1]])
            same_tokens = int((~joined.tokens_differ).sum())
            found = (len(joined.rows), same_tokens, int(joined.equal.sum()))
            counts[pair] = [old + new for old, new in zip(counts[pair], found, strict=True)]
    return [Agreement(*pair, *counts[pair]) for pair in pairs]


def _runs_table(found: Report) -> Any:
    """What each run was: one line a run, so that long paths and hashes have room."""
    table = _table("Runs", ("#", "run", "model", "engine", "run hash"))
    for number, run in enumerate(found.runs):
        _add(table, number, run.path, run.model, run.engine, (run.run_hash or "–")[:12])
    return table


def _results_table(found: Report) -> Any:
    """What each run gave, in numbers."""
    varying = _varying_sampling(found.runs)
    names = ("rows", "errors", "finish", "tokens", "tok/s", "tokens/row", "logprob/token")
    table = _table("Results", ("#", *varying, *names))
    for number, run in enumerate(found.runs):
        _add(
            table,
            number,
            *(shortened(run.sampling.get(name)) for name in varying),
            f"{run.num_rows:,}",
            _counted(run.errors) or "0",
            _counted(run.finish_reasons),
            f"{run.num_tokens:,}",
            _rounded(run.tokens_per_s, 1),
            _rounded(run.mean_tokens, 1),
            _rounded(run.mean_logprob, 4),
        )
    return table


def _varying_sampling(runs: Sequence[RunSummary]) -> list[str]:
    """The sampling options that differ between the runs; all that are set when there is one run."""
    names = dict.fromkeys(name for run in runs for name in run.sampling)
    shown = [name for name in names if len({repr(run.sampling.get(name)) for run in runs}) > 1]
    return shown if len(runs) > 1 else [name for name in names if name in ("temperature", "seed")]


def _agreement_table(found: Report) -> Any:
    table = _table("Agreement of shared samples", ("runs", "shared", "same tokens", "same bits"))
    for pair in found.agreements:
        _add(
            table,
            f"{pair.a} and {pair.b}",
            f"{pair.num_shared:,}",
            _share(pair.num_same_tokens, pair.num_shared),
            _share(pair.num_same_bits, pair.num_shared),
        )
    return table


def _table(title: str, columns: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _add(table: Any, *cells: object) -> None:
    from rich.text import Text

    table.add_row(*(Text("–" if cell is None else str(cell)) for cell in cells))


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items())


def _rounded(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / whole:.2f} %)" if whole else "–"
