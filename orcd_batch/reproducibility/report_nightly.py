"""The nightly page: tonight's verdict, the trend, and for every drift what changed that night."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq

from orcd_batch.data.location import Location, reported_as
from orcd_batch.data.manifest import shortened
from orcd_batch.errors import InputError
from orcd_batch.reproducibility import nightly_figures as draw
from orcd_batch.reproducibility.plots import MISSING, can_draw
from orcd_batch.reproducibility.report_html import write_page
from orcd_batch.reproducibility.report_page import Fact, Notice, Page, Section, Table
from orcd_batch.reproducibility.report_tables import duration, rounded, text

COLUMNS = (
    *("night", "started", "seconds", "verdict", "cause", "run_hash", "model_name", "model_hash"),
    *("tokenizer_hash", "template_hash", "input_hash", "code_hash", "kernels_hash"),
    *("package_version", "git_commit", "engine", "device", "cpu", "versions", "num_rows"),
    *("num_tokens", "tokens_per_s", "start_s", "baseline_status", "baseline_hash"),
    *("num_comparisons", "num_failed", "first_difference", "changed", "failing_since"),
)
NUM_NIGHTS_LISTED = 30
NUM_NIGHTS_DRAWN = 60

Night = Mapping[str, Any]


def write_nightly_report(history: Path, night: Night, directory: Path) -> Path:
    """Writes `report.html` and its PNGs into the directory and returns the page's path.

    history: the Parquet file of all nights. night: the document of this one (docs/nightly.md has
    both); it may or may not be in the history yet. Without matplotlib the page has tables only.
    Raises InputError for a history that cannot be read, OutputError.
    """
    nights = [past for past in read_nights(history) if past["night"] != night.get("night")]
    return write_page(nightly_page([*nights, _as_row(night)], night), directory).page


def read_nights(history: str | Path) -> list[dict[str, Any]]:
    """The history's nights, oldest first, with the columns that the page shows.

    A column that an older history lacks is None. Raises InputError.
    """
    location = Location.parse(str(history))
    if not location.is_file():
        return []
    cannot = f"The history {location} cannot be read"
    with reported_as(InputError, cannot), location.open() as file:
        parquet = pq.ParquetFile(file)
        present = [name for name in COLUMNS if name in parquet.schema_arrow.names]
        rows = parquet.read(present).to_pylist()
    if "night" not in present:
        raise InputError(f"{location} is no history of nightly checks: it has no column night.")
    return [_as_row(row) for row in rows]


def nightly_page(nights: Sequence[Night], night: Night) -> Page:
    """The page: nights, oldest first, this one last; night: this one's whole document."""
    now = nights[-1]
    page = Page(
        f"Nightly check of {text(now['model_name'])}",
        " · ".join(
            str(part)
            for part in (now["night"], f"{now['engine']} engine", now["device"])
            if part is not None
        ),
    )
    page.facts = _facts(nights)
    page.notices = [_verdict(now)]
    page.sections = [*_drift(now), _trend(nights), _tonight(night), _past(nights)]
    if not can_draw():
        page.notices.append(Notice("warning", MISSING))
    return page


def _facts(nights: Sequence[Night]) -> list[Fact]:
    now = nights[-1]
    total, failed = now["num_comparisons"] or 0, now["num_failed"] or 0
    passed = 0
    for past in reversed(nights):
        if past["verdict"] != "pass":
            break
        passed += 1
    return [
        Fact("verdict", text(now["verdict"]), f"after {duration(now['seconds'] or 0.0)}"),
        Fact("comparisons equal", f"{total - failed} of {total}"),
        Fact("nights passed in a row", str(passed), f"of {len(nights)} in all"),
        Fact("tokens/s", rounded(now["tokens_per_s"], 1), _compared_with_week(nights)),
        Fact("run hash", (now["run_hash"] or "–")[:12]),
        Fact("baseline", text(now["baseline_status"])),
    ]


def _compared_with_week(nights: Sequence[Night]) -> str:
    rates = [past["tokens_per_s"] for past in nights[-8:-1] if past["tokens_per_s"]]
    now = nights[-1]["tokens_per_s"]
    if not rates or not now:
        return ""
    return f"{100 * (now / median(rates) - 1):+.1f} % to the last nights"


def _verdict(now: Night) -> Notice:
    if now["verdict"] == "pass":
        return Notice("good", "Every comparison is equal, bit for bit.")
    since = now["failing_since"]
    failing = f" Failing since {since}." if since and since != now["night"] else ""
    return Notice("bad", f"{text(now['cause'])}{failing}")


def _drift(now: Night) -> list[Section]:
    """What differs and what changed; nothing when nothing did."""
    tables = []
    if now["first_difference"]:
        tables.append(_first_difference(now["first_difference"]))
    if now["changed"]:
        rows = [
            (item["field"], *(shortened(item[side]) for side in ("before", "now")))
            for item in now["changed"]
        ]
        note = "Facts that differ from the last night that passed."
        columns = ("fact", "last good night", "tonight")
        tables.append(Table("What changed", columns, rows, note=note))
    return [Section("What differs", tables=tables)] if tables else []


def _tonight(night: Night) -> Section:
    tables = [_comparisons(night.get("comparisons") or ())]
    tables.append(_variations(night.get("variations") or ()))
    skipped = [(text(s.get("title")), text(s.get("reason"))) for s in night.get("skipped") or ()]
    if skipped:
        tables.append(Table("Skipped", ("variation", "why"), skipped))
    return Section("This night", tables=tables)


def _first_difference(found: Night) -> Table:
    rows = [
        (name.replace("_", " "), text(value)) for name, value in found.items() if value is not None
    ]
    note = "a is the reference's side; a margin is the best logit minus the second-best."
    return Table("First row that differs", ("what", "value"), rows, note=note)


def _comparisons(found: Sequence[Night]) -> Table:
    names = ("num_rows", "num_equal", "num_tokens_differ", "num_numerics_differ")
    rows = [
        (
            text(item.get("title")),
            "equal" if item.get("equal") else "DIFFERS",
            *(text(item.get(name)) for name in names),
            str((item.get("num_only_a") or 0) + (item.get("num_only_b") or 0)),
            item.get("explanation") or "",
        )
        for item in sorted(found, key=lambda item: bool(item.get("equal")))
    ]
    columns = ("comparison", "outcome", "rows", "equal", "tokens", "numerics", "missing")
    note = "tokens, numerics: rows that differ in them."
    numeric = frozenset(range(2, 7))
    return Table("Comparisons", (*columns, "explanation"), rows, numeric, note)


def _variations(found: Sequence[Night]) -> Table:
    rows = [
        (
            text(item.get("title")),
            text(item.get("status")),
            (item.get("run_hash") or "–")[:12],
            rounded(item.get("tokens_per_s"), 1),
            rounded(item.get("seconds"), 1),
        )
        for item in found
    ]
    columns = ("way of running", "outcome", "run hash", "tok/s", "seconds")
    return Table("Runs of this night", columns, rows, frozenset((3, 4)), folded=True)


def _trend(nights: Sequence[Night]) -> Section:
    shown = nights[-NUM_NIGHTS_DRAWN:]
    section = Section("The trend", tables=[_changes(nights)])
    if can_draw():
        section.figures = [draw.throughput(shown), draw.timeline(shown)]
    return section


def _changes(nights: Sequence[Night]) -> Table:
    """Nights whose bits or verdict are not those of the night before, newest first."""
    rows = []
    for before, now in pairwise(nights):
        if (before["run_hash"], before["verdict"]) == (now["run_hash"], now["verdict"]):
            continue
        fields = [item["field"] for item in now["changed"] or ()] or draw.changed(before, now)
        hashes = (text(past["run_hash"])[:12] for past in (before, now))
        rows.append(
            (
                *(str(now["night"]), text(now["verdict"]), *hashes),
                ", ".join(fields[:8]) or "nothing on record",
                now["cause"] or "",
            )
        )
    columns = ("night", "verdict", "bits before", "bits now", "what changed", "cause")
    note = "" if rows else "No night's bits or verdict differ from the night before."
    return Table("Drifts", columns, rows[::-1], note=note)


def _past(nights: Sequence[Night]) -> Section:
    rows = [
        (
            *(str(past["night"]), text(past["verdict"]), (past["run_hash"] or "–")[:12]),
            rounded(past["tokens_per_s"], 1),
            rounded(past["start_s"], 1),
            *(text(past["package_version"]), (past["git_commit"] or "–")[:9]),
        )
        for past in list(nights)[: -NUM_NIGHTS_LISTED - 1 : -1]
    ]
    columns = ("night", "verdict", "run hash", "tok/s", "start s", "version", "commit")
    listed = Table(f"The last {len(rows)} nights", columns, rows, frozenset((3, 4)), folded=True)
    versions = [(name, text(value)) for name, value in sorted(_versions(nights[-1]).items())]
    hashes = [(name, text(nights[-1][name])) for name in COLUMNS if name.endswith("_hash")]
    facts = Table(
        "Versions and hashes of this night", ("what", "value"), [*versions, *hashes], folded=True
    )
    return Section("All nights", tables=[listed, facts])


def _versions(night: Night) -> dict[str, Any]:
    """A map column comes back as pairs, a document's versions as an object."""
    return dict(night["versions"] or {})


def _as_row(night: Night) -> dict[str, Any]:
    row = {name: night.get(name) for name in COLUMNS}
    return row | {"versions": dict(row["versions"] or {})}
