"""Where files are: a local path, or an object in a store that pyarrow.fs can open."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import fs

from orcd_batch.errors import OrcdError

_URI = re.compile(r"^[A-Za-z][A-Za-z0-9+.\-]+://")


@dataclass(frozen=True, slots=True)
class Location:
    """A file or directory: a pyarrow filesystem and a path in it.

    local: a path of this machine's file system, so that locks, fsync and rename work on it.
    """

    filesystem: Any
    path: str
    local: bool

    @classmethod
    def parse(cls, text: str) -> "Location":
        """A local path (any characters) or a URI such as s3://bucket/key.

        Raises OrcdError when the URI's scheme or options are not understood.
        """
        if _URI.match(text):
            try:
                filesystem, path = fs.FileSystem.from_uri(text)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise OrcdError(
                    f"{text} is not a URI that pyarrow can open ({one_line(error)}): "
                    "check its scheme, or give a local path."
                ) from error
            if not isinstance(filesystem, fs.LocalFileSystem):
                return cls(filesystem, path.rstrip("/"), False)
            text = path
        return cls(fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text)), True)

    def __str__(self) -> str:
        return self.path if self.local else f"{self.filesystem.type_name}://{self.path}"

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    def sibling(self, suffix: str) -> "Location":
        """The same path with `suffix` at its end."""
        return Location(self.filesystem, self.path + suffix, self.local)

    def child(self, name: str) -> "Location":
        return Location(self.filesystem, f"{self.path}/{name}", self.local)

    def info(self) -> Any:
        """pyarrow's FileInfo: type, size in bytes, mtime_ns."""
        return self.filesystem.get_file_info(self.path)

    def is_file(self) -> bool:
        return bool(self.info().type == fs.FileType.File)

    def is_directory(self) -> bool:
        return bool(self.info().type == fs.FileType.Directory)

    def open(self) -> Any:
        """A random-access file; raises OSError."""
        return self.filesystem.open_input_file(self.path)

    def files_below(self, recursive: bool) -> list["Location"]:
        """The files of this directory, sorted by path; none where it does not exist."""
        selector = fs.FileSelector(self.path, allow_not_found=True, recursive=recursive)
        infos = self.filesystem.get_file_info(selector)
        paths = sorted(info.path for info in infos if info.type == fs.FileType.File)
        return [Location(self.filesystem, path, self.local) for path in paths]


def one_line(error: BaseException) -> str:
    """The error's first line without its closing full stop, for use inside a sentence."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]


@contextmanager
def reported_as(kind: type[OrcdError], sentence: str) -> Iterator[None]:
    """Turns what pyarrow and the operating system raise into `kind`: "sentence: the reason"."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise kind(f"{sentence}: {one_line(error)}.") from error
