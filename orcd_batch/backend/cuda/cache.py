"""Where compiled kernels and tuning results stay between runs."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def cache_dir(leaf: str) -> Path:
    """`$ORCD_BATCH_CACHE/leaf`, else `leaf` under orcd-batch in the user's cache directory."""
    root = os.environ.get("ORCD_BATCH_CACHE")
    if root:
        return Path(root) / leaf
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "orcd-batch" / leaf


def read_json(path: Path) -> dict[str, Any]:
    """The stored object, or {} when there is none or it cannot be read."""
    try:
        loaded = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Stores atomically; a cache that cannot be written costs time, not correctness."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "w") as stream:
            json.dump(value, stream, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except OSError:
        return
