"""Where all goes that a worker's process says."""

import faulthandler
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable

log = logging.getLogger(__name__)


def begin_log(path: str, is_remote: bool) -> Callable[[], str]:
    """Sends all that this process says to a file; returns what reads the lines to be shipped."""
    if is_remote:
        descriptor, path = tempfile.mkstemp(prefix="orcd-worker-", suffix=".log")
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)
    faulthandler.enable()
    layout = "[%(asctime)s][%(name)s][%(levelname)s] %(message)s"
    logging.basicConfig(level=logging.INFO, format=layout, force=True)
    log.info("process %d on %s", os.getpid(), socket.gethostname())
    if not is_remote:
        return str
    reader = open(path, errors="replace")  # noqa: SIM115  (open as long as the process lives)
    os.unlink(path)
    return reader.read
