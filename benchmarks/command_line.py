"""The main command as a user types it, on a full-size model: text in, completions and hashes out.

    python benchmarks/command_line.py phi3.gguf [--hide-gpu] [--overrides sampling.max_tokens=16]

Runs `python -m orcd_batch model=… model.path=… data=prompts.parquet` (engine=auto) on text
prompts, one of them nearly as long as the context and one longer, checks the rows, and prints what
the program said of its engine. Stores the result (see results_file.py); exits 1 when a row is not
as it must be.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow as pa
import pyarrow.parquet as pq
from command_line_job import ROOT, CommandLineJob
from results_file import RESULTS, write_results

from orcd_batch import Tokenizer
from orcd_batch.checkpoint import GGUFFile, read_model_config
from orcd_batch.data.manifest import read_manifest
from orcd_batch.engine_factory import choose_engine

TEXT = ROOT / "tests" / "oracle" / "real_text.txt"
SHORT = ["What is the capital of France?", "Write a haiku about the sea.", "2 + 2 =", "ünïcode 🙂"]


def prompts(model: Path, context_length: int) -> dict[str, str]:
    """Prompts by id; the last is beyond the context."""
    tokenizer = Tokenizer.from_gguf(model)
    text = TEXT.read_text() * (1 + context_length // 1000)
    ids = tokenizer.encode(text[: 8 * context_length], add_bos=False)
    near, beyond = context_length - context_length // 20, context_length + context_length // 4
    long = {f"{n} tokens": tokenizer.decode(ids[:n]) for n in (near, beyond)}
    return {f"short {i}": prompt for i, prompt in enumerate(SHORT)} | long


def problems(rows: list[dict[str, Any]], context_length: int) -> list[str]:
    """What is wrong with the output rows, one sentence each."""
    *good, beyond = rows
    found = [f"row {row['id']!r} failed: {row['error']}" for row in good if row["error"]]
    found += [
        f"row {row['id']!r} has {row['completion_tokens']} tokens of {len(row['fingerprints'])}"
        for row in good
        if not row["error"] and row["completion_tokens"] != len(row["fingerprints"])
    ]
    if str(context_length) not in str(beyond["error"]).replace(",", ""):
        found.append(f"row {beyond['id']!r} names no limit: {beyond['error']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--hide-gpu", action="store_true", help="as on a machine without one")
    parser.add_argument("--overrides", nargs="*", default=[])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.hide_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with GGUFFile.open(options.model) as gguf:
        config = read_model_config(gguf)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = prompts(options.model, config.context_length)
        table = pa.table({"id": list(given), "prompt": list(given.values())})
        pq.write_table(table, folder / "prompts.parquet")
        job = CommandLineJob(
            *(folder, config.architecture, options.model, folder / "prompts.parquet"),
            tuple(options.overrides),
        )
        document = job.run("out.parquet")
        said = document.pop("stderr")
        rows = pq.read_table(folder / "out.parquet").to_pylist()
        phases = read_manifest(str(folder / "out.parquet"))["statistics"]["phases_s"]
    found = problems(rows, config.context_length)
    told = re.search(r"\((cuda|numpy) engine: .{0,120}", " ".join(said.split()))
    engine = told[0] if told else said[:300]
    print(" ".join(job.command("out.parquet")[1:]))
    print(engine)
    for row in rows:
        outcome = row["error"] or f"{row['completion_tokens']} tokens, {row['finish_reason']}"
        print(f"{row['id']:12} {row['prompt_tokens'] or '':>6} {outcome}")
    print(document)
    print("seconds since the process began:", *(f"{name} {s:.2f}" for name, s in phases.items()))
    for problem in found:
        print(problem)
    facts = {
        "said": engine,
        "document": document,
        "phases_s": phases,
        "rows": [
            {key: row[key] for key in ("id", "prompt_tokens", "completion_tokens", "error")}
            for row in rows
        ],
        "problems": found,
    }
    what = f"command-line-{options.model.stem}{'-no-gpu' if options.hide_gpu else ''}"
    write_results(options.results, what, choose_engine("auto"), facts)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
