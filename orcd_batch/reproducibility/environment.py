"""What a run's bits depend on besides its inputs: versions, BLAS, the CPU, and our own code."""

import hashlib
import platform
import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("numpy", "tokenizers", "pyarrow", "gguf", "jinja2")
_CUDA_PACKAGES = ("cuda-python", "cuda-bindings", "cuda-core", "nvmath-python")
_SOURCE_SUFFIXES = (".py", ".cu", ".cuh")


def environment(engine_kind: str) -> dict[str, Any]:
    """Versions and names as plain values, in a fixed order.

    engine_kind: "numpy" adds the BLAS build and the kernel type it chose for this CPU; "cuda"
    adds the CUDA packages (the driver and the card are the backend's to tell).
    """
    found: dict[str, Any] = {
        "orcd_batch": own_version(),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        **{name: package_version(name) for name in _PACKAGES},
        "cpu": cpu_name(),
    }
    if engine_kind == "cuda":
        return found | {name: package_version(name) for name in _CUDA_PACKAGES}
    return found | {"blas": blas_builds()}


def own_version() -> str:
    """This package's version: the installed one, else the checkout's."""
    installed = package_version("orcd-batch")
    project = _package().parent / "pyproject.toml"
    if installed is None and project.is_file():
        return str(tomllib.loads(project.read_text())["project"]["version"])
    return installed or "unknown"


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def blas_builds() -> list[dict[str, Any]]:
    """Each loaded BLAS: library, version, threading layer, and CPU kernel type.

    The number of threads is left out: the engine's results do not depend on it.
    """
    import numpy  # noqa: F401  (loads its BLAS)
    from threadpoolctl import threadpool_info

    names = ("internal_api", "version", "threading_layer", "architecture")
    builds = [info for info in threadpool_info() if info["user_api"] == "blas"]
    found = [{name: info.get(name) for name in names} for info in builds]
    return sorted(found, key=str)


def cpu_name() -> str:
    """The CPU's model name, such as "Intel(R) Xeon(R) Platinum 8480C"."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of the checkout the package lies in, or None where it was installed."""
    checkout = _package().parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def code_hash() -> str:
    """Hex SHA-256 over the names and bytes of the package's Python and CUDA sources.

    The same in a checkout, where kernels/ lies beside the package, and in an installed wheel.
    """
    digest = hashlib.sha256(b"orcd_batch code\n")
    for name, path in _source_files().items():
        content = path.read_bytes()
        digest.update(f"{name}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()


def source_hashes() -> dict[str, str]:
    """The SHA-256 (first 16 hex digits) of each file that `code_hash` covers, by its name."""
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for name, path in _source_files().items()
    }


def _source_files() -> dict[str, Path]:
    """Names in order: relative to the package, kernels/ being part of it wherever it lies."""
    package = _package()
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*")}
    kernels = package.parent / "kernels"
    if not (package / "kernels").is_dir() and kernels.is_dir():
        files |= {f"kernels/{p.relative_to(kernels).as_posix()}": p for p in kernels.rglob("*")}
    return {name: files[name] for name in sorted(files) if name.endswith(_SOURCE_SUFFIXES)}


def _package() -> Path:
    return Path(__file__).resolve().parent.parent
