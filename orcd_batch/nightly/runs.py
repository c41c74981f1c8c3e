"""The runs of a check: each in a process of its own, in its own directory, computed afresh."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orcd_batch.config import JobOptions
from orcd_batch.interrupts import Interrupts
from orcd_batch.nightly.inputs import InputVariations
from orcd_batch.nightly.plan import Stop, Variation

_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class RunResult:
    """What became of one variation. document: the run's; None where it did not end well.

    seconds: wall time of its processes. error: why it did not; kind: the error's class, where it
    was one of ours.
    """

    variation: Variation
    output: Path
    seconds: float
    document: Mapping[str, Any] | None = None
    gpu_names: tuple[str, ...] = ()
    error: str | None = None
    kind: str | None = None


class NightRuns:
    """Runs variations one after another below `folder`."""

    def __init__(
        self,
        inputs: InputVariations,
        folder: Path,
        interrupts: Interrupts,
        timeout_s: float | None,
    ) -> None:
        self.inputs = inputs
        self._folder, self._cache = folder / "runs", folder / "cache"
        self._interrupts, self._timeout_s = interrupts, timeout_s

    def run(self, variation: Variation) -> RunResult:
        """One variation; it is never an exception when the run fails. Raises Interrupted."""
        started = time.perf_counter()
        folder = self._folder / variation.name
        options = replace(
            self.inputs.options_of(variation),
            check=None,
            output=str((folder / "completions.parquet").absolute()),
            overwrite=True,
        )
        output = folder / "completions.parquet"
        if variation.stop is not None:
            problem = self._interrupted(options, folder, variation)
            if problem is not None:
                return RunResult(variation, output, time.perf_counter() - started, error=problem)
            configured = self.inputs.options_of(replace(variation, engine={}))
            options = replace(options, overwrite=False, engine=configured.engine)
        code, found = self._process(options, folder, variation.gpu)
        seconds = time.perf_counter() - started
        if code != 0 or "document" not in found:
            error = found.get("error") or f"It ended with {_code(code)}{_last_words(folder)}"
            return RunResult(variation, output, seconds, error=error, kind=found.get("kind"))
        problem = _problem(found["document"], variation.stop)
        gpu_names = tuple(found["gpu_names"])
        return RunResult(variation, output, seconds, found["document"], gpu_names, problem)

    def close(self) -> None:
        """Removes what is of no use after the night."""
        shutil.rmtree(self._cache, ignore_errors=True)

    def _interrupted(self, options: JobOptions, folder: Path, variation: Variation) -> str | None:
        """Runs until the signal; what is wrong when it did not end by it."""
        stop = variation.stop
        assert stop is not None, f"{variation.name} is not to be stopped"
        code, found = self._process(options, folder / "interrupted", variation.gpu, stop)
        expected = -signal.SIGKILL if stop.signum == signal.SIGKILL else 130
        if code == expected:
            return None
        reason = f": {found['error']}" if "error" in found else _last_words(folder / "interrupted")
        return f"The run to be ended by {stop.signum.name} ended with {_code(code)}{reason}"

    def _process(
        self, options: JobOptions, folder: Path, gpu: int | None, stop: Stop | None = None
    ) -> tuple[int, dict[str, Any]]:
        """(exit code, result.json) of one worker; the hashes of model files start forgotten."""
        shutil.rmtree(self._cache / "orcd_batch", ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        result = folder / "result.json"
        result.unlink(missing_ok=True)
        work = {"options": asdict(options), "stop": asdict(stop) if stop else None}
        (folder / "job.json").write_text(json.dumps(work))
        command = [sys.executable, "-m", "orcd_batch.nightly.worker", str(folder)]
        with open(folder / "log.txt", "ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(gpu),
            )
            code = self._wait(process)
        return code, json.loads(result.read_text()) if result.is_file() else {}

    def _wait(self, process: "subprocess.Popen[bytes]") -> int:
        started = time.monotonic()
        while True:
            try:
                code = process.wait(_POLL_S)
                self._interrupts.stop_if_requested()
                return code
            except subprocess.TimeoutExpired:
                if self._timeout_s is not None and time.monotonic() - started > self._timeout_s:
                    process.kill()
                elif self._interrupts.requested:
                    process.terminate()

    def _environment(self, gpu: int | None) -> dict[str, str]:
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        cache = str(self._cache.absolute())
        found = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": cache}
        found.pop("ORCD_BATCH_CACHE", None)
        if gpu is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            found["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
        return found


def _problem(document: Mapping[str, Any], stop: Stop | None) -> str | None:
    """Why a run that ended well proves nothing: it was not computed as planned."""
    computed, resumed = document["rows_computed"], document["rows_resumed"]
    if stop is None and resumed:
        return f"{resumed} of its rows were there already and not computed."
    if stop is not None and not (computed and resumed):
        return f"It was to be interrupted half-way: {resumed} rows were kept, {computed} computed."
    return None


def _last_words(folder: Path) -> str:
    """The last line of a run's log, and where the rest is."""
    lines = (folder / "log.txt").read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return f" ({last[:200]}); see {folder / 'log.txt'}."


def _code(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
