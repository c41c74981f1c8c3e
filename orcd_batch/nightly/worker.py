"""One run of a check in a process of its own: `python -m orcd_batch.nightly.worker FOLDER`.

The folder holds `job.json`; the outcome is written to `result.json` beside it.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from orcd_batch.config import JobOptions, resolve
from orcd_batch.data import part_store, read_manifest
from orcd_batch.errors import OrcdError
from orcd_batch.job import run_job
from orcd_batch.view import JobView


class StoppingView(JobView):
    """Sends this process a signal at the first step after `num_rows` rows were finished."""

    def __init__(self, num_rows: int, signum: int) -> None:
        super().__init__()
        self._num_rows, self._signum = num_rows, signum
        self._is_reached = False

    def rows(self, done: int, tokens: int) -> None:
        super().rows(done, tokens)
        if self._is_reached:
            os.kill(os.getpid(), self._signum)
        self._is_reached = self._is_reached or done >= self._num_rows


def main(folder: Path) -> int:
    """Runs the job of the folder and returns its exit code."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    work = json.loads((folder / "job.json").read_text())
    composed = OmegaConf.merge(OmegaConf.structured(JobOptions), work["options"])
    assert isinstance(composed, DictConfig), f"options are {type(composed)}"
    options = resolve(composed)
    view = JobView()
    if work["stop"] is not None:
        part_store.COMMIT_ROWS = 1  # so that a run killed after a few rows has kept them
        view = StoppingView(work["stop"]["rows"], work["stop"]["signum"])
    result: dict[str, Any] = {}
    try:
        result["document"] = run_job(options, folder, view)
        result["gpu_names"] = _gpu_names(result["document"]["output"])
        code = 0
    except OrcdError as error:
        result |= {"error": str(error), "kind": type(error).__name__}
        code = error.exit_code
    (folder / "result.json").write_text(json.dumps(result))
    return code


def _gpu_names(output: str) -> list[str]:
    """The GPUs seen, where the run has used one."""
    if read_manifest(output)["identity"]["engine"] != "cuda":
        return []
    from orcd_batch.backend.cuda.device_names import device_names

    return device_names()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
