"""One command for the table of what may change without changing a bit of any row.

    python benchmarks/bit_exactness.py MODEL.gguf [--name phi3] [--engine auto] [--baseline]

Every line runs the same rows (random token ids; greedy and sampled) in another way and compares
each row's token_hash and numerics_hash with the reference run's. --baseline instead runs 5 prompts
in 10 processes of their own. Prints the table, stores it (see results_file.py), and exits 1 when
one bit differs.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from acceptance_rows import (
    SAMPLING_COLUMNS,
    Bits,
    Row,
    bits_of,
    complete,
    filler_rows,
    make_rows,
    read_bits,
    run_rows,
    write_rows,
)
from command_line_job import CommandLineJob
from results_file import RESULTS, write_results

from orcd_batch.backend.numpy_sampler import logits_fingerprint
from orcd_batch.checkpoint import GGUFFile, read_model_config
from orcd_batch.config import EngineOptions
from orcd_batch.engine.context import Context
from orcd_batch.engine.engine import Engine
from orcd_batch.engine.request import Request
from orcd_batch.engine_factory import OpenModel, build_engine, choose_engine
from orcd_batch.reproducibility.hashes import stream_digest

_MAX_NUM_SEQS = (1, 2, 7, 64, 256)
_CHUNKS = (64, 512, 4096)
_LONGEST_CONTEXT = 8192
_NUM_PROCESSES, _NUM_PROMPTS = 10, 5


@dataclass(frozen=True, slots=True)
class Line:
    """One way of running, against the reference. Counts are of rows; a row run n times counts n."""

    name: str
    rows: int
    token_hash_equal: int
    numerics_hash_equal: int
    seconds: float
    evidence: str = ""

    @property
    def equal(self) -> bool:
        return 0 < self.rows == self.token_hash_equal == self.numerics_hash_equal


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is run: rows, tokens a row, repeats, rows of the jobs on the command line."""

    rows: int
    tokens: int
    longest_prompt: int
    repeats: int
    job_rows: int


SIZES = {"cuda": Sizes(320, 24, 3000, 10, 3000), "numpy": Sizes(24, 6, 150, 10, 1500)}


class Trials:
    """Runs the lines one after another and keeps them."""

    def __init__(
        self, model: Path, kind: str, sizes: Sizes, kv_cache_bytes: int | None = None
    ) -> None:
        self.choice = choose_engine(kind)
        with GGUFFile.open(model) as gguf:
            self.config = read_model_config(gguf)
        self.max_model_len = min(self.config.context_length, _LONGEST_CONTEXT)
        longest = min(sizes.longest_prompt, self.max_model_len - sizes.tokens)
        self.rows = make_rows(sizes.rows, self.config.vocab_size, longest, sizes.tokens)
        self.lines: list[Line] = []
        self.notes: list[str] = []
        self._model, self._sizes = model, sizes
        self._memory = {} if kv_cache_bytes is None else {"kv_cache_bytes": kv_cache_bytes}
        self._expected: dict[str, Bits] = {}

    def run(self) -> None:
        """Every line of the table."""
        with self._engine() as engine:
            self._add("reference", lambda: self._reference(engine))
            self._add("ten repeated runs", lambda: self._repeated(engine, self._sizes.repeats))
            self._add("shuffled rows", lambda: self._shuffled(engine))
            self._add("one row alone", lambda: self._alone(engine))
            self._add("dropped in the middle, recomputed", lambda: self._dropped(engine))
            self._add("prefill of prompt + completion", lambda: self._teacher_forced(engine))
        for limit in _MAX_NUM_SEQS:
            rows = self.rows[: max(16, 16 * limit)]
            tokens = max(512, limit)
            self._vary(f"max_num_seqs={limit}", rows, max_num_seqs=limit,
                       max_num_batched_tokens=tokens)  # fmt: skip
        for chunk in _CHUNKS:
            self._vary(f"prefill chunks of {chunk}", self.rows[:96], max_num_seqs=min(chunk, 48),
                       max_num_batched_tokens=chunk)  # fmt: skip
        self._vary("prompt KV not shared", self.rows, prefix_caching=False)
        self._graphs()
        with tempfile.TemporaryDirectory() as folder:
            self._command_line(Path(folder))

    @contextmanager
    def _engine(self, **options: Any) -> Iterator[Engine]:
        options = {"max_model_len": self.max_model_len, **self._memory, **options}
        settings = EngineOptions(kind=self.choice.kind, **options)
        with GGUFFile.open(self._model) as gguf:
            source = OpenModel(gguf, self.config)
            with build_engine(source, settings, self.choice) as built:
                yield built.engine

    def _add(self, name: str, run: Callable[[], tuple[list[tuple[Row, Bits]], str]]) -> None:
        """Compares what a way of running gives with the reference."""
        started = time.perf_counter()
        found, evidence = run()
        expected = [self._expected[row.id] for row, _ in found]
        pairs = [(bits, known) for (_, bits), known in zip(found, expected, strict=True)]
        self.lines.append(
            Line(
                name,
                len(found),
                sum(bits[0] == known[0] for bits, known in pairs),
                sum(bits[1] == known[1] for bits, known in pairs),
                round(time.perf_counter() - started, 2),
                evidence,
            )
        )
        print(shown(self.lines[-1]), flush=True)

    def _vary(self, name: str, rows: Sequence[Row], **options: Any) -> None:
        def run() -> tuple[list[tuple[Row, Bits]], str]:
            with self._engine(**options) as engine:
                found = run_rows(engine, rows)
                counts = engine.statistics()
            return _paired(rows, found), (
                f"{counts['steps']} steps, {counts['shared_prompt_tokens']} prompt tokens shared"
            )

        self._add(name, run)

    def _reference(self, engine: Engine) -> tuple[list[tuple[Row, Bits]], str]:
        self._expected = run_rows(engine, self.rows)
        shared = engine.statistics()["shared_prompt_tokens"]
        evidence = (
            f"max_num_seqs={engine.max_num_seqs}, "
            f"max_num_batched_tokens={engine.max_num_batched_tokens}, {shared} prompt tokens shared"
        )
        return _paired(self.rows, self._expected), evidence

    def _repeated(self, engine: Engine, repeats: int) -> tuple[list[tuple[Row, Bits]], str]:
        rows = self.rows[:96]
        return [pair for _ in range(repeats) for pair in _paired(rows, run_rows(engine, rows))], ""

    def _shuffled(self, engine: Engine) -> tuple[list[tuple[Row, Bits]], str]:
        order = np.random.default_rng(2).permutation(len(self.rows))
        rows = [self.rows[index] for index in order]
        return _paired(rows, run_rows(engine, rows)), ""

    def _alone(self, engine: Engine) -> tuple[list[tuple[Row, Bits]], str]:
        rows = self.rows[:8]
        return [(row, run_rows(engine, [row])[row.id]) for row in rows], "each in its own run"

    def _dropped(self, engine: Engine) -> tuple[list[tuple[Row, Bits]], str]:
        """Stops the engine in the middle of the rows, forgets all state but the tokens, goes on."""
        rows = self.rows[:96]
        for row in rows:
            engine.add(row.request())
        done = {}
        while not done and engine.has_unfinished:
            done = {str(completion.key): completion for completion in engine.step()}
        running = {str(s.request.key): s.completion for s in engine.scheduler.running}
        engine.reset()
        partial = {**done, **running}
        with_rest = [row for row in rows if row.id not in done]
        rest = complete(engine, [_continued(row, _ids(partial.get(row.id))) for row in with_rest])
        found = []
        for row in rows:
            pieces = [piece[row.id] for piece in (partial, rest) if row.id in piece]
            ids = [token for piece in pieces for token in piece.token_ids]
            prints = [value for piece in pieces for value in piece.fingerprints]
            found.append((row, bits_of(row, ids, prints)))
        cut = sum(bool(completion.token_ids) for completion in running.values())
        return found, f"{cut} rows had begun to decode"

    def _teacher_forced(self, engine: Engine) -> tuple[list[tuple[Row, Bits]], str]:
        """Fingerprints of every completion position out of one prefill of everything."""
        rows = self.rows[:12]
        done = complete(engine, [row.request() for row in rows])
        context = Context(engine)
        found = []
        for row in rows:
            ids = done[row.id].token_ids
            logits = context.prefill([*row.prompt, *ids[:-1]])[len(row.prompt) - 1 :]
            prints = [logits_fingerprint(np.ascontiguousarray(values)) for values in logits]
            found.append((row, bits_of(row, ids, prints)))
        context.release()
        return found, f"{sum(row.params.max_tokens for row in rows)} positions"

    def _graphs(self) -> None:
        option = next((name for name in EngineOptions.__slots__ if "graph" in name), None)
        if option is None or self.choice.kind != "cuda":
            self.notes.append("graph replay on or off: left out, this engine has no graphs")
            return
        for value in (True, False):
            self._vary(f"graph replay {'on' if value else 'off'}", self.rows, **{option: value})

    def _command_line(self, folder: Path) -> None:
        """The same rows and many short ones: undisturbed, then killed and continued."""
        fillers = filler_rows(self._sizes.job_rows - len(self.rows), self.config.vocab_size)
        job = self._job(folder, [*self.rows, *fillers])
        whole = job.run("whole.parquet")
        expected = read_bits(folder / "whole.parquet")
        self._add(
            "python -m orcd_batch",
            lambda: (
                _paired(self.rows, expected),
                f"a process of its own, {whole['seconds']} s, {whole['tokens_per_s']} tokens/s",
            ),
        )
        self._expected |= {row.id: expected[row.id] for row in fillers}

        def resumed() -> tuple[list[tuple[Row, Bits]], str]:
            killed = job.kill_after_first_part("killed.parquet")
            document = job.run("killed.parquet")
            evidence = (
                f"{document['rows_resumed']} rows kept, {document['rows_computed']} computed after"
            )
            if not killed or not document["rows_resumed"] or not document["rows_computed"]:
                return [], f"not killed in the middle: {evidence}"
            equal = "equal" if document["run_hash"] == whole["run_hash"] else "DIFFERENT"
            rows = [*self.rows, *fillers]
            return _paired(rows, read_bits(folder / "killed.parquet")), (
                f"{evidence}, run_hash {equal}"
            )

        self._add("kill -9 and resume", resumed)

    def _job(self, folder: Path, rows: Sequence[Row]) -> CommandLineJob:
        write_rows(folder / "rows.parquet", rows)
        options = (
            *("model.chat=false", f"engine={self.choice.kind}", "sampling.ignore_eos=true"),
            f"engine.max_model_len={self.max_model_len}",
            *(f"engine.{name}={value}" for name, value in self._memory.items()),
            f"dataset.sampling_columns=[{','.join(SAMPLING_COLUMNS)}]",
        )
        return CommandLineJob(
            folder, self.config.architecture, self._model, folder / "rows.parquet", options
        )

    def run_baseline(self) -> None:
        """10 processes × 5 prompts; the first process is the reference."""
        tokens = 4 * self._sizes.tokens
        rows = [
            replace(row, params=replace(row.params, max_tokens=tokens)) for row in self.rows[3:8]
        ]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            job = self._job(folder, rows)
            for index in range(_NUM_PROCESSES):
                output = f"run-{index}.parquet"
                document = job.run(output)
                found = read_bits(folder / output)
                self._expected = self._expected or found
                evidence = f"{document['seconds']} s in all, run_hash {document['run_hash'][:16]}"
                self._add(
                    f"process {index + 1} of {_NUM_PROCESSES}",
                    lambda found=found, said=evidence: (_paired(rows, found), said),  # type: ignore[misc]
                )


def _paired(rows: Sequence[Row], found: dict[str, Bits]) -> list[tuple[Row, Bits]]:
    return [(row, found[row.id]) for row in rows]


def _ids(completion: Any) -> list[int]:
    return list(completion.token_ids) if completion is not None else []


def _continued(row: Row, token_ids: list[int]) -> Request:
    """The row as if it had never run, its tokens so far being part of the prompt."""
    params = replace(row.params, max_tokens=row.params.max_tokens - len(token_ids))
    prompt = (*row.prompt, *token_ids)
    return Request(row.id, prompt, params, stream_digest(row.id, 0))


def shown(line: Line) -> str:
    verdict = "ok" if line.equal else "DIFFERS"
    counts = f"{line.token_hash_equal}/{line.rows}", f"{line.numerics_hash_equal}/{line.rows}"
    return (
        f"{line.name:34} {counts[0]:>10} {counts[1]:>10}  {verdict:7} {line.seconds:6.1f} s  "
        f"{line.evidence}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", help="in the result's file name; default: the model's file name")
    parser.add_argument("--engine", choices=("auto", "cuda", "numpy"), default="auto")
    parser.add_argument("--baseline", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--kv-cache-bytes", type=int, help="where others use the card as well")
    for name in ("rows", "tokens", "longest-prompt", "repeats", "job-rows"):
        parser.add_argument(f"--{name}", type=int, help="default: by engine")
    options = parser.parse_args()
    sizes = SIZES[choose_engine(options.engine).kind]
    given = {name: getattr(options, name) for name in Sizes.__slots__}
    sizes = replace(sizes, **{name: value for name, value in given.items() if value is not None})

    trials = Trials(options.model, options.engine, sizes, options.kv_cache_bytes)
    started = time.perf_counter()
    print(f"{'':34} {'token_hash':>10} {'numerics_h':>10}")
    trials.run_baseline() if options.baseline else trials.run()
    seconds = round(time.perf_counter() - started, 1)
    all_equal = all(line.equal for line in trials.lines)
    for note in trials.notes:
        print(note)
    verdict = "every bit equal" if all_equal else "BITS DIFFER"
    where = f"{trials.config.name} on {trials.choice.device} ({trials.choice.kind})"
    print(f"{where}: {verdict}, {len(trials.lines)} lines, {seconds} s")
    table = "baseline" if options.baseline else "bit-exactness"
    what = f"{table}-{options.name or options.model.stem}"
    facts = {
        "model": {"name": trials.config.name, "bytes": options.model.stat().st_size}
        | {key: getattr(trials.config, key) for key in ("architecture", "num_layers")},
        "sizes": asdict(sizes),
        "all_equal": all_equal,
        "seconds": seconds,
        "notes": trials.notes,
        "lines": [asdict(line) for line in trials.lines],
    }
    write_results(options.results, what, trials.choice, facts)
    sys.exit(0 if all_equal else 1)


if __name__ == "__main__":
    main()
