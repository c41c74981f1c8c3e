"""A night in one document: what night.json, the history and the reports are made of."""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from orcd_batch.data import read_manifest
from orcd_batch.nightly.outcome import Outcome, groups
from orcd_batch.nightly.plan import Variation
from orcd_batch.reproducibility.drift import describe
from orcd_batch.reproducibility.facts import Change, changes, run_facts

# Facts that are known even when no run ended well.
_OWN_FACTS = ("model.tensors.", "model.metadata.", "model.hash", "code.")


@dataclass(slots=True)
class Night:
    """What a night found. outcomes: the reference's first, then the variations', the baseline's.

    own_facts: what the check itself found out, about the model file and the code. last_good: that
    night's row of the history. baseline_facts: those under which the baseline was made.
    """

    name: str
    directory: Path
    started: datetime
    own_facts: dict[str, str]
    outcomes: list[Outcome] = field(default_factory=list)
    skipped: list[Variation] = field(default_factory=list)
    seconds: float = 0.0
    baseline_status: str = "none"
    baseline_hash: str | None = None
    baseline_facts: Mapping[str, str] | None = None
    last_good: Mapping[str, Any] | None = None
    failing_since: str | None = None

    @property
    def passed(self) -> bool:
        return all(outcome.equal for outcome in self.outcomes)

    @property
    def reference(self) -> Outcome:
        return self.outcomes[0]


def document(night: Night) -> dict[str, Any]:
    """Every column of the history, and what night.json has beyond them."""
    manifest = _manifest(night.reference)
    facts = _facts(night, manifest)
    changed = _changed(night, facts, manifest is not None)
    compared = [o for o in night.outcomes[1:] if o.result or o.comparison] or night.outcomes
    failed = [outcome for outcome in night.outcomes if not outcome.equal]
    firsts = [outcome.first_difference() for outcome in failed]
    return {
        "night": night.name,
        "started": night.started.isoformat(timespec="seconds"),
        "seconds": round(night.seconds, 3),
        "verdict": "pass" if night.passed else "fail",
        "exit_code": 0 if night.passed else 1,
        "cause": _cause(night, changed),
        "run_hash": night.reference.run_hash,
        **_identity_columns(facts, manifest),
        **_counts(night, manifest),
        "variations": [_variation(o) for o in night.outcomes if o.result is not None]
        + [_left_out(variation) for variation in night.skipped],
        "baseline_status": night.baseline_status,
        "baseline_hash": night.baseline_hash,
        "num_comparisons": len(compared),
        "num_failed": len(failed),
        "first_difference": next((first for first in firsts if first), None),
        "last_good_night": night.last_good["night"] if night.last_good else None,
        "failing_since": None if night.passed else night.failing_since or night.name,
        "changed": [asdict(change) for change in changed],
        "facts": facts,
        "comparisons": [outcome.as_dict() for outcome in compared],
        "skipped": [{"name": v.name, "title": v.title, "reason": v.reason} for v in night.skipped],
        "groups": groups(night.outcomes),
        "directory": str(night.directory),
    }


def _manifest(reference: Outcome) -> dict[str, Any] | None:
    """The reference's manifest, where its run ended well."""
    result = reference.result
    if result is None or result.document is None:
        return None
    return read_manifest(str(result.output))


def _facts(night: Night, manifest: Mapping[str, Any] | None) -> dict[str, str]:
    if manifest is None:
        return dict(night.own_facts)
    facts = run_facts(manifest) | night.own_facts
    kernels = {k: v for k, v in facts.items() if k.startswith(("backend.cubins.", "backend.comp"))}
    if kernels:
        text = json.dumps(kernels, sort_keys=True)
        facts["kernels_hash"] = hashlib.sha256(text.encode()).hexdigest()
    return facts


def _changed(night: Night, facts: Mapping[str, str], is_whole: bool) -> list[Change]:
    """Since the last good night, else since the baseline was made."""
    before = night.last_good["facts"] if night.last_good else night.baseline_facts
    if before is None:
        return []
    if not is_whole:
        before = {name: value for name, value in before.items() if name.startswith(_OWN_FACTS)}
    return changes(before, facts)


def _cause(night: Night, changed: Sequence[Change]) -> str | None:
    """What differed and what changed, in as few sentences as it takes."""
    if night.passed:
        return None
    said = [
        sentence for sentence in (_reference(night), _runs(night), _baseline(night)) if sentence
    ]
    since = night.last_good and f"the last good night, {night.last_good['night']}"
    if since is None and night.baseline_facts is not None:
        since = "the baseline was made"
    if since is not None and changed:
        said.append(f"Changed since {since}: {describe(changed)}.")
    elif since is not None:
        said.append(
            f"Nothing on record changed since {since}: suspect the hardware, or a library that was "
            "replaced under its old version."
        )
    if night.failing_since is not None:
        said.append(f"Failing since the night {night.failing_since}.")
    return " ".join(said)


def _reference(night: Night) -> str | None:
    if night.reference.equal:
        return None
    return f"The job as configured did not end well: {night.reference.explanation}."


def _runs(night: Night) -> str | None:
    runs = [outcome for outcome in night.outcomes[1:] if outcome.against == "reference"]
    bad = [outcome for outcome in runs if not outcome.equal]
    if not bad:
        return None
    names = ", ".join(outcome.name for outcome in bad)
    first = f"{bad[0].name} ({bad[0].title}): {bad[0].explanation}"
    return (
        f"{len(bad)} of {len(runs)} runs do not agree with the job as configured ({names}); "
        f"{first}."
    )


def _baseline(night: Night) -> str | None:
    bad = [o for o in night.outcomes if o.against == "baseline" and not o.equal]
    return f"The night differs from the baseline: {bad[0].explanation}." if bad else None


def _identity_columns(
    facts: Mapping[str, str], manifest: Mapping[str, Any] | None
) -> dict[str, Any]:
    renamed = {
        "model_hash": "model.hash",
        "tokenizer_hash": "model.tokenizer_hash",
        "template_hash": "model.template_hash",
    }
    names = ("input_hash", "code_hash", "kernels_hash", "package_version", "git_commit")
    versions = {
        k.removeprefix("versions."): v for k, v in facts.items() if k.startswith("versions.")
    }
    return {
        "model_name": manifest["model"].get("name") if manifest else None,
        **{column: facts.get(name) for column, name in renamed.items()},
        **{name: facts.get(name) for name in (*names, "engine", "device", "cpu")},
        "versions": versions,
    }


def _counts(night: Night, manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    totals = manifest["totals"] if manifest else {}
    repeats = [o for o in night.outcomes if o.name.startswith(("reference", "repeat-"))]
    statistics_of = [m["statistics"] for m in map(_manifest, repeats) if m]
    return {
        "num_devices": _num_devices(night, manifest),
        **{name: totals.get(name) for name in ("num_rows", "num_tokens", "num_errors")},
        "tokens_per_s": _median([s["tokens_per_s"] for s in statistics_of]),
        "start_s": _median([s["start_s"] for s in statistics_of]),
    }


def _num_devices(night: Night, manifest: Mapping[str, Any] | None) -> int:
    """GPUs that took part, one by one or together; 1 on the numpy engine."""
    if manifest is None or manifest["engine"]["kind"] != "cuda":
        return 1
    ran = [o.result.variation for o in night.outcomes if o.result and o.result.document]
    return max([len({variation.gpu for variation in ran}), *(v.replicas or 1 for v in ran)])


def _median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 3) if values else None


def _variation(outcome: Outcome) -> dict[str, Any]:
    assert outcome.result is not None, f"{outcome.name} is no run"
    ran = outcome.result.document or {}
    return {
        "name": outcome.name,
        "title": outcome.title,
        "status": outcome.status,
        "run_hash": outcome.run_hash,
        "num_rows": ran.get("rows"),
        "num_differing": outcome.num_differing,
        "tokens_per_s": ran.get("tokens_per_s"),
        "seconds": round(outcome.result.seconds, 3),
    }


def _left_out(variation: Variation) -> dict[str, Any]:
    empty = dict.fromkeys(("run_hash", "num_rows", "num_differing", "tokens_per_s", "seconds"))
    return {"name": variation.name, "title": variation.title, "status": "skipped", **empty}
