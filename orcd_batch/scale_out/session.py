"""Ray started for one job, or joined; its numbers of CPUs and GPUs; nothing of it left behind."""

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from orcd_batch.errors import ScaleOutError
from orcd_batch.scale_out.keeper import SESSION_VARIABLE

log = logging.getLogger(__name__)

# Messages between driver and workers; more than is ever in flight.
_OBJECT_STORE_BYTES = 512 * 2**20
_KEEPER_WAIT_S = 20.0
_CONNECT_S = 10.0

# A Ray that is started here listens to those alone who know the token. It is one for the process,
# because Ray reads it once. (Ray's own would be left behind in the home directory.)
_LOOPBACK = "127.0.0.1"
_TOKEN = secrets.token_hex(32)


def require_ray() -> Any:
    """The ray module. Raises ScaleOutError when it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise ScaleOutError(
            f"scale_out=ray needs Ray, which cannot be imported here ({error}): install "
            "'orcd-batch[ray]', or leave scale_out out to run in one process."
        ) from error
    return ray


class RaySession:
    """A connection to Ray; a context manager that ends it."""

    def __init__(self, address: str | None, num_cpus: int | None = None) -> None:
        """Joins the cluster at `address`, or with None starts Ray here, with num_cpus CPU slots.

        Raises ScaleOutError when Ray is not installed, does not start, or is not to be reached.
        """
        self.ray = require_ray()
        logging.getLogger("ray").setLevel(logging.ERROR)
        self._keeper: subprocess.Popen[bytes] | None = None
        if address is not None:
            _check_reachable(address)
        quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
        try:
            with _handlers_kept():
                if address is not None:
                    self.ray.init(address=address, **quiet)
                else:
                    self._start(num_cpus, quiet)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            self.close()
            where = f"join Ray at scale_out.address={address}" if address else "start Ray here"
            reason = " ".join(str(error).split()).rstrip(".")
            raise ScaleOutError(f"Cannot {where}: {reason}.") from error
        except BaseException:
            self.close()
            raise

    @property
    def node(self) -> str:
        """Ray's name of the node that the driver runs on."""
        return str(self.ray.get_runtime_context().get_node_id())

    def total(self, resource: str) -> float:
        """How much of "CPU" or "GPU" all nodes have together."""
        return float(self.ray.cluster_resources().get(resource, 0))

    def close(self) -> None:
        """Leaves Ray; one that was started here is gone when this returns."""
        if self.ray.is_initialized():
            with _handlers_kept():
                self.ray.shutdown()
        if self._keeper is not None and self._keeper.stdin is not None:
            self._keeper.stdin.close()
            try:
                self._keeper.wait(_KEEPER_WAIT_S)
            except subprocess.TimeoutExpired:
                log.warning("Ray's processes take more than %g s to end", _KEEPER_WAIT_S)
            self._keeper = None

    def _start(self, num_cpus: int | None, quiet: dict[str, Any]) -> None:
        directory = tempfile.mkdtemp(prefix="orcd-ray-")
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._keeper = subprocess.Popen(
            [sys.executable, "-m", "orcd_batch.scale_out.keeper", directory],
            stdin=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        inherited = {
            SESSION_VARIABLE: directory,
            "PYTHONPATH": path,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",  # kills at 95 % of the host's memory otherwise
        }
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}.intersection(os.environ):
            inherited["RAY_AUTH_TOKEN"] = _TOKEN
        with _environment(inherited):
            self.ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=directory,
                _node_ip_address=_LOOPBACK,
                **quiet,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()


def _check_reachable(address: str) -> None:
    """Ray itself waits for minutes before it says that nobody is there."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        return  # "auto" and the like, which Ray resolves
    try:
        socket.create_connection((host, int(port)), _CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ScaleOutError(
            f"Nothing answers at scale_out.address={address} ({error}): give the address that "
            "`ray start --head` printed, reachable from this machine."
        ) from error


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """The variables as given while processes are started."""
    previous = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray replaces the handler of SIGTERM, which here is a request to stop after a step."""
    signums = (signal.SIGINT, signal.SIGTERM)
    previous = {signum: signal.getsignal(signum) for signum in signums}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            if handler is not None and signal.getsignal(signum) is not handler:
                signal.signal(signum, handler)
