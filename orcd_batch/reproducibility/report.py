"""What finished runs produced, how far they agree, and for a sweep how its variants differ."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import combinations
from typing import Any

from orcd_batch.reproducibility.report_page import render_terminal
from orcd_batch.reproducibility.report_statistics import RunStatistics, gather
from orcd_batch.reproducibility.run_output import RunOutput, find_outputs, num_passes
from orcd_batch.reproducibility.sweep_directory import FinishedJob, Sweep, find_sweep, is_sweep
from orcd_batch.reproducibility.variants import VariantStatistics, compare_variants
from orcd_batch.reproducibility.verify import match

__all__ = ["Agreement", "Report", "RunSummary", "VariantGroup", "as_dict", "render", "report"]

SEED = "sampling.seed"
# With more runs than this not every pair is compared.
MAX_COMPARED_RUNS = 48


@dataclass(slots=True)
class RunSummary:
    """One run. num_rows counts output rows (samples); the means are over rows without an error.

    mean_tokens: completion tokens a row. mean_logprob: natural log, per token. model, engine,
    sampling, tokens_per_s and run_hash are the manifest's. job_id and parameters: of a sweep's job;
    shared_with: how many other jobs ran together with it, so that its rate says little.
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
    shared_with: int = 0
    job_id: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How many samples (typed id, sample index) two runs share, and how many of them agree."""

    a: int
    b: int
    num_shared: int
    num_same_tokens: int
    num_same_bits: int


@dataclass(frozen=True, slots=True)
class VariantGroup:
    """Runs that differ in their seed alone. runs: positions; parameters: what they share."""

    parameters: dict[str, Any]
    runs: list[int]
    variants: VariantStatistics


@dataclass(frozen=True, slots=True)
class Report:
    """The runs in the order given, and the agreement of every pair (by position in `runs`).

    statistics and manifests: one per run. sweep: when one sweep's directory was named; groups:
    its runs by everything but the seed (one group of one run for a run with several samples).
    """

    runs: list[RunSummary]
    agreements: list[Agreement]
    statistics: list[RunStatistics] = field(default_factory=list)
    manifests: list[dict[str, Any]] = field(default_factory=list)
    sweep: Sweep | None = None
    groups: list[VariantGroup] = field(default_factory=list)


def report(runs: Sequence[str]) -> Report:
    """Reads output files, run directories, or sweep directories of runs.

    Raises InputError for a path that holds no complete run.
    """
    sweep = find_sweep(runs[0]) if len(runs) == 1 and is_sweep(runs[0]) else None
    jobs = {job.output: job for job in sweep.jobs} if sweep else {}
    paths = list(jobs) or [path for run in runs for path in _outputs(run)]
    with ExitStack() as stack:
        outputs = []
        for path in paths:
            outputs.append(RunOutput(path))
            stack.callback(outputs[-1].close)
        statistics = [gather(output) for output in outputs]
        summaries = [
            _summary(output, found, jobs.get(path))
            for output, found, path in zip(outputs, statistics, paths, strict=True)
        ]
        manifests = [output.manifest for output in outputs]
        groups = list(_groups(outputs, summaries, sweep))
        agreements = _agreements(outputs) if len(outputs) <= MAX_COMPARED_RUNS else []
        return Report(summaries, agreements, statistics, manifests, sweep, groups)


def as_dict(found: Report) -> dict[str, Any]:
    """The report's key figures as plain JSON values."""
    document: dict[str, Any] = {
        "runs": [asdict(run) for run in found.runs],
        "agreements": [asdict(pair) for pair in found.agreements],
    }
    if found.groups:
        document["groups"] = [_group_figures(group) for group in found.groups]
    if found.sweep:
        document["unfinished"] = [asdict(job) for job in found.sweep.unfinished]
    return document


def render(found: Report) -> Any:
    """A rich renderable: the report's tables."""
    from orcd_batch.reproducibility.report_contents import contents

    return render_terminal(contents(found, figures=False))


def timings(manifest: dict[str, Any]) -> dict[str, Any]:
    """A run's statistics; those of its whole group where jobs of a sweep ran together."""
    own = section(manifest, "statistics")
    return {**own, **section(own, "group")}


def busy_seconds(manifests: Sequence[dict[str, Any]]) -> float | None:
    """Seconds in which any of the runs generated; less than their sum where they overlapped.

    None when one does not say.
    """
    spans: dict[str, tuple[float, float]] = {}
    for index, manifest in enumerate(manifests):
        facts = timings(manifest)
        seconds, ended = facts.get("generate_s"), facts.get("ended")
        if not isinstance(seconds, int | float) or not isinstance(ended, str):
            return None
        end = datetime.fromisoformat(ended).timestamp()
        group = section(manifest, "statistics").get("group")
        spans[repr(group) if group else f"run {index}"] = end - seconds, end
    total = sum(end - start for start, end in spans.values())
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans.values()):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    # `ended` is rounded to a second: a small overlap is only that.
    return covered if covered < total - len(spans) else total


def section(document: dict[str, Any], *names: str) -> dict[str, Any]:
    """The nested object of these names, or an empty one."""
    for name in names:
        inner = document.get(name)
        document = inner if isinstance(inner, dict) else {}
    return document


def _outputs(path: str) -> list[str]:
    if is_sweep(path):
        return [job.output for job in find_sweep(path).jobs] or find_outputs(path)
    return find_outputs(path)


def _summary(output: RunOutput, found: RunStatistics, job: FinishedJob | None) -> RunSummary:
    manifest = output.manifest
    rate = section(manifest, "statistics").get("tokens_per_s")
    return RunSummary(
        path=output.path,
        model=section(manifest, "model").get("name"),
        engine=section(manifest, "identity").get("engine"),
        sampling=section(manifest, "identity", "sampling"),
        run_hash=manifest.get("run_hash"),
        tokens_per_s=float(rate) if isinstance(rate, int | float) else None,
        num_rows=output.num_rows,
        num_tokens=found.num_tokens,
        mean_tokens=found.num_tokens / found.num_good if found.num_good else None,
        mean_logprob=found.logprob / found.num_tokens if found.num_tokens else None,
        finish_reasons=dict(sorted(found.finish_reasons.items())),
        errors=dict(sorted(found.error_kinds.items())),
        shared_with=int(section(manifest, "statistics").get("shared_with") or 0),
        job_id=job.job_id if job else None,
        parameters=dict(job.parameters) if job else {},
    )


def _groups(
    outputs: Sequence[RunOutput], runs: Sequence[RunSummary], sweep: Sweep | None
) -> Iterator[VariantGroup]:
    """The runs of a sweep by what they share apart from the seed; else the one run there is."""
    if sweep is None and len(outputs) > 1:
        return
    members: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        shared = {name: value for name, value in run.parameters.items() if name != SEED}
        input_hash = section(outputs[index].manifest, "identity").get("input_hash")
        members.setdefault(repr((shared, input_hash, outputs[index].num_rows)), []).append(index)
    for chosen in members.values():
        shared = {k: v for k, v in runs[chosen[0]].parameters.items() if k != SEED}
        variants = compare_variants([outputs[index] for index in chosen])
        if sweep is not None or variants.num_pairs:
            yield VariantGroup(shared, chosen, variants)


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


def _group_figures(group: VariantGroup) -> dict[str, Any]:
    found = group.variants
    return {
        "parameters": group.parameters,
        "runs": group.runs,
        "prompts": found.num_prompts,
        "variants": found.num_variants,
        "same_tokens": found.same_tokens,
        "same_bits": found.same_bits,
        "distinct_completions": found.distinct_completions,
        "distinct_1": found.distinct_1,
        "distinct_2": found.distinct_2,
        "mean_divergence": found.mean_divergence,
        "mean_edit_distance": found.mean_edit_distance,
    }
