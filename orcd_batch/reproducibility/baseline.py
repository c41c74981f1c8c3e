"""Golden results: a directory whose outputs later runs must equal, and why they were replaced.

The directory mirrors a run or sweep directory: `completions.parquet` at its root or in its
folders. `baseline.json` lists every update with its date, reason and hashes.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orcd_batch.data.durable import publish, put, sync_path
from orcd_batch.data.location import Location, reported_as
from orcd_batch.errors import ConfigError, InputError, OutputError
from orcd_batch.reproducibility.hashes import RunHash
from orcd_batch.reproducibility.run_output import OUTPUT_NAME, RunOutput, find_outputs
from orcd_batch.reproducibility.run_records import add_output
from orcd_batch.reproducibility.verify import Comparison, compare

HISTORY_NAME = "baseline.json"
_RECORD = ("id", "sample_index", "token_hash", "numerics_hash", "error_kind")


@dataclass(slots=True)
class BaselineComparison:
    """A run, or the runs of a sweep, against golden results.

    comparisons: by the name of the result (its folder; "." at the root), golden results being A.
    only_baseline, only_run: names that the other side lacks.
    """

    comparisons: dict[str, Comparison] = field(default_factory=dict)
    only_baseline: list[str] = field(default_factory=list)
    only_run: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        missing = self.only_baseline or self.only_run
        return not missing and all(found.equal for found in self.comparisons.values())


class Baseline:
    """The golden results in one local directory, which need not exist yet."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._file = self.directory / HISTORY_NAME
        self.updates: list[dict[str, Any]] = self._read()

    @property
    def exists(self) -> bool:
        return bool(self.updates)

    @property
    def run_hashes(self) -> dict[str, str]:
        """The run hash of each golden result by name, as the updates say."""
        found: dict[str, str] = {}
        for update in self.updates:
            found |= {name: entry["new_run_hash"] for name, entry in update["results"].items()}
        return found

    @property
    def facts(self) -> dict[str, str] | None:
        """The facts that the last update was made under, where they were given."""
        return self.updates[-1].get("facts") if self.updates else None

    def path(self, name: str) -> Path:
        return self.directory / name / OUTPUT_NAME

    def check(self) -> None:
        """Raises InputError when a golden result is not what the last update wrote."""
        for name, expected in self.run_hashes.items():
            if not self.path(name).is_file():
                raise InputError(
                    f"The golden result {self.path(name)} is gone: restore it, repeat the update "
                    "with --update --reason, or begin afresh in another directory."
                )
            found = output_run_hash(self.path(name))
            if found != expected:
                raise InputError(
                    f"The golden result {self.path(name)} has run hash {found[:12]} where "
                    f"{self._file} says {expected[:12]}: it was changed, or an update was cut "
                    "short; repeat the update, with --update --reason."
                )

    def compare(self, run: str, max_listed: int = 100) -> BaselineComparison:
        """Compares a run or sweep directory, or an output, with the golden results.

        Where both sides hold one result only, their names do not matter. Raises InputError.
        """
        self.check()
        return _compared({name: str(self.path(name)) for name in self.run_hashes}, run, max_listed)

    def update(
        self, run: str, reason: str, facts: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Makes the run's results the golden ones and returns the entry written about it.

        Golden results that the run lacks stay. Raises ConfigError without a reason, OutputError
        when the directory cannot be written.
        """
        if not reason.strip():
            raise ConfigError("A baseline is replaced for a reason: say it with --reason.")
        with reported_as(OutputError, f"The baseline {self.directory} cannot be written"):
            outputs = self._named(run)
            entry: dict[str, Any] = {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "reason": reason.strip(),
                "results": {name: self._replaced(name, path) for name, path in outputs.items()},
            }
            if facts is not None:
                entry["facts"] = dict(facts)
            self.directory.mkdir(parents=True, exist_ok=True)
            staged = {name: self._staged(name, path) for name, path in outputs.items()}
            self._write([*self.updates, entry])
            for name, path in staged.items():
                publish(str(path), str(self.path(name).absolute()))
        self.updates.append(entry)
        return entry

    def _named(self, run: str) -> dict[str, str]:
        """The run's outputs by the names they have or get here."""
        outputs = named_outputs(run)
        if len(outputs) == 1 and len(self.run_hashes) <= 1:
            name = next(iter(self.run_hashes), ".")
            return {name: next(iter(outputs.values()))}
        return outputs

    def _replaced(self, name: str, path: str) -> dict[str, Any]:
        """What an update says about one result: hashes, and how far the old one differed."""
        entry: dict[str, Any] = {"old_run_hash": None, "new_run_hash": output_run_hash(path)}
        entry["old_run_hash"] = self.run_hashes.get(name)
        if entry["old_run_hash"] is None:
            return entry
        with contextlib.suppress(InputError):  # a damaged golden result may be replaced
            found = compare(str(self.path(name)), path, max_listed=1)
            counts = {k: v for k, v in asdict(found).items() if k.startswith("num_")}
            entry |= counts | {
                "first_difference": asdict(found.differing[0]) if found.differing else None,
                "manifest_differences": [list(d) for d in found.manifest_differences],
            }
        return entry

    def _staged(self, name: str, path: str) -> Path:
        """The result's bytes on disk beside where they will be."""
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_suffix(".new")
        location = RunOutput(path).location
        with location.open() as source, open(staged, "wb") as sink:
            shutil.copyfileobj(source, sink)
        sync_path(str(staged))
        return staged

    def _read(self) -> list[dict[str, Any]]:
        if not self._file.is_file():
            return []
        with reported_as(InputError, f"{self._file} cannot be read"):
            document = json.loads(self._file.read_text())
        updates = document.get("updates") if isinstance(document, dict) else None
        if not isinstance(updates, list) or not all(map(_is_update, updates)):
            raise InputError(
                f"{self._file} is no list of updates of golden results: restore it, or begin "
                "afresh in another directory."
            )
        return updates

    def _write(self, updates: list[dict[str, Any]]) -> None:
        text = json.dumps({"updates": updates}, indent=1, ensure_ascii=False)
        put(Location.parse(os.fspath(self._file)), text.encode())


def compare_directories(expected: str, run: str, max_listed: int = 100) -> BaselineComparison:
    """Two sweep directories, result by result; `expected` is in the place of golden results."""
    return _compared(named_outputs(expected), run, max_listed)


def _compared(golden: Mapping[str, str], run: str, max_listed: int) -> BaselineComparison:
    ours = named_outputs(run)
    if len(golden) == len(ours) == 1:
        ours = dict(zip(golden, ours.values(), strict=True))
    found = BaselineComparison(
        only_baseline=[name for name in golden if name not in ours],
        only_run=[name for name in ours if name not in golden],
    )
    for name, path in golden.items():
        if name in ours:
            found.comparisons[name] = compare(path, ours[name], max_listed)
    return found


def _is_update(update: Any) -> bool:
    results = update.get("results") if isinstance(update, dict) else None
    if not isinstance(results, dict):
        return False
    return all(
        isinstance(r, dict) and isinstance(r.get("new_run_hash"), str) for r in results.values()
    )


def is_baseline(path: str) -> bool:
    """Whether the path is a directory of golden results."""
    return (Path(path) / HISTORY_NAME).is_file()


def named_outputs(run: str) -> dict[str, str]:
    """The outputs of a run or sweep directory by their folder in it; an output file is "."."""
    if not os.path.isdir(run):
        return {".": run}
    return {
        os.path.relpath(os.path.dirname(path), run).replace(os.sep, "/"): path
        for path in find_outputs(run)
    }


def output_run_hash(path: str | Path) -> str:
    """The run hash computed from the rows of an output, whatever its manifest says."""
    output = RunOutput(str(path))
    found = RunHash()
    for _, batch in output.batches(_RECORD):
        add_output(found, batch)
    output.close()
    return found.hexdigest()
