"""A model's identity: a hash over every byte that matters, and a memory of earlier hashes."""

import hashlib
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from orcd_batch.checkpoint.gguf_file import FileIdentity, GGUFFile
from orcd_batch.errors import CheckpointError

# Large: every piece takes the interpreter lock, which the run needs meanwhile.
_PIECE_BYTES = 8 << 20


def model_hash(gguf: GGUFFile, num_threads: int = 0) -> str:
    """Hex SHA-256 over the SHA-256 of the header and then of each tensor's bytes, in file order.

    The header is everything in front of the tensor data, so names, shapes and metadata count;
    padding between tensors does not. num_threads: 0 uses every CPU this process may run on.
    Raises ClosedError when the file was closed, CheckpointError when it was cut short meanwhile.
    """
    return hashlib.sha256(b"".join(part_digests(gguf, num_threads))).hexdigest()


def part_digests(gguf: GGUFFile, num_threads: int = 0) -> list[bytes]:
    """The SHA-256 of the header and of each tensor's bytes, in file order; as `model_hash`."""
    sizes = [(0, gguf.header_bytes.nbytes)]
    sizes += [(tensor.offset, tensor.num_bytes) for tensor in gguf.tensors.values()]
    with ThreadPoolExecutor(num_threads or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda size: _digest(gguf, *size), sizes))


def _digest(gguf: GGUFFile, position: int, num_bytes: int) -> bytes:
    """SHA-256 of bytes read, not mapped: see `GGUFFile.file`."""
    found, end = hashlib.sha256(), position + num_bytes
    piece = bytearray(min(num_bytes, _PIECE_BYTES))
    view = memoryview(piece)
    while position < end:
        count = os.preadv(gguf.file.fileno(), [view[: end - position]], position)
        if count == 0:
            raise CheckpointError(
                f"{gguf.path} ends at byte {position:,} and had {gguf.identity.size:,} bytes when "
                "it was opened: it was cut short while it was read; fetch it again."
            )
        found.update(view[:count])
        position += count
    return found.digest()


def cached_model_hash(path: str | Path, cache_dir: str | Path) -> str | None:
    """The hash remembered for this path, if the file's size, time and inode are still the same."""
    try:
        record = json.loads(_record_path(path, cache_dir).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("model_hash"), str):
        return None
    known: str = record["model_hash"]
    return known if record == _record(path, known) else None


def remember_model_hash(
    path: str | Path, cache_dir: str | Path, model_hash: str, identity: FileIdentity | None = None
) -> None:
    """Keeps the hash for `cached_model_hash`; where that cannot be written, nothing happens.

    identity: the file as it was when it was hashed (`gguf.identity`); None for as it is now.
    """
    target = _record_path(path, cache_dir)
    with suppress(OSError):
        text = json.dumps(_record(path, model_hash, identity))
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=target.parent, encoding="utf-8", delete=False
        ) as file:
            file.write(text)
        os.replace(file.name, target)


def _record(
    path: str | Path, model_hash: str, identity: FileIdentity | None = None
) -> dict[str, object]:
    if identity is None:
        facts = os.stat(path)
        identity = FileIdentity(facts.st_size, facts.st_mtime_ns, facts.st_ino)
    return {"path": os.path.realpath(path), **identity._asdict(), "model_hash": model_hash}


def _record_path(path: str | Path, cache_dir: str | Path) -> Path:
    key = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
    return Path(cache_dir) / "model_hashes" / f"{key}.json"
