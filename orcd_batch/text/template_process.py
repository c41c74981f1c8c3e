"""The near end of the process that renders a chat template: start it, ask it, end it."""

import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from orcd_batch.errors import TemplateError

_WORKER = "orcd_batch.text.template_worker"
_HEADER_BYTES = 4
_MAX_BYTES_PER_CHARACTER = 12
_START_LIMIT_S = 30.0
_WAIT_S = 1.0
_PASSED_ON = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")


class WorkerDied(Exception):
    """The process ended, or was ended, before it answered.

    beyond_limits: because the template took too long; otherwise something else killed it.
    """

    def __init__(self, beyond_limits: bool, status: int | None) -> None:
        super().__init__(f"exit status {status}")
        self.beyond_limits = beyond_limits


class TemplateProcess:
    """One worker with one template.

    It has a session of its own, so Ctrl-C passes it by; it ends when its input closes, which the
    death of this process sees to. Raises TemplateError when it cannot be started, WorkerDied when
    the template went beyond its limits while it was compiled.
    """

    def __init__(self, settings: Mapping[str, Any], wall_limit_s: float) -> None:
        self._wall_limit_s = wall_limit_s
        self._max_answer = settings["output_limit"] * _MAX_BYTES_PER_CHARACTER + (1 << 16)
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-S", "-m", _WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise TemplateError(
                f"The chat template's process cannot be started: {error}."
            ) from error
        self._process = process
        self._end = weakref.finalize(self, _end, process)
        self.greeting = self.ask(settings, _START_LIMIT_S)

    def ask(self, question: object, wall_limit_s: float | None = None) -> dict[str, Any]:
        """Send one frame and wait for its answer; whatever interrupts that ends the process."""
        payload = json.dumps(question).encode()
        try:
            self._write(len(payload).to_bytes(_HEADER_BYTES, "little") + payload)
            deadline = time.monotonic() + (wall_limit_s or self._wall_limit_s)
            size = int.from_bytes(self._read(_HEADER_BYTES, deadline), "little")
            if size > self._max_answer:
                raise WorkerDied(True, None)
            answer: dict[str, Any] = json.loads(self._read(size, deadline))
        except BaseException:
            self.end()
            raise
        if "fatal" in answer:
            self.end()
        return answer

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        return not self._end.alive

    def end(self) -> None:
        """Kill the process, wait for it, close the pipes; a second call does nothing."""
        self._end()

    def _write(self, frame: bytes) -> None:
        assert self._process.stdin is not None
        view = memoryview(frame)
        try:
            while view:
                view = view[os.write(self._process.stdin.fileno(), view) :]
        except BrokenPipeError as error:
            raise self._death() from error

    def _read(self, count: int, deadline: float) -> bytes:
        assert self._process.stdout is not None
        stream = self._process.stdout.fileno()
        answers = select.poll()
        answers.register(stream, select.POLLIN)
        pieces = []
        while count > 0:
            if not answers.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise WorkerDied(True, None)
            piece = os.read(stream, min(count, 1 << 20))
            if not piece:
                raise self._death()
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

    def _death(self) -> WorkerDied:
        """Why the pipe closed, told from the status; a process that only closed it is killed."""
        try:
            status = self._process.wait(_WAIT_S)
        except subprocess.TimeoutExpired:
            return WorkerDied(True, None)
        return WorkerDied(-status in (signal.SIGPROF, signal.SIGALRM), status)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _environment() -> dict[str, str]:
    """As little as the worker needs to find this package and jinja2."""
    places = [str(Path(__file__).parents[2])]
    for name in ("jinja2", "markupsafe"):
        found = find_spec(name)
        if found is not None and found.origin is not None:
            places.append(str(Path(found.origin).parents[1]))
    return {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(places)),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "LC_ALL": "C.UTF-8",
        **{name: os.environ[name] for name in _PASSED_ON if name in os.environ},
    }
