"""The tables of a sweep: its jobs, and how the variants of a prompt agree and differ."""

from collections.abc import Sequence

from orcd_batch.data.manifest import shortened
from orcd_batch.reproducibility.report import Report
from orcd_batch.reproducibility.report_page import Table
from orcd_batch.reproducibility.report_statistics import RunStatistics
from orcd_batch.reproducibility.report_tables import (
    MEANS,
    RESULTS,
    counted,
    figures,
    filled,
    numeric,
    percent,
    rounded,
    short_name,
    text,
)


def jobs(found: Report) -> list[Table]:
    """A sweep's finished jobs by their parameters, then their hashes."""
    assert found.sweep is not None, "jobs are a sweep's"
    names = found.sweep.parameters
    rows = [
        (str(i), *(shortened(run.parameters[name]) for name in names), *figures(run))
        for i, run in enumerate(found.runs)
    ]
    columns = ("#", *map(short_name, names), *RESULTS)
    hashes = [
        (str(i), text(run.job_id), (run.run_hash or "–")[:32], counted(run.finish_reasons))
        for i, run in enumerate(found.runs)
    ]
    return [
        filled(Table("Finished jobs", columns, rows, numeric(columns), MEANS)),
        Table("Hashes", ("#", "job", "run hash", "finish"), hashes, frozenset((0,))),
    ]


def groups(found: Report, pooled: Sequence[RunStatistics]) -> list[Table]:
    """Diversity and agreement of the variants, one line per group of jobs; then their results."""
    names = list(dict.fromkeys(name for group in found.groups for name in group.parameters))
    shared = [[shortened(group.parameters[name]) for name in names] for group in found.groups]
    agreement = (
        "jobs",
        "same tokens",
        "same bits",
        "distinct",
        "new 1",
        "new 2",
        "part at",
        "edits",
    )
    first = []
    second = []
    for own, group, statistics in zip(shared, found.groups, pooled, strict=True):
        v, good = group.variants, statistics.num_good
        mean = statistics.logprob / statistics.num_tokens if statistics.num_tokens else None
        first.append(
            (
                *(*own, str(len(group.runs)), percent(v.same_tokens), percent(v.same_bits)),
                *(percent(v.distinct_completions), percent(v.distinct_1), percent(v.distinct_2)),
                *(rounded(v.mean_divergence, 1), percent(v.mean_edit_distance)),
            )
        )
        length = statistics.num_tokens / good if good else None
        reasons = counted(statistics.finish_reasons)
        second.append((*own, f"{v.num_prompts:,}", rounded(length, 1), rounded(mean, 4), reasons))
    note = (
        "same: pairs of variants of a prompt that agree. distinct: different completions of a "
        "prompt, of its variants. new 1, new 2: different tokens and token pairs, of all in a "
        "prompt's variants (distinct-1 and -2). part at: mean position of the first different "
        "token. edits: tokens to change from one variant to another, of the longer one."
    )
    shown = [short_name(name) for name in names]
    columns = (*shown, *agreement)
    lengths = (*shown, "prompts", "length", "logprob", "finish")
    return [
        Table("Agreement and diversity", columns, first, numeric(columns), note),
        Table("Length and log-probability", lengths, second, numeric(lengths[:-1])),
    ]


def variants(found: Report) -> list[Table]:
    """The samples of each row of one run, where rows have several."""
    if not found.groups:
        return []
    return groups(found, [found.statistics[0]])[:1]
