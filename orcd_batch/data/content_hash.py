"""A hash of input files by content: the same data elsewhere is the same data."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from orcd_batch.data.location import Location, reported_as
from orcd_batch.errors import InputError

_CHUNK_BYTES = 64 * 2**20
_PIECE_BYTES = 2**20


def content_hash(files: Sequence[Location]) -> str:
    """Hex SHA-256 over each file's size and the SHA-256 of each of its 64 MiB chunks, in order.

    Chunks are hashed in parallel; names and paths do not enter. Raises InputError.
    """
    digest = hashlib.sha256(b"orcd_batch input\n")
    with ThreadPoolExecutor(max_workers=4) as pool:
        for location in files:
            with reported_as(InputError, f"{location} cannot be read"):
                size = int(location.info().size)
                digest.update(size.to_bytes(8, "little"))
                starts = range(0, size, _CHUNK_BYTES)
                for chunk in pool.map(lambda start, file=location: _chunk(file, start), starts):
                    digest.update(chunk)
    return digest.hexdigest()


def _chunk(location: Location, start: int) -> bytes:
    digest = hashlib.sha256()
    remaining = _CHUNK_BYTES
    with location.open() as source:
        source.seek(start)
        while remaining:
            piece = source.read(min(_PIECE_BYTES, remaining))
            if not piece:
                break
            digest.update(piece)
            remaining -= len(piece)
    return digest.digest()
