"""A job of a million rows without a model: reading, committing, finishing, in bounded memory.

    python tests/large_job.py --rows 1000000

Prints the time and the growth of resident memory, and fails beyond 300 MB.
"""

import argparse
import json
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from support.part_records import records

from orcd_batch.data import DatasetOptions, InputDataset, InputRow, PartStore, SampleResult
from orcd_batch.reproducibility import RunHash, numerics_hash, token_hash

MAX_GROWTH_BYTES = 300 * 10**6
IDENTITY = {"job": "large"}


def trivial_result(row: InputRow, sample: int, num_tokens: int) -> SampleResult:
    """What an engine would give: tokens and numbers that depend on the row alone."""
    if row.error is not None:
        return SampleResult.failed(row.index, sample, row.id, row.error, "input")
    ids = [(row.index + sample + i) % 50_000 for i in range(num_tokens)]
    fingerprints = [token * 0x9E3779B97F4A7C15 % 2**63 for token in ids]
    return SampleResult(
        row_index=row.index,
        sample_index=sample,
        id=row.id,
        completion=f"completion of row {row.index}",
        completion_ids=ids,
        finish_reason="stop",
        prompt_tokens=4,
        completion_tokens=num_tokens,
        logprob=-0.5 * num_tokens,
        token_logprobs=[-0.5] * num_tokens,
        margins=[0.25] * num_tokens,
        fingerprints=fingerprints,
        token_hash=token_hash([1, 2, 3, 4], ids),
        numerics_hash=numerics_hash(fingerprints),
    )


def run_trivial_job(
    dataset: InputDataset, store: PartStore, num_tokens: int = 4, window: int = 1024
) -> str:
    """Runs every row that is not done, finishing them out of order, and returns the run hash."""
    for row in shuffled(dataset.rows(skip=store.is_done), window):
        samples = range(row.overrides.get("n", 1))
        store.add([trivial_result(row, sample, num_tokens) for sample in samples])
        if store.commit_due:
            store.commit()
    run_hash = RunHash()
    for record in records(store):
        run_hash.add(
            record.id,
            record.sample_index,
            record.token_hash,
            record.numerics_hash,
            record.error_kind,
        )
    store.assemble(dataset, {"run_hash": run_hash.hexdigest()})
    return run_hash.hexdigest()


def shuffled(rows: Iterable[InputRow], window: int) -> Iterator[InputRow]:
    """The rows as an engine finishes them: mixed within a window of so many."""
    waiting: list[InputRow] = []
    chance = random.Random(0)
    for row in rows:
        waiting.append(row)
        if len(waiting) >= window:
            yield waiting.pop(chance.randrange(len(waiting)))
    yield from waiting


def write_input(path: Path, num_rows: int) -> None:
    """A Parquet file of one row group with string ids and prompts of 100 to 300 characters."""
    schema = pa.schema([("id", pa.string()), ("prompt", pa.string()), ("score", pa.float64())])
    chance = np.random.default_rng(0)
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, num_rows, 250_000):
            rows = range(first, min(first + 250_000, num_rows))
            lengths = chance.integers(4, 12, len(rows))
            words = [f"row {i} " for i in rows]
            prompts = [w + "of a large job, " * n for w, n in zip(words, lengths, strict=True)]
            scores = chance.random(len(rows))
            writer.write_table(
                pa.table([[f"row-{i}" for i in rows], prompts, scores], schema=schema),
                row_group_size=250_000,
            )


class ResidentMemory:
    """The growth of this process's resident memory, sampled while the block runs (Linux)."""

    def __enter__(self) -> "ResidentMemory":
        self.start = self.peak = _resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, _resident_bytes())

    @property
    def growth(self) -> int:
        return self.peak - self.start

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, _resident_bytes())


def _resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert match, "no VmRSS in /proc/self/status"
    return int(match[1]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=4, help="tokens of each completion")
    parser.add_argument("--window", type=int, default=1024, help="how far rows finish out of order")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        data, output = f"{directory}/input.parquet", f"{directory}/output.parquet"
        pid = os.fork()  # the input is written elsewhere, so that its memory does not count here
        if pid == 0:
            write_input(Path(data), options.rows)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0, "writing the input failed"
        started = time.perf_counter()
        with ResidentMemory() as memory:
            dataset = InputDataset.open(data, DatasetOptions())
            with PartStore.open(output, IDENTITY) as store:
                run_hash = run_trivial_job(dataset, store, options.tokens, options.window)
        seconds = time.perf_counter() - started
        with pq.ParquetFile(output) as written:
            num_rows = written.metadata.num_rows
        document = {
            "rows": num_rows,
            "seconds": round(seconds, 1),
            "rows_per_s": round(num_rows / seconds),
            "growth_mb": round(memory.growth / 1e6, 1),
            "limit_mb": MAX_GROWTH_BYTES // 10**6,
            "input_mb": round(Path(data).stat().st_size / 1e6, 1),
            "output_mb": round(Path(output).stat().st_size / 1e6, 1),
            "run_hash": run_hash,
        }
    print(json.dumps(document))
    return 0 if num_rows == options.rows and memory.growth < MAX_GROWTH_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
