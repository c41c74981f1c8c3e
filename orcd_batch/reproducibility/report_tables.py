"""The tables of a report over runs, the same in a terminal and in HTML."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orcd_batch.data.manifest import flattened, shortened
from orcd_batch.reproducibility.report import Report, RunSummary, section, timings
from orcd_batch.reproducibility.report_page import Table
from orcd_batch.reproducibility.report_statistics import NEAR_TIE, NotableRow, RunStatistics
from orcd_batch.reproducibility.run_output import OUTPUT_NAME
from orcd_batch.reproducibility.verify import explaining_differences

RESULTS = ("rows", "errors", "tokens", "tok/s", "length", "logprob")
MEANS = (
    "length: mean completion tokens of a row. logprob: mean natural log, per token. tok/s is left "
    "out where jobs ran together."
)
NOTHING = "–"
_MAX_LISTED_PAIRS = 28


def runs(found: Report) -> Table:
    """What each run was: one line a run, so that long paths and hashes have room."""
    columns = ("#", "run", "model", "engine", "run hash")
    rows = [
        (str(i), run.path, text(run.model), text(run.engine), (run.run_hash or "–")[:12])
        for i, run in enumerate(found.runs)
    ]
    return Table("Runs", columns, rows)


def results(found: Report) -> Table:
    """What each run gave, in numbers, beside the sampling that differs."""
    varying = _varying_sampling(found.runs)
    rows = [
        (
            str(i),
            *(shortened(run.sampling.get(name)) for name in varying),
            *figures(run),
            counted(run.finish_reasons),
        )
        for i, run in enumerate(found.runs)
    ]
    columns = ("#", *varying, *RESULTS)
    return filled(Table("Results", (*columns, "finish"), rows, numeric(columns), MEANS))


def agreement(found: Report) -> list[Table]:
    """Pairs of runs: how many of their shared samples agree."""
    if not found.agreements:
        return []
    shown = sorted(found.agreements, key=lambda p: (p.num_same_bits - p.num_shared, p.a, p.b))
    shown = sorted(shown[:_MAX_LISTED_PAIRS], key=lambda p: (p.a, p.b))
    rows = [
        (
            f"{pair.a} and {pair.b}",
            f"{pair.num_shared:,}",
            _share(pair.num_same_tokens, pair.num_shared),
            _share(pair.num_same_bits, pair.num_shared),
        )
        for pair in shown
    ]
    left = len(found.agreements) - len(shown)
    note = f"The {len(shown)} pairs that differ most; {left} more are in the JSON." if left else ""
    columns = ("runs", "shared", "same tokens", "same bits")
    return [Table("Agreement of shared samples", columns, rows, frozenset((1, 2, 3)), note)]


def differing(found: Report) -> Table:
    """The manifest fields that differ from the first run's and could explain a difference."""
    first, *others = found.manifests
    values: dict[str, dict[int, str]] = {}
    for index, manifest in enumerate(others, 1):
        for name, ours, theirs in explaining_differences(first, manifest):
            values.setdefault(name, {0: shortened(ours)})[index] = shortened(theirs)
    rows = [
        (name, *(row.get(i, row[0]) for i in range(len(found.manifests))))
        for name, row in values.items()
    ]
    columns = ("manifest field", *(f"run {i}" for i in range(len(found.manifests))))
    note = "" if rows else "No field that could explain a difference differs."
    return Table("What differs between the runs", columns, rows, note=note)


def notable(statistics: RunStatistics) -> list[Table]:
    """Rows worth a look: the closest calls, and those that took most tokens."""
    near = f"{statistics.num_near_ties:,} of {statistics.num_tokens:,} tokens have a margin under "
    closest = [(*_key(row), f"{row.value:.6f}", text(row.position)) for row in statistics.closest]
    longest = [
        (*_key(row), f"{row.prompt_tokens:,}", f"{row.completion_tokens:,}")
        for row in statistics.longest
    ]
    return [
        Table(
            "Closest calls",
            ("id", "sample", "smallest margin", "at token"),
            closest,
            frozenset((1, 2, 3)),
            f"{near}{NEAR_TIE:g}; another device may choose differently there.",
        ),
        Table(
            "Longest rows",
            ("id", "sample", "prompt tokens", "completion tokens"),
            longest,
            frozenset((1, 2, 3)),
            "The rows that took most work.",
        ),
    ]


def resources(manifest: Mapping[str, Any]) -> list[Table]:
    """Time and tokens by phase, memory by use, and ops where they were timed."""
    facts = timings(dict(manifest))
    memory = section(dict(manifest), "engine", "backend", "memory_by_use")
    rows = list(_quantities({k: v for k, v in facts.items() if k not in ("ended", "group")}))
    rows += [(f"memory: {name}", _quantity("_bytes", value)) for name, value in memory.items()]
    ops = section(dict(manifest), "engine", "backend", "op_times")
    found = [Table("Statistics of the run", ("what", "value"), rows, frozenset((1,)))]
    if ops:
        times = sorted(ops.items(), key=lambda item: -item[1]["seconds"])
        op_rows = [
            (name, f"{o['calls']:,}", f"{o['seconds']:,.3f}", f"{o['us_per_call']:,.1f}")
            for name, o in times
        ]
        columns = ("op", "calls", "seconds", "µs per call")
        found.append(Table("Time by op", columns, op_rows, frozenset((1, 2, 3))))
    return found


def environment(manifests: Sequence[dict[str, Any]]) -> list[Table]:
    """Every fact that could change a bit, of the first run; folded, for looking things up."""
    if not manifests:
        return []
    rows = [
        (name, shortened(value)) for name, value in flattened(section(manifests[0], "identity"))
    ]
    rows += [("git_commit", shortened(section(manifests[0], "environment").get("git_commit")))]
    title = "Identity of the run" if len(manifests) == 1 else "Identity of the first run"
    return [Table(title, ("fact", "value"), rows, folded=True)]


def run_names(found: Report) -> list[str]:
    """A short name for each run: its number, and its directory or file."""
    paths = [Path(run.path.removesuffix(f"/{OUTPUT_NAME}")) for run in found.runs]
    return [f"{number}: {path.name}" for number, path in enumerate(paths)]


def group_name(parameters: Mapping[str, Any]) -> str:
    """A group by what its jobs share."""
    found = ", ".join(f"{short_name(k)} {shortened(v)}" for k, v in parameters.items())
    return found or "all jobs"


def short_name(parameter: str) -> str:
    return parameter.removeprefix("sampling.")


def text(value: object) -> str:
    return NOTHING if value is None else str(value)


def percent(share: float | None) -> str:
    """A share; all and none without decimals, which they would only seem to need."""
    if share is None:
        return NOTHING
    return f"{100 * share:.0f} %" if share in (0, 1) else f"{100 * share:.1f} %"


def rounded(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 120:
        return f"{seconds:,.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def figures(run: RunSummary) -> tuple[str, ...]:
    """The cells under RESULTS."""
    return (
        f"{run.num_rows:,}",
        counted(run.errors) or "0",
        f"{run.num_tokens:,}",
        rounded(None if run.shared_with else run.tokens_per_s, 1),
        rounded(run.mean_tokens, 1),
        rounded(run.mean_logprob, 4),
    )


def filled(table: Table) -> Table:
    """The table without the columns in which no row has anything."""
    kept = [
        i
        for i in range(len(table.columns))
        if not table.rows or any(row[i] != NOTHING for row in table.rows)
    ]
    return replace(
        table,
        columns=[table.columns[i] for i in kept],
        rows=[[row[i] for i in kept] for row in table.rows],
        numeric=frozenset(place for place, i in enumerate(kept) if i in table.numeric),
    )


def numeric(columns: Sequence[str]) -> frozenset[int]:
    """All columns of a table whose first columns are these."""
    return frozenset(range(len(columns)))


def _varying_sampling(found: Sequence[RunSummary]) -> list[str]:
    """The sampling options that differ between the runs; all that are set when there is one run."""
    names = dict.fromkeys(name for run in found for name in run.sampling)
    shown = [name for name in names if len({repr(run.sampling.get(name)) for run in found}) > 1]
    return shown if len(found) > 1 else [name for name in names if name in ("temperature", "seed")]


def _key(row: NotableRow) -> tuple[str, str]:
    return shortened(row.id), str(row.sample_index)


def _quantities(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values; what has parts is a line for each of them."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            unit = name[name.rfind("_") :] if "_" in name else ""
            yield from (
                (f"{name.removesuffix(unit)}: {k}", _quantity(unit, v)) for k, v in value.items()
            )
        else:
            yield name, _quantity(name, value)


def _quantity(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return shortened(value)
    if name.endswith("_bytes"):
        return f"{value / 1e6:,.1f} MB"
    if name.endswith("_s") and not name.endswith("per_s"):
        return f"{value:,.3f} s"
    return f"{value:,}"


def counted(counts: Mapping[str, int]) -> str:
    """Names and their numbers as text, in one order whatever came first."""
    return ", ".join(f"{number:,} {name}" for name, number in sorted(counts.items()))


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / whole:.2f} %)" if whole else "–"
