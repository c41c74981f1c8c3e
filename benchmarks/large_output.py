"""Bytes and seconds of an output with completions of w3's size: what ten million rows will need.

    python benchmarks/large_output.py [--rows 60000]

Commits made-up results of 176 tokens in parts of 1,000 rows, opens them again as a restarted job
does, and writes the output. No engine; random tokens, which compress worse than text.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow as pa
import pyarrow.parquet as pq

from orcd_batch.data import DatasetOptions, InputDataset, InputRow, PartStore, SampleResult
from orcd_batch.provenance import run_totals

_NUM_TOKENS = 176
_PART_ROWS = 1000
_IDENTITY = {"job": "large output"}


def result(row: InputRow, rng: random.Random) -> SampleResult:
    ids = [rng.randrange(32000) for _ in range(_NUM_TOKENS)]
    return SampleResult(
        row_index=row.index,
        sample_index=0,
        id=row.id,
        completion=" ".join(map(str, ids[: 2 * _NUM_TOKENS // 3])),
        completion_ids=ids,
        finish_reason="stop",
        prompt_tokens=200,
        completion_tokens=len(ids),
        logprob=-1.0,
        token_logprobs=[-rng.random() for _ in ids],
        margins=[rng.random() for _ in ids],
        fingerprints=[rng.getrandbits(63) for _ in ids],
        token_hash=f"{rng.getrandbits(256):064x}",
        numerics_hash=f"{rng.getrandbits(256):064x}",
    )


def commit_parts(dataset: InputDataset, output: str) -> None:
    rng = random.Random(0)
    with PartStore.open(output, _IDENTITY) as store:
        for row in dataset.rows():
            store.add([result(row, rng)])
            if (row.index + 1) % _PART_ROWS == 0:
                store.commit()
        store.commit()


def measure(folder: Path, num_rows: int) -> dict[str, Any]:
    path, output = folder / "in.parquet", str(folder / "out.parquet")
    pq.write_table(pa.table({"prompt": [f"{i} " + "word " * 150 for i in range(num_rows)]}), path)
    dataset = InputDataset.open([str(path)], DatasetOptions())
    commit_parts(dataset, output)
    sizes = [part.stat().st_size for part in Path(f"{output}.parts").iterdir()]
    per_million = 1e6 / num_rows
    started = time.perf_counter()
    with PartStore.open(output, _IDENTITY) as store:
        opened = time.perf_counter()
        run_totals(store)
        counted = time.perf_counter()
        store.assemble(dataset, {})
    written = time.perf_counter()
    return {
        "rows": num_rows,
        "load": round(os.getloadavg()[0], 1),
        "part_bytes_per_row": round(sum(sizes) / num_rows),
        "output_bytes_per_row": round(os.path.getsize(output) / num_rows),
        "reopen_s_per_million_rows": round((opened - started) * per_million, 1),
        "run_hash_s_per_million_rows": round((counted - opened) * per_million, 1),
        "write_s_per_million_rows": round((written - counted) * per_million, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=60_000)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), parser.parse_args().rows)))


if __name__ == "__main__":
    main()
