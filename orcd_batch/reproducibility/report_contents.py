"""What a report over runs says, in which order: a sweep, one run, or several side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orcd_batch.data.manifest import shortened
from orcd_batch.reproducibility import report_figures as draw
from orcd_batch.reproducibility import report_tables as tables
from orcd_batch.reproducibility import sweep_tables
from orcd_batch.reproducibility.combine import sweep_hash
from orcd_batch.reproducibility.plots import MISSING, can_draw
from orcd_batch.reproducibility.report import Report, busy_seconds, section, timings
from orcd_batch.reproducibility.report_page import Fact, Figure, Notice, Page, Section
from orcd_batch.reproducibility.report_readings import readings
from orcd_batch.reproducibility.report_statistics import RunStatistics


def contents(found: Report, figures: bool = True) -> Page:
    """The report as a page; figures=False leaves out what a terminal cannot show."""
    drawing = figures and can_draw()
    if found.sweep is not None:
        page = _sweep(found, drawing)
    elif len(found.runs) == 1:
        page = _run(found, drawing)
    else:
        page = _several(found, drawing)
    page.notices += _row_notices(found)
    if figures and not drawing:
        page.notices.append(Notice("warning", MISSING))
    if figures:
        page.sections.append(readings(found))
    page.sections.append(Section("What ran", tables=tables.environment(found.manifests)))
    return page


def _sweep(found: Report, drawing: bool) -> Page:
    sweep = found.sweep
    assert sweep is not None, "a sweep's page is for a sweep"
    names = [tables.group_name(group.parameters) for group in found.groups]
    variants = [group.variants for group in found.groups]
    pooled = [_pooled([found.statistics[i] for i in group.runs]) for group in found.groups]
    page = Page(f"Sweep {sweep.directory.resolve().name}", _subtitle(found))
    num_jobs = len(sweep.jobs) + len(sweep.unfinished)
    done = f"{len(sweep.jobs)}" + (f" of {num_jobs}" if sweep.unfinished else "")
    hashes = [str(run.run_hash) for run in found.runs]
    page.facts = [Fact("jobs", done), *_totals(found)]
    page.facts.append(Fact("sweep hash", sweep_hash(hashes)[:12]))
    page.notices = [*_unfinished(found), *_greedy_notices(found)]
    comparison = Section(
        "Seeds and temperature" if len(names) > 1 else "Seeds",
        "Variants are the completions of one prompt by jobs that differ in their seed alone (and "
        "by the samples of one row). The same tokens with the same bits come from the same "
        "computation; without randomness every seed gives the same.",
        tables=sweep_tables.groups(found, pooled),
    )
    if drawing:
        if any(group.num_pairs for group in variants):
            comparison.figures += [draw.together(names, variants), draw.diversity(names, variants)]
        comparison.figures += [draw.lengths(names, pooled), draw.logprobs(names, pooled)]
    jobs = Section("Jobs", tables=sweep_tables.jobs(found))
    if drawing and len(found.runs) > 1 and found.agreements:
        jobs.figures.append(_agreement_figure(found))
    page.sections += [comparison, jobs]
    return page


def _run(found: Report, drawing: bool) -> Page:
    (run,), (statistics,), (manifest,) = found.runs, found.statistics, found.manifests
    page = Page(f"Run {_short_path(run.path)}", _subtitle(found))
    page.facts = [*_totals(found), Fact("run hash", (run.run_hash or "–")[:12])]
    rows = Section("Rows", tables=[tables.results(found), *sweep_tables.variants(found)])
    rows.tables += tables.notable(statistics)
    seconds, ops = _phases(manifest), _op_seconds(manifest)
    time = Section("Time and memory", tables=tables.resources(manifest))
    if drawing and statistics.num_good:
        rows.figures += [draw.length_histogram(statistics), draw.logprob_histogram(statistics)]
        rows.figures.append(draw.margin_histogram(statistics))
    if drawing and found.groups:
        names = ["samples of a row"]
        rows.figures.append(draw.together(names, [found.groups[0].variants]))
    if drawing and seconds:
        time.figures.append(draw.time_bars("Where the time went", seconds))
    if drawing and ops:
        time.figures.append(draw.time_bars("Time by op", ops))
    page.sections += [rows, time]
    return page


def _several(found: Report, drawing: bool) -> Page:
    names = tables.run_names(found)
    page = Page(f"{len(found.runs)} runs side by side", _subtitle(found))
    page.facts = _totals(found)
    compared = Section("Results", tables=[tables.runs(found), tables.results(found)])
    agreement = Section("Agreement", tables=[*tables.agreement(found), tables.differing(found)])
    if drawing:
        compared.figures += [draw.lengths(names, found.statistics)]
        compared.figures += [draw.logprobs(names, found.statistics)]
        if found.agreements:
            agreement.figures.append(_agreement_figure(found))
    page.sections += [compared, agreement]
    return page


def _totals(found: Report) -> list[Fact]:
    rows = sum(run.num_rows for run in found.runs)
    errors = sum(sum(run.errors.values()) for run in found.runs)
    tokens = sum(run.num_tokens for run in found.runs)
    facts = [Fact("rows", f"{rows:,}"), Fact("error rows", f"{errors:,}")]
    facts.append(Fact("completion tokens", f"{tokens:,}"))
    seconds = busy_seconds(found.manifests)
    computed = [section(m, "statistics").get("tokens_computed", 0) for m in found.manifests]
    if seconds:
        facts.append(Fact("generating", tables.duration(seconds)))
        facts.append(Fact("tokens/s", f"{sum(computed) / seconds:,.0f}"))
    return facts


def _subtitle(found: Report) -> str:
    """The distinct models, engines and devices, and when the last run ended."""
    facts = [
        dict.fromkeys(run.model or "unknown model" for run in found.runs),
        dict.fromkeys(f"{run.engine or 'unknown'} engine" for run in found.runs),
        dict.fromkeys(str(section(m, "identity").get("device", "")) for m in found.manifests),
    ]
    ended = [str(section(m, "statistics").get("ended", "")) for m in found.manifests]
    parts = [", ".join(name for name in names if name) for names in facts]
    parts.append(max(ended, default="").replace("T", " ").replace("+00:00", " UTC"))
    return " · ".join(part for part in parts if part)


def _unfinished(found: Report) -> list[Notice]:
    missing = found.sweep.unfinished if found.sweep else []
    if not missing:
        return []
    shown = "; ".join(
        (" ".join(job.overrides) or "a job")
        + (f" (started, {job.job_id})" if job.job_id else " (not started)")
        for job in missing[:12]
    )
    more = f"; and {len(missing) - 12} more" if len(missing) > 12 else ""
    text = f"{len(missing)} of the sweep's jobs are not finished: {shown}{more}. The same command "
    return [Notice("warning", text + "continues the sweep.")]


def _greedy_notices(found: Report) -> list[Notice]:
    """Without randomness the seed must change nothing: a check that every sweep makes for free."""
    notices = []
    for group in found.groups:
        sampling = found.runs[group.runs[0]].sampling
        same = group.variants.num_same_bits, group.variants.num_pairs
        if sampling.get("temperature") != 0 or not same[1]:
            continue
        if same[0] == same[1]:
            text = f"At temperature 0 all seeds agree bit for bit ({same[1]:,} pairs of rows)."
            notices.append(Notice("good", text))
        else:
            text = (
                f"At temperature 0 seeds must not matter, but {same[1] - same[0]:,} of {same[1]:,} "
                "pairs of rows differ: `orcd-batch verify` on two of the jobs says where."
            )
            notices.append(Notice("bad", text))
    return notices


def _row_notices(found: Report) -> list[Notice]:
    reasons: dict[str, int] = {}
    for statistics in found.statistics:
        for reason, number in statistics.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + number
    if not reasons:
        return []
    most = sorted(reasons.items(), key=lambda item: -item[1])[:5]
    shown = "; ".join(f"{number:,} × {shortened(reason.rstrip('.'))}" for reason, number in most)
    return [Notice("warning", f"Error rows: {sum(reasons.values()):,} ({shown}).")]


def _pooled(parts: Sequence[RunStatistics]) -> RunStatistics:
    """The distributions of several runs taken together."""
    pooled = RunStatistics()
    longest = max(len(part.lengths) for part in parts)
    pooled.lengths = np.zeros(longest, np.int64)
    for part in parts:
        pooled.lengths[: len(part.lengths)] += part.lengths
        pooled.logprobs.counts += part.logprobs.counts
        pooled.margins.counts += part.margins.counts
        pooled.finish_reasons.update(part.finish_reasons)
        pooled.error_kinds.update(part.error_kinds)
        pooled.num_tokens += part.num_tokens
        pooled.logprob += part.logprob
        pooled.num_near_ties += part.num_near_ties
    return pooled


def _agreement_figure(found: Report) -> Figure:
    size = len(found.runs)
    shares = np.full((size, size), np.nan)
    np.fill_diagonal(shares, 1.0)
    for pair in found.agreements:
        if pair.num_shared:
            shares[pair.a, pair.b] = shares[pair.b, pair.a] = pair.num_same_tokens / pair.num_shared
    names = found.sweep.parameters if found.sweep else ()
    values = [", ".join(shortened(run.parameters[name]) for name in names) for run in found.runs]
    rows = [f"{number}:  {value}" if value else str(number) for number, value in enumerate(values)]
    meaning = ", ".join(["number", *map(tables.short_name, names)])
    return draw.agreement(rows, shares, meaning)


def _phases(manifest: dict[str, Any]) -> list[tuple[str, float]]:
    """Start, prefill, decode, and the rest of generation."""
    facts = timings(manifest)
    values = [facts.get(name) for name in ("start_s", "prefill_s", "decode_s", "generate_s")]
    if not all(isinstance(value, int | float) for value in values):
        return []
    start, prefill, decode, generate = (float(value) for value in values if value is not None)
    rest = max(0.0, generate - prefill - decode)
    return [("start", start), ("prefill", prefill), ("decode", decode), ("rest", rest)]


def _op_seconds(manifest: dict[str, Any]) -> list[tuple[str, float]]:
    times = section(manifest, "engine", "backend", "op_times")
    found = [(name, float(item["seconds"])) for name, item in times.items()]
    return sorted(found, key=lambda item: -item[1])


def _short_path(path: str) -> str:
    """The run's directory, or its file's name."""
    parts = Path(path)
    return parts.parent.name if parts.name == "completions.parquet" else parts.name
