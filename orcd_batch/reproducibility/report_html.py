"""Writing a page and its pictures, so that each file is there whole or not at all."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orcd_batch.data.durable import put
from orcd_batch.data.location import Location, reported_as
from orcd_batch.errors import OutputError
from orcd_batch.reproducibility.combine import combine
from orcd_batch.reproducibility.report import Report
from orcd_batch.reproducibility.report_page import Page, render_html

PAGE_NAME = "report.html"


@dataclass(frozen=True, slots=True)
class WrittenPage:
    """The page, and one PNG per figure beside it."""

    page: Path
    images: list[Path]


def write_page(page: Page, directory: str | Path, name: str = PAGE_NAME) -> WrittenPage:
    """Writes the page and its figures into a directory, which is made where it is missing.

    Raises OutputError when they cannot be written.
    """
    root = Path(directory)
    images = []
    with reported_as(OutputError, f"The report cannot be written to {root} (choose --output)"):
        root.mkdir(parents=True, exist_ok=True)
        for figure in page.figures:
            images.append(root / f"{figure.name}.png")
            put(Location.parse(str(images[-1])), figure.png)
        put(Location.parse(str(root / name)), render_html(page).encode())
    return WrittenPage(root / name, images)


def write_report(found: Report, runs: Sequence[str], directory: str | None) -> dict[str, Any]:
    """Writes the page, its figures and a sweep's combined file; returns what lies where.

    directory: None is `default_directory`. Raises InputError, OutputError.
    """
    from orcd_batch.reproducibility.report_contents import contents

    combined = combine(found.sweep) if found.sweep else None
    written = write_page(contents(found), directory or default_directory(runs))
    document: dict[str, Any] = {
        "page": str(written.page),
        "images": [str(image) for image in written.images],
    }
    if combined is not None:
        document |= {"combined": str(combined.path), "sweep_hash": combined.sweep_hash}
    return document


def default_directory(runs: Sequence[str]) -> Path:
    """Where a report goes unless it is said: beside the one run, else under outputs/.

    A run's or sweep's directory gets `report/`, a file X.parquet gets `X.report/`; several runs, or
    one in an object store, get outputs/report-<digest of their names>.
    """
    if len(runs) == 1 and os.path.isdir(runs[0]):
        return Path(runs[0]) / "report"
    if len(runs) == 1 and os.path.isfile(runs[0]):
        return Path(runs[0]).with_suffix(".report")
    names = "\n".join(os.path.abspath(run) if os.path.exists(run) else run for run in runs)
    return Path("outputs") / f"report-{hashlib.sha256(names.encode()).hexdigest()[:12]}"
