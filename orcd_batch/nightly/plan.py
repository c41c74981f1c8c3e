"""What a check varies: the runs that must all give the same bits, each described in plain words."""

import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from orcd_batch.config import CheckOptions


@dataclass(frozen=True, slots=True)
class Stop:
    """A run that is ended by a signal once `rows` rows are finished, and then run again."""

    rows: int
    signum: signal.Signals


@dataclass(frozen=True, slots=True)
class Variation:
    """One run of the job. name: also its directory's. title: what is different, in plain words.

    engine: engine options that replace the configured ones. order: seed of a shuffled order of the
    rows. row: index of the only row. gpu: its number among those this process sees. replicas: how
    many workers on Ray the rows are dealt to. reason: why it is left out, where it is.
    """

    name: str
    title: str
    engine: Mapping[str, Any] = field(default_factory=dict)
    order: int | None = None
    row: int | None = None
    stop: Stop | None = None
    gpu: int | None = None
    replicas: int | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class JobFacts:
    """What the first run told: the engine's kind and limits, the input's rows, the GPUs seen.

    has_ray: whether Ray is installed.
    """

    engine: str
    num_rows: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_names: tuple[str, ...] = ()
    has_ray: bool = False


REFERENCE = Variation("reference", "the job as configured")


def plan(check: CheckOptions, job: JobFacts) -> list[Variation]:
    """Every variation after the reference, in a fixed order; those with a `reason` do not run."""
    return [
        *(
            Variation(f"repeat-{i}", "the same again, in a new process")
            for i in range(2, check.runs + 1)
        ),
        *_batches(check, job),
        *_rows(check, job),
        *_caches(check, job),
        *_interruptions(check, job),
        *_places(check, job),
        *_scaled_out(check, job),
    ]


def _batches(check: CheckOptions, job: JobFacts) -> Iterator[Variation]:
    for size in check.batch_sizes:
        engine = {
            "max_num_seqs": size,
            "max_num_batched_tokens": max(size, job.max_num_batched_tokens),
        }
        yield Variation(f"batch-{size}", f"at most {_counted(size, 'sequence')} at a time", engine)
    for size in check.chunk_sizes:
        engine = {"max_num_seqs": min(size, job.max_num_seqs), "max_num_batched_tokens": size}
        title = f"prompts read in pieces of at most {_counted(size, 'token')}"
        yield Variation(f"chunk-{size}", title, engine)


def _rows(check: CheckOptions, job: JobFacts) -> Iterator[Variation]:
    alone = "there is only one row" if job.num_rows < 2 else None
    for seed in range(1, check.orders + 1):
        title = f"the rows in another order (shuffle {seed})"
        yield Variation(f"order-{seed}", title, order=seed, reason=alone)
    for row in _spread(check.single_rows, job.num_rows):
        yield Variation(f"row-{row}", f"row {row} alone", row=row, reason=alone)


def _caches(check: CheckOptions, job: JobFacts) -> Iterator[Variation]:
    if check.prefix_caching:
        title = "every prompt's keys and values computed anew, none shared"
        yield Variation("no-prefix-caching", title, {"prefix_caching": False})
    if check.graphs:
        reason = None if job.engine == "cuda" else f"the {job.engine} engine has no CUDA graphs"
        title = "every kernel launched by itself, without CUDA graphs"
        yield Variation("no-graphs", title, {"graphs": False}, reason=reason)


def _interruptions(check: CheckOptions, job: JobFacts) -> Iterator[Variation]:
    kinds = (
        ("stopped", "stopped (SIGTERM)", signal.SIGTERM, check.stop_after),
        ("killed", "killed (SIGKILL)", signal.SIGKILL, check.kill_after),
    )
    for name, verb, signum, after in kinds:
        for rows in after:
            few = f"there are only {job.num_rows} rows" if rows + 1 >= job.num_rows else None
            side_by_side = max(1, min(job.max_num_seqs, (job.num_rows - rows) // 2))
            yield Variation(
                f"{name}-{rows}",
                f"{verb} after {_counted(rows, 'row')}, then continued",
                {"max_num_seqs": side_by_side},
                stop=Stop(rows, signum),
                reason=few,
            )


def _places(check: CheckOptions, job: JobFacts) -> Iterator[Variation]:
    for count in check.thread_counts:
        reason = None if job.engine == "numpy" else "CPU threads compute nothing on a GPU"
        title = f"{_counted(count, 'CPU thread')}"
        yield Variation(f"threads-{count}", title, {"num_threads": count}, reason=reason)
    if not check.gpus:
        return
    others = [i for i, name in enumerate(job.gpu_names) if i and name == job.gpu_names[0]]
    for gpu in others:
        yield Variation(f"gpu-{gpu}", f"on GPU {gpu} of this machine", gpu=gpu)
    if not others:
        seen = _counted(len(job.gpu_names), "GPU")
        yield Variation("gpus", "on every other GPU of the same kind", reason=f"{seen} here")


def _scaled_out(check: CheckOptions, job: JobFacts) -> Iterator[Variation]:
    """So many workers as asked for, and all GPUs of a machine that has several of one kind."""
    counts = list(check.replicas)
    if check.gpus and len(job.gpu_names) > 1 and len(set(job.gpu_names)) == 1:
        counts.append(len(job.gpu_names))
    for count in dict.fromkeys(counts):
        # A worker that is ready first must not take all of the rows.
        side_by_side = max(1, min(job.max_num_seqs, job.num_rows // (2 * count)))
        yield Variation(
            f"replicas-{count}",
            f"the rows dealt to {_counted(count, 'worker')} by Ray",
            {"max_num_seqs": side_by_side},
            replicas=count,
            reason=_no_workers(count, job),
        )


def _no_workers(count: int, job: JobFacts) -> str | None:
    """Why so many workers cannot run here."""
    if not job.has_ray:
        return "Ray is not installed: pip install 'orcd-batch[ray]'"
    if job.engine == "cuda" and job.gpu_names.count(job.gpu_names[0]) < count:
        return f"{_counted(len(job.gpu_names), 'GPU')} here"
    return None


def _spread(count: int, num_rows: int) -> list[int]:
    """Up to `count` row indices from the first to the last."""
    if count < 2:
        return [0][:count]
    return sorted({i * (num_rows - 1) // (count - 1) for i in range(count)})


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
