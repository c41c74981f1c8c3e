"""What each run of a check proved: compared with the job as configured, and with the baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from orcd_batch.data import read_manifest
from orcd_batch.nightly.runs import RunResult
from orcd_batch.reproducibility.baseline import Baseline, output_run_hash
from orcd_batch.reproducibility.drift import describe
from orcd_batch.reproducibility.facts import changes, run_facts
from orcd_batch.reproducibility.verify import Comparison, compare, explanation

Status = Literal["equal", "differs", "failed"]
BASELINE = "baseline"

# What a variation changes on purpose.
_VARIED = ("input_hash", "dataset.", "backend.")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One comparison. name, title: of the variation, or the baseline's. against: what A is.

    comparison: None where the run did not end well. explanation: one sentence without its end.
    run_hash: computed from the rows of the run's output.
    """

    name: str
    title: str
    against: str
    status: Status
    explanation: str
    result: RunResult | None = None
    comparison: Comparison | None = None
    run_hash: str | None = None

    @property
    def equal(self) -> bool:
        return self.status == "equal"

    @property
    def num_differing(self) -> int | None:
        """Rows of this side that differ from the other's."""
        found = self.comparison
        return None if found is None else found.num_rows_b - found.num_equal

    def first_difference(self) -> dict[str, Any] | None:
        """The first differing row in the order of A, or the first that one side lacks."""
        found = self.comparison
        if self.equal or found is None:
            return None
        if found.differing:
            row = asdict(found.differing[0])
            names = ("kind", "sample_index", "position", "token_a", "token_b")
            return {
                "comparison": self.name,
                "id": str(row["id"]),
                **{name: row[name] for name in (*names, "margin_a", "margin_b")},
            }
        row_id, sample = (found.only_a or found.only_b)[0]
        lacking = {"comparison": self.name, "kind": "missing", "id": str(row_id)}
        rest = dict.fromkeys(("position", "token_a", "token_b", "margin_a", "margin_b"))
        return {**lacking, "sample_index": sample, **rest}

    def as_dict(self) -> dict[str, Any]:
        """The comparison as night.json has it."""
        counts = ("equal", "tokens_differ", "numerics_differ", "only_a", "only_b")
        return {
            "name": self.name,
            "title": self.title,
            "against": self.against,
            "equal": self.equal,
            "num_rows": self.comparison.num_rows_b if self.comparison else None,
            **{f"num_{what}": getattr(self.comparison, f"num_{what}", None) for what in counts},
            "explanation": self.explanation,
            "first_difference": self.first_difference(),
        }


def judge(result: RunResult, reference: Path, model_hash: str) -> Outcome:
    """A variation against the reference's output. model_hash: the file's, hashed by the check."""
    name, title = result.variation.name, result.variation.title
    problem = result.error or _swapped(result.output, model_hash)
    if problem is not None:
        return Outcome(name, title, "reference", "failed", problem.rstrip("."), result)
    found = compare(str(reference), str(result.output))
    is_part = result.variation.row is not None
    equal = found.num_equal == found.num_rows_b if is_part else found.equal
    return Outcome(
        name,
        title,
        "reference",
        "equal" if equal else "differs",
        _in_words(found, equal) + _dealt(result.output) + _surroundings(reference, result.output),
        result,
        found,
        output_run_hash(result.output),
    )


def judge_reference(result: RunResult, model_hash: str) -> Outcome:
    """The reference by itself: it must have ended well, with rows that are not all errors."""
    problem = result.error or _swapped(result.output, model_hash)
    if problem is None and result.document is not None:
        rows, errors = result.document["rows"], result.document["errors"]
        problem = f"All of its {rows} rows are error rows." if rows == errors else None
    title = result.variation.title
    if problem is not None:
        name = result.variation.name
        return Outcome(name, title, "reference", "failed", problem.rstrip("."), result)
    run_hash = output_run_hash(result.output)
    name = result.variation.name
    return Outcome(name, title, "reference", "equal", "it is itself", result, run_hash=run_hash)


def judge_baseline(baseline: Baseline, output: Path) -> Outcome:
    """The reference's output against the golden results."""
    (found,) = baseline.compare(str(output)).comparisons.values()
    title = f"the job as configured against the baseline in {baseline.directory}"
    words = explanation(found, "the baseline", "this night")
    status: Status = "equal" if found.equal else "differs"
    return Outcome(BASELINE, title, BASELINE, status, words, None, found)


def groups(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """The names of whole runs by their bits, the reference's group first."""
    found: dict[str, list[str]] = {}
    for outcome in outcomes:
        is_part = outcome.result is None or outcome.result.variation.row is not None
        if outcome.run_hash is not None and not is_part:
            found.setdefault(outcome.run_hash, []).append(outcome.name)
    return list(found.values())


def _in_words(found: Comparison, equal: bool) -> str:
    if equal:
        rows = "the row is" if found.num_rows_b == 1 else f"all {found.num_equal:,} rows are"
        return f"{rows} equal, tokens and numerics, bit for bit"
    return explanation(found, "the reference", "this run")


def _surroundings(reference: Path, output: Path) -> str:
    """What changed on the machine since the reference ran, if anything did."""
    before, now = (_facts(path) for path in (reference, output))
    found = [c for c in changes(before, now) if not c.field.startswith(_VARIED)]
    return f"; during the night changed: {describe(found)}" if found else ""


def _facts(output: Path) -> Mapping[str, str]:
    return run_facts(read_manifest(str(output)))


def _dealt(output: Path) -> str:
    """Which workers computed the rows, where there were several."""
    rows = [str(worker["rows"]) for worker in read_manifest(str(output))["workers"]]
    return f"; rows of each worker: {', '.join(rows)}" if rows else ""


def _swapped(output: Path, model_hash: str) -> str | None:
    """What is wrong when the run computed with another model file than the check has hashed."""
    found = read_manifest(str(output))["identity"]["model_hash"]
    if found == model_hash:
        return None
    return (
        f"It ran with the model file {found[:12]} where the check found {model_hash[:12]} at its "
        "start: the file changed during the night."
    )
