"""Mutated Parquet files: each is refused with a typed error or read; never a crash or a hang.

    python tests/fuzz_parquet.py --count 10000

Worker processes open and read mutated files through InputDataset. A worker that dies, that takes
over a second for a file, or that allocates more than 64 MB for one is a finding.
"""

import argparse
import json
import os
import random
import resource
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

MAX_SECONDS = 1.0
MAX_BYTES = 64 * 2**20
_BATCH = 500
_HANG_SECONDS = 20.0


class Seed(NamedTuple):
    """A valid file, where its page headers begin, and the dataset options it is read with."""

    data: bytes
    places: list[int]
    options: dict[str, Any]


def seed_files() -> list[Seed]:
    """Small valid files of different layouts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = [f"prompt {i} " + "word " * (i % 7) for i in range(60)]
    message = [[{"role": "user", "content": word}] * (i % 3) for i, word in enumerate(words)]
    tokens = [list(range(i % 9)) for i in range(60)]
    tables: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
        (
            {"prompt": words, "id": list(range(60))},
            {"compression": "none", "use_dictionary": False, "store_schema": False},
            {},
        ),
        (
            {"prompt": words * 2, "id": [f"k{i}" for i in range(120)]},
            {"compression": "snappy", "row_group_size": 25, "store_schema": False},
            {},
        ),
        (
            {"messages": message, "seed": pa.array(range(60), pa.uint64())},
            {"compression": "zstd", "data_page_version": "2.0", "store_schema": False},
            {"sampling_columns": ["seed"]},
        ),
        (
            {"token_ids": tokens, "label": pa.array(["a", "b"] * 30).dictionary_encode()},
            {"compression": "gzip", "data_page_size": 64, "write_page_index": True},
            {},
        ),
        (
            {"prompt": pa.array([*words[:30], *[None] * 30], pa.large_string())},
            {"compression": "lz4", "column_encoding": "DELTA_BYTE_ARRAY", "use_dictionary": False},
            {},
        ),
        (
            {
                "prompt": words,
                "price": pa.array(range(60)).cast(pa.decimal128(24, 2)),
                "when": pa.array(range(60), pa.timestamp("us", "UTC")),
                "flags": pa.array([i % 3 == 0 for i in range(60)]),
                "pairs": pa.array([[("k", i)] for i in range(60)], pa.map_("string", "int16")),
            },
            {"compression": "snappy"},
            {},
        ),
    ]
    found = []
    for columns, writing, reading in tables:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink, **writing)
        metadata = pq.read_metadata(pa.BufferReader(sink.getvalue()))
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
        offsets = [(chunk.data_page_offset, chunk.dictionary_page_offset) for chunk in chunks]
        places = [offset for pair in offsets for offset in pair if offset]
        found.append(Seed(sink.getvalue().to_pybytes(), places, reading))
    return found


def mutated(data: bytes, places: list[int], chance: random.Random) -> bytes:
    """The file with a few bytes changed, cut, repeated or moved.

    places: where page headers begin. Changes fall on the footer, on page headers, or anywhere;
    some turn a number into a huge one (a long varint), with the footer's length put right.
    """
    content = bytearray(data)
    footer = len(content) - 8 - struct.unpack("<I", content[-8:-4])[0]
    body = bytearray(content[:-8])
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        where = chance.random()
        if where < 0.4:
            at = chance.randrange(footer, len(body))
        elif where < 0.8:
            at = chance.choice(places) + chance.randrange(24)
        else:
            at = chance.randrange(len(body))
        _change(body, min(at, len(body) - 1), chance)
    if chance.random() < 0.9:
        tail = struct.pack("<I", max(0, len(body) - footer)) + b"PAR1"
    else:
        tail = bytes(content[-8:])
    if chance.random() < 0.02:
        del body[chance.randrange(len(body)) :]
    return bytes(body) + tail


def _change(body: bytearray, at: int, chance: random.Random) -> None:
    kind = chance.random()
    if kind < 0.35:
        body[at] ^= 1 << chance.randrange(7)  # a varint keeps its length
    elif kind < 0.6:
        body[at] = chance.choice((0, 1, 2, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    elif kind < 0.8:
        number = chance.choice(
            (2**15, 2**24, 2**31 - 2, 2**32, 2**40, 2**63, chance.getrandbits(64))
        )
        body[at : at + 1] = _varint(number)
    elif kind < 0.9:
        end = at + chance.randrange(1, 12)
        body[at:end] = chance.choice((b"", body[at:end] * 2, b"\xff" * (end - at)))
    else:
        source = chance.randrange(len(body))
        piece = body[source : source + chance.randrange(1, 40)]
        body[at : at + len(piece)] = piece


def _varint(number: int) -> bytes:
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def case(number: int, seeds: list[Seed]) -> tuple[bytes, dict[str, Any]]:
    """The mutation of this number: the same bytes in every run and in every process."""
    seed = seeds[number % len(seeds)]
    return mutated(seed.data, seed.places, random.Random(number)), seed.options


def read_all(path: str, options: dict[str, Any]) -> int:
    """Everything a job does with its input; returns the number of rows. Raises InputError."""
    from orcd_batch.data import DatasetOptions, InputDataset

    dataset = InputDataset.open(path, DatasetOptions(**options))
    dataset.content_hash()
    number = sum(1 for _ in dataset.rows())
    for _, batch in dataset.batches(dataset.columns.kept):
        assert batch.num_rows, "an empty batch"
    return number


def work(start: int, end: int, path: str) -> None:
    """Runs the cases start … end - 1, one line of JSON each."""
    import pyarrow as pa

    from orcd_batch.errors import InputError

    seeds = seed_files()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in range(start, end):
        content, options = case(number, seeds)
        Path(path).write_bytes(content)
        print(json.dumps({"begin": number}), flush=True)
        before, started = pa.default_memory_pool().max_memory(), time.perf_counter()
        resident = _peak_resident_bytes(reset=True)
        try:
            read_all(path, options)
            outcome = "read"
        except InputError as error:
            outcome = "refused"
            if "\n" in str(error):
                outcome = f"unreadable message: {error}"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        found = {
            "case": number,
            "outcome": outcome,
            "seconds": time.perf_counter() - started,
            "pool": pa.default_memory_pool().max_memory() - before,
            "resident": _peak_resident_bytes() - resident,
        }
        print(json.dumps(found), flush=True)


def _peak_resident_bytes(reset: bool = False) -> int:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


class Findings:
    """Counts of the outcomes, and one line for each case that must not happen."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.bad: list[str] = []
        self.slowest = 0.0
        self.largest = 0

    def add(self, found: dict[str, Any]) -> None:
        outcome, number = found["outcome"], found["case"]
        largest = max(found["pool"], found["resident"])
        self.slowest, self.largest = max(self.slowest, found["seconds"]), max(self.largest, largest)
        if outcome not in ("read", "refused"):
            self.bad.append(f"case {number}: {outcome}")
        elif found["seconds"] > MAX_SECONDS:
            self.bad.append(f"case {number}: {found['seconds']:.1f} s")
        elif largest > MAX_BYTES:
            self.bad.append(f"case {number}: {largest / 1e6:.0f} MB")
        self.outcomes[outcome if outcome in ("read", "refused") else "bad"] += 1


def fuzz(start: int, count: int) -> Findings:
    """Runs `count` cases in worker processes; a new one follows each that dies or hangs."""
    findings = Findings()
    number, end = start, start + count
    with tempfile.TemporaryDirectory() as directory:
        while number < end:
            number = _run_worker(number, min(end, number + _BATCH), directory, findings)
    return findings


def _run_worker(start: int, end: int, directory: str, findings: Findings) -> int:
    """One worker process; returns the number of the next case to run."""
    command = [sys.executable, __file__, "--worker", str(start), str(end), f"{directory}/x.parquet"]
    paths = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    current = -1
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as worker:
        assert worker.stdout is not None
        while True:
            if not select.select([worker.stdout], [], [], _HANG_SECONDS)[0]:
                worker.kill()
                findings.bad.append(f"case {current}: hangs for {_HANG_SECONDS:.0f} s")
                return current + 1
            line = worker.stdout.readline()
            if not line:
                break
            found = json.loads(line)
            current = found.get("begin", current)
            if "outcome" in found:
                findings.add(found)
                current = found["case"] + 1
    assert current >= 0, f"the worker did not begin (exit code {worker.returncode})"
    if current < end:
        findings.bad.append(f"case {current}: the worker died with {worker.returncode}")
        return current + 1
    return end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(int(options.worker[0]), int(options.worker[1]), options.worker[2])
        return 0
    started = time.perf_counter()
    findings = fuzz(options.start, options.count)
    for line in findings.bad:
        print(line)
    print(
        f"{options.count} mutated Parquet files in {time.perf_counter() - started:.0f} s: "
        f"{findings.outcomes['read']} read, {findings.outcomes['refused']} refused, "
        f"{len(findings.bad)} bad; slowest {findings.slowest:.2f} s, "
        f"largest {findings.largest / 1e6:.0f} MB"
    )
    return 1 if findings.bad else 0


if __name__ == "__main__":
    sys.exit(main())
