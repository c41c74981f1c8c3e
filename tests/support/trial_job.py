"""A tiny job in processes of its own, for the scripts that kill them."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from support.gguf_factory import write_model
from support.paths import REPO_ROOT


def write_tiny_model(folder: Path) -> None:
    """tiny.gguf: one layer."""
    write_model(
        folder / "tiny.gguf",
        num_layers=1,
        hidden_size=64,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=64,
    )


def write_numbered_prompts(folder: Path, num_rows: int) -> None:
    """in.parquet: prompts of different lengths and their numbers."""
    prompts = [f"Row {i}: {'word ' * (i % 7)}" for i in range(num_rows)]
    table = pa.table({"prompt": prompts, "number": list(range(num_rows))})
    pq.write_table(table, folder / "in.parquet", row_group_size=500)


def start(command: Sequence[str], folder: Path) -> "subprocess.Popen[str]":
    """The command in the folder, with this checkout's package."""
    return subprocess.Popen(
        command,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
    )


def finish(process: "subprocess.Popen[str]") -> Any:
    """The JSON of a command that must succeed: a job's, or those of a sweep's jobs."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f"exit code {process.returncode}: {err[-2000:]}"
    return json.loads(out.splitlines()[-1])
