"""A nightly check in a folder of its own: a small random model, prompts, and the command line."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from support.gguf_factory import write_model
from support.paths import REPO_ROOT

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = ["one", "two two", "three, and a longer prompt than the others", "four?", "ünïcode 🙂"]
NOTHING_VARIED = (
    *("check.runs=1", "check.batch_sizes=[]", "check.chunk_sizes=[]", "check.orders=0"),
    *("check.single_rows=0", "check.stop_after=[]", "check.kill_after=[]"),
    *("check.thread_counts=[]", "check.prefix_caching=false", "check.report=false"),
)


@dataclass(frozen=True, slots=True)
class CheckFolder:
    """Where nights run. source: the tree whose package runs them. engine: the engine option."""

    path: Path
    source: Path = REPO_ROOT
    engine: str = "numpy"

    @property
    def model(self) -> Path:
        return self.path / "tiny.gguf"

    @property
    def nights(self) -> list[Path]:
        return sorted((self.path / "outputs" / "nightly" / "smollm2" / "nights").iterdir())

    @property
    def history(self) -> Path:
        return self.path / "outputs" / "nightly" / "smollm2" / "history.parquet"

    @property
    def baseline(self) -> Path:
        return self.path / "outputs" / "nightly" / "smollm2" / "baseline"

    def write_inputs(self, **model: Any) -> None:
        sizes: dict[str, Any] = {
            "num_layers": 1, "hidden_size": 64, "num_heads": 2, "num_kv_heads": 1,
            "intermediate_size": 64, "context_length": 128, "chat_template": CHATML,
        }  # fmt: skip
        write_model(self.model, **(sizes | model))
        table = pa.table({"id": list("abcde"), "prompt": PROMPTS})
        pq.write_table(table, self.path / "prompts.parquet")

    def night(
        self, options: Sequence[str], job: str = "nightly_reproducibility"
    ) -> tuple[int, dict[str, Any] | None, str]:
        """One night; exit code, the last line of stdout, and stderr."""
        process = self.start(options, job)
        out, err = process.communicate()
        return process.returncode, json.loads(out.splitlines()[-1]) if out else None, err

    def start(
        self, options: Sequence[str], job: str = "nightly_reproducibility"
    ) -> "subprocess.Popen[str]":
        """The process of a night."""
        command = [
            *(sys.executable, "-m", "orcd_batch", "--config-dir", "jobs", "--config-name", job),
            *("model=smollm2", f"model.path={self.model}", f"engine={self.engine}"),
            *("data=prompts.parquet", "sampling.max_tokens=6", *options),
        ]
        path = os.pathsep.join(filter(None, (str(self.source), os.environ.get("PYTHONPATH"))))
        return subprocess.Popen(
            command,
            cwd=self.path,
            env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def copy_source(source: Path, target: Path) -> Path:
    """A copy of everything that the package is made of."""
    for room in ("orcd_batch", "conf", "jobs", "kernels"):
        shutil.copytree(source / room, target / room)
    return target


def flip_weight_bit(model: Path, tensor: str, byte: int = 2, mask: int = 0x20) -> None:
    """Changes one bit of a tensor's data; the file's size, times and inode stay as they were."""
    from orcd_batch.checkpoint import GGUFFile

    with GGUFFile.open(model) as gguf:
        position = gguf.tensors[tensor].offset + byte
    before = model.stat()
    with open(model, "r+b") as file:
        file.seek(position)
        (value,) = file.read(1)
        file.seek(position)
        file.write(bytes([value ^ mask]))
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
