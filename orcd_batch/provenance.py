"""What a result depends on: the job's identity, and the manifest written with the output."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow.compute as pc

from orcd_batch.config import JobOptions
from orcd_batch.data import PartStore
from orcd_batch.engine_factory import EngineChoice, choose_engine
from orcd_batch.loaded_engine import Machinery
from orcd_batch.model_source import ModelSource, described
from orcd_batch.reproducibility.environment import code_hash
from orcd_batch.reproducibility.environment import environment as environment_of
from orcd_batch.reproducibility.hashes import RunHash
from orcd_batch.reproducibility.run_records import add_batch


def choose_here(kind: str) -> tuple[EngineChoice, dict[str, Any]]:
    """The engine that `engine=kind` means in this process, and the environment it runs in.

    Raises as `choose_engine` does.
    """
    choice = choose_engine(kind)
    return choice, environment_of(choice.kind)


def job_identity(
    options: JobOptions,
    source: ModelSource,
    input_hash: str,
    choice: EngineChoice,
    environment: dict[str, Any],
) -> dict[str, Any]:
    """Everything that could change a bit of the output, as plain values.

    Two runs with equal identities are the same job: one may continue the other. The host's CPU
    counts on the numpy engine only: nothing it computes reaches a GPU's bits.
    """
    plain = asdict(options)
    no_effect = {"orcd_batch", "git_commit"}  # code_hash says it better
    if choice.kind == "cuda":
        no_effect.add("cpu")
    return {
        "model_hash": source.content_hash,
        "input_hash": input_hash,
        "tokenizer_hash": source.tokenizer.content_hash,
        "template_hash": source.template_hash,
        "model": {k: plain["model"][k] for k in ("chat", "chat_date", "sliding_window")},
        "max_model_len": options.engine.max_model_len or source.config.context_length,
        "sampling": plain["sampling"],
        "dataset": {k: v for k, v in plain["dataset"].items() if k != "on_error"},
        "engine": choice.kind,
        "device": choice.device,
        "code_hash": code_hash(),
        "versions": {
            **{k: v for k, v in environment.items() if k not in no_effect},
            **choice.versions,
        },
    }


@dataclass(frozen=True, slots=True)
class RunTotals:
    """Counts over all finished output rows of a store, resumed ones included."""

    num_rows: int
    num_errors: int
    num_tokens: int
    run_hash: str


def run_totals(store: PartStore) -> RunTotals:
    """One pass over the finished rows: counts, completion tokens and the run hash."""
    run_hash = RunHash()
    num_errors = num_tokens = 0
    for batch in store.record_batches():
        add_batch(run_hash, batch)
        num_errors += batch.num_rows - batch.column("error_kind").null_count
        num_tokens += pc.sum(batch.column("completion_tokens")).as_py() or 0
    return RunTotals(len(run_hash), num_errors, num_tokens, run_hash.hexdigest())


def run_statistics(
    seconds: Mapping[str, float],
    num_tokens: int,
    num_tokens_of_all: Sequence[int],
    machinery: Machinery,
) -> dict[str, Any]:
    """Times and counts of one job's run, none of which counts twice when jobs are added up.

    seconds: start_s and generate_s of all jobs that ran side by side, num_tokens_of_all: their
    tokens, num_tokens: this job's. What they shared lies under `group`; a job that ran alone has it
    beside its own figures. tokens_sampled is less than tokens_computed where samples were one.
    """
    generate_s, num_others = seconds["generate_s"], len(num_tokens_of_all) - 1
    own = {
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "shared_with": num_others,
        "tokens_computed": num_tokens,
        "tokens_per_s": round(num_tokens / generate_s, 2),
    }
    shared = {
        **{name: round(value, 3) for name, value in seconds.items()},
        "tokens_sampled": machinery.runner.num_sampled_tokens,
        **machinery.statistics(),
        **machinery.memory(),
    }
    if not num_others:
        return own | shared
    total = sum(num_tokens_of_all)
    rates = {"tokens_computed": total, "tokens_per_s": round(total / generate_s, 2)}
    return own | {"group": {"jobs": num_others + 1, **rates, **shared}}


def manifest(
    options: JobOptions,
    identity: dict[str, Any],
    source: ModelSource,
    machinery: Machinery,
    totals: RunTotals,
    statistics: dict[str, Any],
    environment: dict[str, Any],
) -> dict[str, Any]:
    """The document written with the results (SPEC section 6); plain JSON values only."""
    workers = machinery.workers()
    return {
        "identity": identity,
        "environment": environment,
        "config": asdict(options),
        "model": {"path": str(source.gguf.path), **described(source.config)},
        "engine": machinery.describe(),
        "num_devices": len(workers) or 1,
        "workers": workers,
        "totals": asdict(totals),
        "statistics": statistics,
        "run_hash": totals.run_hash,
    }
