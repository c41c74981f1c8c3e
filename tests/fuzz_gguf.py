"""Mutates small GGUF files and checks that each gives a typed error or a valid result.

    python tests/fuzz_gguf.py --count 100000

Case number i of a seed is always the same file; `--first i --count 1 --keep FILE` writes it out.
A failure is another exception, over a second of CPU time, or memory out of proportion: the address
space is limited, and the resident peak may grow by little. A hang ends the process with a trace.
"""

import argparse
import faulthandler
import importlib
import json
import os
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from support.gguf_factory import write_model

from orcd_batch.checkpoint import GGUFFile, read_model_config, weight_map
from orcd_batch.checkpoint.content_hash import model_hash
from orcd_batch.checkpoint.inspection import inspect_file
from orcd_batch.checkpoint.inspection_report import as_json, render_markdown
from orcd_batch.errors import OrcdError

MAX_CASE_S = 1.0
HANG_S = 60
ADDRESS_ALLOWANCE_BYTES = 256 << 20
RESIDENT_ALLOWANCE_BYTES = 48 << 20

EXTREMES = (0, 1, 2, 3, 5, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**63 - 1)
EXTREMES += (2**63, 2**64 - 8, 2**64 - 1)
SCALAR_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9


class Field(NamedTuple):
    """One number or text in a header. what: its place in words, such as "length of key 3"."""

    what: str
    offset: int
    size: int


class HeaderWalk:
    """Lists the fields of a valid file's header, independently of the parser under test."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.fields: list[Field] = []
        self.offset = 0
        self._number("magic", 4)
        self._number("version", 4)
        num_tensors = self._number("number of tensors", 8)
        for index in range(self._number("number of metadata entries", 8)):
            key = self._text(f"key {index}")
            self._value(key, self._number(f"type of {key}", 4))
        for index in range(num_tensors):
            name = self._text(f"tensor name {index}")
            num_dims = self._number(f"number of dimensions of {name}", 4)
            for axis in range(num_dims):
                self._number(f"dimension {axis} of {name}", 8)
            self._number(f"type of {name}", 4)
            self._number(f"offset of {name}", 8)

    def _number(self, what: str, size: int) -> int:
        self.fields.append(Field(what, self.offset, size))
        self.offset += size
        return int.from_bytes(self.data[self.offset - size : self.offset], "little")

    def _text(self, what: str) -> str:
        size = self._number(f"length of {what}", 8)
        self.fields.append(Field(f"text of {what}", self.offset, size))
        self.offset += size
        return self.data[self.offset - size : self.offset].decode()

    def _value(self, key: str, value_type: int) -> None:
        if value_type == STRING:
            self._text(key)
        elif value_type == ARRAY:
            item_type = self._number(f"item type of {key}", 4)
            for index in range(self._number(f"count of {key}", 8)):
                self._value(f"{key}[{index}]", item_type)
        else:
            self._number(f"value of {key}", SCALAR_SIZES[value_type])


def header_fields(data: bytes) -> dict[str, Field]:
    """Every field of a valid file's header by its place in words, in file order."""
    return {field.what: field for field in HeaderWalk(data).fields}


class Seed(NamedTuple):
    """A valid file, its header's fields (array items are one group), and the header's size."""

    data: bytes
    structure: list[Field]
    items: list[Field]
    header_size: int


def write_seeds(directory: Path) -> list[Seed]:
    """Small valid files: every architecture, both tokenizers, fused and split, quantized or not."""
    shape = {"num_layers": 1, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2}
    shape |= {"intermediate_size": 32, "context_length": 64}
    path = directory / "seed.gguf"
    variants: list[Mapping[str, object]] = [
        {"architecture": "llama", "tensor_type": "Q8_0", "tied": True, "tokenizer": "gpt2"},
        {"architecture": "llama", "tensor_type": "Q4_0", "tokenizer": "llama", "fused": True},
        {"architecture": "phi3", "tensor_type": "Q8_0", "tokenizer": "llama", "sliding_window": 8},
        {"architecture": "qwen2", "tensor_type": "F16", "rope_scaling_factor": 2.0, "tied": True},
    ]
    seeds = []
    for variant in variants:
        write_model(path, **(shape | variant))  # type: ignore[arg-type]
        data = path.read_bytes()
        walk = HeaderWalk(data)
        items = [field for field in walk.fields if "[" in field.what]
        structure = [field for field in walk.fields if "[" not in field.what]
        seeds.append(Seed(data, structure, items, walk.offset))
    path.unlink()
    return seeds


def mutated(seeds: list[Seed], rng: random.Random) -> bytes:
    """One file with one to four mutations, nearly all of them in its header."""
    seed = rng.choice(seeds)
    data = bytearray(seed.data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        rng.choice(MUTATIONS)(data, seed, rng)
    return bytes(data)


def _field(seed: Seed, rng: random.Random) -> Field:
    return rng.choice(seed.items if seed.items and rng.random() < 0.2 else seed.structure)


def _place(data: bytearray, seed: Seed, rng: random.Random) -> int:
    limit = len(data) if rng.random() < 0.05 else min(seed.header_size, len(data))
    return rng.randrange(max(limit, 1))


def flip_bits(data: bytearray, seed: Seed, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 8)):
        if data:
            place = _place(data, seed, rng)
            data[place] ^= 1 << rng.randrange(8)


def set_extreme(data: bytearray, seed: Seed, rng: random.Random) -> None:
    field = _field(seed, rng)
    before = int.from_bytes(data[field.offset : field.offset + field.size], "little")
    near = (before - 1, before + 1, before * 2, before // 2, len(data), len(data) - field.offset)
    value = rng.choice(EXTREMES if rng.random() < 0.6 else near)
    size = min(field.size, 8)
    data[field.offset : field.offset + size] = (value % 256**size).to_bytes(size, "little")


def set_type(data: bytearray, seed: Seed, rng: random.Random) -> None:
    types = [field for field in seed.structure if "type of" in field.what]
    field = rng.choice(types)
    data[field.offset : field.offset + 4] = struct.pack("<I", rng.randrange(44))


def set_random_value(data: bytearray, seed: Seed, rng: random.Random) -> None:
    field = _field(seed, rng)
    data[field.offset : field.offset + field.size] = rng.randbytes(field.size)


def swap_fields(data: bytearray, seed: Seed, rng: random.Random) -> None:
    a = _field(seed, rng)
    equal = [b for b in seed.structure if b.size == a.size]
    if equal:
        b = rng.choice(equal)
        one, other = slice(a.offset, a.offset + a.size), slice(b.offset, b.offset + b.size)
        data[one], data[other] = data[other], data[one]


def truncate(data: bytearray, seed: Seed, rng: random.Random) -> None:
    del data[_place(data, seed, rng) :]


def cut_or_insert(data: bytearray, seed: Seed, rng: random.Random) -> None:
    place, size = _place(data, seed, rng), rng.choice((1, 3, 4, 8, 32, 1000))
    if rng.random() < 0.5:
        del data[place : place + size]
    else:
        data[place:place] = rng.randbytes(size)


def copy_range(data: bytearray, seed: Seed, rng: random.Random) -> None:
    source, target = _place(data, seed, rng), _place(data, seed, rng)
    chunk = data[source : source + rng.choice((4, 8, 24, 64, 512))]
    data[target : target + len(chunk)] = chunk


MUTATIONS: tuple[Callable[[bytearray, Seed, random.Random], None], ...] = (
    flip_bits,
    set_extreme,
    set_extreme,
    set_type,
    set_random_value,
    swap_fields,
    truncate,
    cut_or_insert,
    copy_range,
)


def tokenizer_class() -> type | None:
    """The text room's Tokenizer, or None where that room cannot be imported."""
    try:
        return getattr(importlib.import_module("orcd_batch.text"), "Tokenizer", None)
    except ImportError:
        return None


def exercise(path: str, tokenizer: type | None, index: int) -> str:
    """Does with one file what a job's start does; says how far it came."""
    with GGUFFile.open(path) as gguf:
        for name, tensor in gguf.tensors.items():
            assert gguf.raw(name).size == tensor.num_bytes, f"{name} is not as long as it says"
        if index % 20 == 0:
            model_hash(gguf, num_threads=1)
            inspection = inspect_file(path, path)
            json.dumps(as_json(inspection), allow_nan=False)
            render_markdown(inspection)
        outcomes = []
        try:
            weight_map(gguf, read_model_config(gguf))
            outcomes.append("runnable")
        except OrcdError as error:
            outcomes.append(type(error).__name__)
        if tokenizer is not None:
            built = tokenizer.from_metadata(gguf.metadata)  # type: ignore[attr-defined]
            ids = built.encode("Hello, wörld 12")
            assert isinstance(built.decode(ids), str), "decoding gives text"
            outcomes.append("tokenizes")
        return " and ".join(outcomes)


def run(first: int, count: int, seed: int, keep: str | None) -> Counter[str]:
    """Runs cases first … first + count - 1 and returns how often each outcome occurred."""
    outcomes: Counter[str] = Counter()
    tokenizer = tokenizer_class()
    with tempfile.TemporaryDirectory() as name:
        seeds = write_seeds(Path(name))
        path = os.path.join(name, "case.gguf")
        for warm in seeds:
            Path(path).write_bytes(warm.data)
            assert exercise(path, tokenizer, 0).startswith("runnable"), "a seed file must run"
        _limit_memory()
        resident = _peak_resident_bytes()
        for index in range(first, first + count):
            case = mutated(seeds, random.Random(f"{seed}:{index}"))
            Path(path).write_bytes(case)
            if keep is not None:
                Path(keep).write_bytes(case)
            outcomes[_outcome(path, tokenizer, index)] += 1
            if _peak_resident_bytes() > resident + RESIDENT_ALLOWANCE_BYTES:
                print(f"case {index}: resident memory grew out of proportion", file=sys.stderr)
                outcomes["FAILED"] += 1
                break
    return outcomes


def _peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _outcome(path: str, tokenizer: type | None, index: int) -> str:
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    started = time.process_time()
    try:
        outcome = exercise(path, tokenizer, index)
    except OrcdError as error:
        outcome = type(error).__name__
        if "\n" in str(error) or len(str(error)) > 2000:
            print(f"case {index}: not one sentence: {str(error)[:300]!r}", file=sys.stderr)
            outcome = "FAILED"
    except Exception:
        print(f"case {index}: {traceback.format_exc()}", file=sys.stderr)
        outcome = "FAILED"
    faulthandler.cancel_dump_traceback_later()
    taken = time.process_time() - started
    if taken > MAX_CASE_S:
        print(f"case {index}: took {taken:.2f} s", file=sys.stderr)
        outcome = "FAILED"
    return outcome


def _limit_memory() -> None:
    """Lets this process grow by the allowance and no more; beyond it Python raises MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ADDRESS_ALLOWANCE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=100_000, help="how many cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", help="where to leave the latest mutated file")
    options = parser.parse_args()
    started = time.perf_counter()
    outcomes = run(options.first, options.count, options.seed, options.keep)
    for outcome, number in outcomes.most_common():
        print(f"{number:8} {outcome}")
    failed = outcomes["FAILED"]
    rate = options.count / (time.perf_counter() - started)
    print(f"{options.count} mutated GGUF files, {failed} failures, {rate:.0f} files/s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
