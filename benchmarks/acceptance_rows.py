"""The rows of acceptance runs: prompts of random token ids, each with its own sampling."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from orcd_batch.engine.engine import Engine
from orcd_batch.engine.request import Completion, Request, SamplingParams
from orcd_batch.reproducibility.hashes import numerics_hash, stream_digest, token_hash

# Greedy, and every option of sampling in some row; one after another over the rows.
SAMPLING = (
    SamplingParams(ignore_eos=True),
    SamplingParams(temperature=0.8, seed=1, ignore_eos=True),
    SamplingParams(temperature=1.0, top_p=0.9, seed=2, ignore_eos=True),
    SamplingParams(temperature=1.2, top_k=40, min_p=0.02, seed=3, ignore_eos=True),
    SamplingParams(temperature=0.7, repetition_penalty=1.15, seed=4, ignore_eos=True),
)
SAMPLING_COLUMNS = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_tokens"),
)

# (token_hash, numerics_hash) of one row.
Bits = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Row:
    id: str
    prompt: tuple[int, ...]
    params: SamplingParams

    def request(self) -> Request:
        return Request(self.id, self.prompt, self.params, stream_digest(self.id, 0))


def make_rows(num_rows: int, vocab_size: int, longest: int, max_tokens: int) -> list[Row]:
    """Prompts of 1 to `longest` tokens; the first few have the odd lengths and the longest.

    Every third begins with the same tokens, several cache blocks of them where `longest` allows.
    Completions have max_tokens / 2 to max_tokens tokens.
    """
    random = np.random.default_rng(0)
    lengths = np.exp(random.normal(4.2, 1.0, num_rows)).astype(int).clip(1, max(longest // 4, 1))
    odd = [longest, 1, 64, longest // 2, 63, 65, 128, 2 * longest // 3]
    lengths[: len(odd)] = np.clip(odd[:num_rows], 1, longest)
    shared = random.integers(5, vocab_size, min(200, longest // 2))
    rows = []
    for index, length in enumerate(lengths.tolist()):
        prompt = random.integers(5, vocab_size, length)
        if index % 3 == 0:
            prompt = np.concatenate([shared, prompt])[: max(length, len(shared) + 1)]
        params = replace(
            SAMPLING[index % len(SAMPLING)],
            max_tokens=int(random.integers(-(-max_tokens // 2), max_tokens + 1)),
        )
        rows.append(Row(f"row-{index}", tuple(prompt.tolist()), params))
    return rows


def filler_rows(num_rows: int, vocab_size: int) -> list[Row]:
    """Short rows that take little time, so that a job has several parts."""
    random = np.random.default_rng(1)
    return [
        Row(
            f"filler-{index}",
            tuple(random.integers(5, vocab_size, 1 + index % 16).tolist()),
            replace(SAMPLING[index % len(SAMPLING)], max_tokens=1 + index % 8),
        )
        for index in range(num_rows)
    ]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """The rows as the input of a job whose dataset.sampling_columns are SAMPLING_COLUMNS."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [getattr(row.params, name) for row in rows] for name in SAMPLING_COLUMNS}
    prompts = pa.array([row.prompt for row in rows], pa.list_(pa.int32()))
    pq.write_table(
        pa.table({"id": [row.id for row in rows], "token_ids": prompts, **columns}), path
    )


def read_bits(path: Path) -> dict[str, Bits]:
    """The hashes of a job's output by id. Raises ValueError when a row is an error row."""
    import pyarrow.parquet as pq

    names = ["id", "token_hash", "numerics_hash", "error"]
    rows = pq.read_table(path, columns=names).to_pylist()
    if failed := [row for row in rows if row["error"]]:
        raise ValueError(f"{len(failed)} rows of {path} failed: {failed[0]}")
    return {str(row["id"]): (row["token_hash"], row["numerics_hash"]) for row in rows}


def complete(engine: Engine, requests: Iterable[Request]) -> dict[str, Completion]:
    """Runs the requests to their end; completions by key. Raises ValueError when one fails."""
    for request in requests:
        engine.add(request)
    done: dict[str, Completion] = {}
    while engine.has_unfinished:
        done.update((str(completion.key), completion) for completion in engine.step())
    for completion in done.values():
        if completion.error is not None:
            raise ValueError(f"row {completion.key!r} failed: {completion.error}")
    return done


def bits_of(row: Row, token_ids: Sequence[int], fingerprints: Sequence[int]) -> Bits:
    return token_hash(row.prompt, token_ids), numerics_hash(fingerprints)


def run_rows(engine: Engine, rows: Sequence[Row]) -> dict[str, Bits]:
    """The hashes of the rows, run together in the given order."""
    done = complete(engine, [row.request() for row in rows])
    return {row.id: bits_of(row, done[row.id].token_ids, done[row.id].fingerprints) for row in rows}
