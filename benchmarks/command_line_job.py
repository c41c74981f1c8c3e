"""The real command line in a process of its own: run to the end, or killed with work left."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL_OPTIONS = {"phi3": "phi3", "qwen2": "qwen2_5", "llama": "smollm2"}


@dataclass(frozen=True, slots=True)
class CommandLineJob:
    """`python -m orcd_batch` on one model and input. folder: where it runs.

    options: further overrides, such as "sampling.max_tokens=8".
    """

    folder: Path
    architecture: str
    model: Path
    data: Path
    options: tuple[str, ...] = ()

    def command(self, output: str) -> list[str]:
        return [
            *(sys.executable, "-m", "orcd_batch", f"model={MODEL_OPTIONS[self.architecture]}"),
            *(f'model.path="{self.model.resolve()}"', f'data="{self.data.resolve()}"'),
            *(f"output={output}", *self.options),
        ]

    def start(self, output: str) -> "subprocess.Popen[str]":
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        return subprocess.Popen(
            self.command(output),
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )

    def run(self, output: str) -> dict[str, Any]:
        """The last line of stdout, with `seconds` and `stderr`. Raises RuntimeError where the
        command fails."""
        started = time.perf_counter()
        process = self.start(output)
        out, err = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"exit code {process.returncode}: {err[-3000:]}")
        document: dict[str, Any] = json.loads(out.splitlines()[-1])
        return document | {"seconds": round(time.perf_counter() - started, 2), "stderr": err}

    def kill_after_first_part(self, output: str) -> bool:
        """Sends SIGKILL once a part is committed; False when the job had ended by itself.

        Raises RuntimeError when it ended with an error.
        """
        process = self.start(output)
        parts = self.folder / f"{output}.parts"
        while process.poll() is None and not any(parts.glob("part-*.arrow")):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        if process.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"exit code {process.returncode}: {err[-3000:]}")
        return process.returncode == -signal.SIGKILL
