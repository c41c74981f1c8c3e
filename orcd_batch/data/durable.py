"""Files that are either there in full or not at all, whenever the process or the machine dies."""

import os

from orcd_batch.data.location import Location

TEMPORARY_SUFFIX = ".tmp"


def put(location: Location, data: bytes | memoryview) -> None:
    """Writes a small file atomically: write, fsync, rename, fsync the directory.

    On an object store it is a single put. Raises OSError.
    """
    if not location.local:
        with location.filesystem.open_output_stream(location.path) as stream:
            stream.write(data)
        return
    temporary = location.path + TEMPORARY_SUFFIX
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, location.path)


def publish(temporary: str, final: str) -> None:
    """Renames a file whose bytes are on disk to its final local name, for good."""
    os.replace(temporary, final)
    sync_path(os.path.dirname(final))


def sync_path(path: str) -> None:
    """fsync of a local file or directory by its path."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
