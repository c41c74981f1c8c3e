"""Outputs and sweeps without a model: real files, rows that depend on id, sample and a salt."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orcd_batch.data import DatasetOptions, InputDataset, InputRow, PartStore, SampleResult
from orcd_batch.reproducibility import RunHash, numerics_hash, token_hash

Change = Callable[[SampleResult], SampleResult]


def made_result(row: InputRow, sample: int, salt: int, num_tokens: int) -> SampleResult:
    """Tokens that follow from the row's position, the sample and the salt."""
    ids = [(row.index * 31 + sample * 7 + salt * 13 + i) % 500 for i in range(num_tokens)]
    fingerprints = [token * 0x9E3779B97F4A7C15 % 2**63 for token in ids]
    return SampleResult(
        row_index=row.index,
        sample_index=sample,
        id=row.id,
        completion=f"completion {row.id} of salt {salt}",
        completion_ids=ids,
        finish_reason="stop" if salt % 2 else "length",
        prompt_tokens=4,
        completion_tokens=num_tokens,
        logprob=-0.5 * num_tokens,
        token_logprobs=[-0.5] * num_tokens,
        margins=[0.25 + 0.001 * row.index] * num_tokens,
        fingerprints=fingerprints,
        token_hash=token_hash([1, 2, 3, 4], ids),
        numerics_hash=numerics_hash(fingerprints),
    )


def made_run(
    path: Path,
    prompts: Sequence[str | None],
    salt: int = 0,
    sampling: Mapping[str, Any] | None = None,
    ids: Sequence[Any] | None = None,
    change: Change | None = None,
    num_tokens: int = 5,
    num_samples: int = 1,
) -> str:
    """An output file at `path` with a manifest like a real run's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(ids) if ids is not None else [f"row {i}" for i in range(len(prompts))]
    pq.write_table(pa.table({"prompt": list(prompts), "id": names}), f"{path}.in")
    dataset = InputDataset.open(f"{path}.in", DatasetOptions())
    chosen = {"temperature": 0.0, "seed": 0, "max_tokens": 8, "stop": [], "n": num_samples}
    chosen |= sampling or {}
    run_hash = RunHash()
    with PartStore.open(str(path), made_manifest(chosen, "")["identity"]) as store:
        for row in dataset.rows():
            results = [made_result(row, sample, salt, num_tokens) for sample in range(num_samples)]
            results = [change(result) if change else result for result in results]
            store.add(results)
            for result in results:
                keys = (result.token_hash, result.numerics_hash, result.error_kind)
                run_hash.add(row.id, result.sample_index, *keys)
        store.assemble(dataset, made_manifest(chosen, run_hash.hexdigest()))
    Path(f"{path}.in").unlink()
    return str(path)


def made_manifest(sampling: Mapping[str, Any], run_hash: str) -> dict[str, Any]:
    """The parts of a run's manifest that a report reads."""
    dataset = {"prompt_column": "prompt", "messages_column": "messages"}
    return {
        "identity": {
            "model_hash": "a" * 64,
            "input_hash": "b" * 64,
            "sampling": dict(sampling),
            "dataset": dataset,
            "engine": "numpy",
            "device": "made CPU",
        },
        "environment": {"git_commit": None},
        "config": {"sampling": dict(sampling), "dataset": dataset, "output": None},
        "model": {"name": "Made model"},
        "statistics": {
            "ended": "2026-11-21T14:39:16+00:00",
            "start_s": 1.0,
            "generate_s": 2.0,
            "prefill_s": 0.5,
            "decode_s": 1.25,
            "tokens_computed": 40,
            "tokens_per_s": 20.0,
            "weight_bytes": 1_000_000,
        },
        "run_hash": run_hash,
    }


def failed(result: SampleResult, reason: str = "why not") -> SampleResult:
    """The same row as an error."""
    return SampleResult.failed(result.row_index, result.sample_index, result.id, reason, "input")


def with_ids(result: SampleResult, ids: list[int]) -> SampleResult:
    """The same row with other tokens."""
    return replace(
        result,
        completion_ids=ids,
        completion_tokens=len(ids),
        token_hash=token_hash([1, 2, 3, 4], ids),
        margins=[0.25] * len(ids),
    )


def made_sweep(
    root: Path,
    prompts: Sequence[str | None] = ("one", "two", "three"),
    temperatures: Sequence[float] = (0.0, 0.7),
    seeds: Sequence[int] = (0, 1, 2),
    unfinished: Sequence[tuple[float, int]] = (),
    **options: Any,
) -> Path:
    """A multirun's directory. At temperature 0 all seeds give the same; elsewhere none do."""
    root.mkdir(parents=True)
    swept = [
        "model=smollm2",
        f"sampling.temperature={','.join(map(str, temperatures))}",
        f"sampling.seed={','.join(map(str, seeds))}",
    ]
    lines = "".join(f"    - {item}\n" for item in swept)
    (root / "multirun.yaml").write_text(f"hydra:\n  overrides:\n    task:\n{lines}")
    for temperature in temperatures:
        for seed in seeds:
            job = root / f"{round(10 * temperature):02d}{seed:02d}"
            overrides = [f"sampling.temperature={temperature}", f"sampling.seed={seed}"]
            (job / ".hydra").mkdir(parents=True)
            text = "".join(f"- {item}\n" for item in ["model=smollm2", *overrides])
            (job / ".hydra" / "overrides.yaml").write_text(text)
            if (temperature, seed) not in unfinished:
                salt = 0 if temperature == 0 else round(100 * temperature) + seed
                sampling = {"temperature": temperature, "seed": seed}
                made_run(job / "completions.parquet", prompts, salt, sampling, **options)
    return root
