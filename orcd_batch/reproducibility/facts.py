"""The facts that could change a bit of a run, by dotted name; which differ between two runs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orcd_batch.data.manifest import flattened

# Of what a backend tells of itself: how it went, not what it is.
_NOT_FACTS = ("loading.", "memory_by_use.", "op_times", "device", "driver", "cuda", "nvrtc")


@dataclass(frozen=True, slots=True)
class Change:
    """One fact that differs; None where one side lacks it."""

    field: str
    before: str | None
    now: str | None


def run_facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The facts of one run out of its manifest; all values are text."""
    identity = manifest["identity"]
    environment = manifest.get("environment", {})
    found: dict[str, Any] = {
        "model.hash": identity["model_hash"],
        "model.tokenizer_hash": identity["tokenizer_hash"],
        "model.template_hash": identity["template_hash"],
        "input_hash": identity["input_hash"],
        "engine": identity["engine"],
        "device": identity["device"],
        "cpu": environment.get("cpu"),
        "max_model_len": identity["max_model_len"],
        "code_hash": identity["code_hash"],
        "package_version": environment.get("orcd_batch"),
        "git_commit": environment.get("git_commit"),
    }
    for section in ("model", "sampling", "dataset"):
        found |= {f"{section}.{name}": value for name, value in identity[section].items()}
    versions = {k: v for k, v in identity["versions"].items() if k != "cpu"}
    found |= {f"versions.{name}": _build(value) for name, value in versions.items()}
    for name, value in flattened(manifest.get("engine", {}).get("backend", {})):
        if not name.startswith(_NOT_FACTS):
            found[f"backend.{name}"] = value
    return {name: _text(value) for name, value in found.items() if value is not None}


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[Change]:
    """The facts that differ, in the order of `now`, then those that are gone."""
    names = [*now, *(name for name in before if name not in now)]
    return [
        Change(name, before.get(name), now.get(name))
        for name in names
        if before.get(name) != now.get(name)
    ]


def _build(value: Any) -> Any:
    """A BLAS build as words: "openblas 0.3.31 pthreads SkylakeX"."""
    if not isinstance(value, list):
        return value
    return ", ".join(" ".join(str(v) for v in build.values() if v) for build in value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
