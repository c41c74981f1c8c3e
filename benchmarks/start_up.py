"""From the start of the process to the first token: one prompt through the command line, by phase.

    python benchmarks/start_up.py [MODEL.gguf] [--repeats 3] [--overrides engine=numpy]

Without a model, a Phi-3-mini of its true shape with random weights is written to memory. One run
first fills the caches (compiled kernels, chosen products, the file's hash, the page cache): it is
reported as `cold`; then medians of the others. Phases are those of the job's manifest, in seconds
since the process began. Results go to benchmarks/results/.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow as pa
import pyarrow.parquet as pq
from command_line_job import CommandLineJob
from results_file import RESULTS, write_results

from orcd_batch.checkpoint import GGUFFile, read_model_config
from orcd_batch.data.manifest import read_manifest
from orcd_batch.engine_factory import choose_engine

TARGET_S = 3.0
PROMPT = "What is the capital of France?"
# As many tokens as show that decoding goes on.
OVERRIDES = ("overwrite=true", "sampling.max_tokens=4", "sampling.ignore_eos=true")


def start(folder: Path, model: Path, overrides: list[str]) -> dict[str, Any]:
    """One run: its phases, its wall time to the end, and what loading took."""
    with GGUFFile.open(model) as gguf:
        architecture = read_model_config(gguf).architecture
    data = folder / "prompt.parquet"
    pq.write_table(pa.table({"prompt": [PROMPT]}), data)
    job = CommandLineJob(folder, architecture, model, data, (*OVERRIDES, *overrides))
    document = job.run("out.parquet")
    manifest = read_manifest(str(folder / "out.parquet"))
    return {
        "phases_s": manifest["statistics"]["phases_s"],
        "process_s": document["seconds"],
        "loading": manifest["engine"]["backend"].get("loading"),
        "run_hash": document["run_hash"],
    }


def table(cold: dict[str, Any], warm: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Phase by phase: when it ended, and how much it added, in seconds."""
    rows, before = [], 0.0
    for name in warm[0]["phases_s"]:
        end = statistics.median(run["phases_s"][name] for run in warm)
        cold_end = cold["phases_s"][name]
        rows.append({"phase": name, "took_s": round(end - before, 3), "ended_s": end,
                     "cold_ended_s": cold_end})  # fmt: skip
        before = end
    whole = statistics.median(run["process_s"] for run in warm)
    rows.append({"phase": "end of the process", "took_s": round(whole - before, 3),
                 "ended_s": whole, "cold_ended_s": cold["process_s"]})  # fmt: skip
    return rows


def measure(model: Path, repeats: int, overrides: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        cold, *warm = [start(Path(name), model, overrides) for _ in range(1 + repeats)]
    first = statistics.median(run["phases_s"]["first token"] for run in warm)
    return {
        "model": model.name,
        "file_bytes": model.stat().st_size,
        "repeats": repeats,
        "first_token_s": first,
        "target_s": TARGET_S,
        "phases": table(cold, warm),
        "loading": [run["loading"] for run in warm],
        "one_hash": len({run["run_hash"] for run in (cold, *warm)}) == 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--overrides", nargs="*", default=[])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        model = options.model
        if model is None:
            from make_model import make_model
            from true_shapes import SHAPES

            model = Path(name) / "phi3.gguf"
            make_model(model, SHAPES["phi3"])
        found = measure(model, options.repeats, options.overrides)
    kind = "numpy" if "engine=numpy" in options.overrides else "auto"
    write_results(options.results, f"start-{model.stem}", choose_engine(kind), found)
    print(f"{'phase':20} {'took':>8} {'ended':>8} {'cold':>8}   seconds")
    for row in found["phases"]:
        print(f"{row['phase']:20} {row['took_s']:8.2f} {row['ended_s']:8.2f} "
              f"{row['cold_ended_s']:8.2f}")  # fmt: skip
    loading = found["loading"][0]
    if loading:
        print(f"weights: {loading['seconds']:.2f} s, {loading['gigabytes_per_s']:.1f} GB/s")
    print(f"process start to first token: {found['first_token_s']:.2f} s (target {TARGET_S} s)")
    print(json.dumps({"first_token_s": found["first_token_s"], "one_hash": found["one_hash"]}))


if __name__ == "__main__":
    main()
