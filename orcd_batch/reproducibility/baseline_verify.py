"""`orcd-batch verify`: two outputs, two directories of outputs, or a run and golden results."""

import os
from collections.abc import Mapping
from typing import Any

from orcd_batch.errors import ConfigError
from orcd_batch.reproducibility.baseline import (
    HISTORY_NAME,
    Baseline,
    BaselineComparison,
    compare_directories,
    is_baseline,
)
from orcd_batch.reproducibility.run_output import OUTPUT_NAME
from orcd_batch.reproducibility.verify import as_dict, compare, render

Verdict = tuple[dict[str, Any], Any, int]


def verify(a: str, b: str, update: bool, reason: str | None) -> Verdict:
    """The JSON document, a rich renderable and the exit code of one `verify` command.

    Raises ConfigError for options that do not go together, InputError, OutputError.
    """
    if reason is not None and not update:
        raise ConfigError("--reason says why a golden result is replaced: add --update.")
    if update:
        if reason is None:
            raise ConfigError('--update needs a reason, which is kept: add --reason "…".')
        return _updated(a, b, reason)
    if is_baseline(a) and not is_baseline(b):
        raise ConfigError(
            f"{a} holds golden results ({HISTORY_NAME}): name the run first, then the golden "
            f"results, as in `orcd-batch verify {b} {a}`."
        )
    if is_baseline(b):
        return _told(Baseline(b).compare(a), b)
    if _is_sweep(a) and _is_sweep(b):
        return _told(compare_directories(b, a), b)
    comparison = compare(a, b)
    return as_dict(comparison), render(comparison), 0 if comparison.equal else 1


def _is_sweep(path: str) -> bool:
    return os.path.isdir(path) and not os.path.isfile(os.path.join(path, OUTPUT_NAME))


def _told(found: BaselineComparison, directory: str) -> Verdict:
    from rich.console import Group
    from rich.text import Text

    document = {
        "equal": found.equal,
        "baseline": directory,
        "only_baseline": found.only_baseline,
        "only_run": found.only_run,
        "comparisons": {name: as_dict(one) for name, one in found.comparisons.items()},
    }
    parts: list[Any] = []
    for name, comparison in found.comparisons.items():
        if len(found.comparisons) > 1:
            parts.append(Text(f"\n{name}", style="bold"))
        parts.append(render(comparison))
    for what, names in (("the golden results", found.only_baseline), ("the run", found.only_run)):
        if names:
            parts.append(Text(f"Only in {what}: {', '.join(names)}"))
    if found.only_baseline and is_baseline(directory):
        parts.append(Text("A run that no longer has them needs golden results in a new directory."))
    return document, Group(*parts), 0 if found.equal else 1


def _updated(run: str, directory: str, reason: str) -> Verdict:
    from rich.text import Text

    if os.path.exists(directory) and not os.path.isdir(directory):
        raise ConfigError(f"{directory} is a file: golden results lie in a directory.")
    entry = Baseline(directory).update(run, reason)
    lines = [f"{directory}: {reason}"]
    lines += [_line(name, result) for name, result in entry["results"].items()]
    return {"updated": directory, **entry}, Text("\n".join(lines)), 0


def _line(name: str, result: Mapping[str, Any]) -> str:
    old, new = result["old_run_hash"], result["new_run_hash"]
    if old is None:
        return f"{name}: new, run hash {new[:12]}"
    if old == new:
        return f"{name}: same rows as before, run hash {new[:12]}"
    return f"{name}: run hash {old[:12]} → {new[:12]}"
