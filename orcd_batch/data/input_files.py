"""Which Parquet files the `data` option means: files, directories and globs, in a fixed order."""

import fnmatch
import glob
import os
from collections.abc import Sequence

from orcd_batch.data.location import Location, one_line
from orcd_batch.errors import InputError, OrcdError

_EXTENSIONS = (".parquet", ".parq", ".pq")
_GLOB_CHARACTERS = "*?["


def find_files(paths: str | Sequence[str]) -> list[Location]:
    """The files to read, each once: in the order given, sorted within a directory or a glob.

    In a directory (read with its sub-directories) files without a Parquet extension are ignored,
    as are names that begin with `_` or `.` and the parts of an unfinished output. A name that
    exists is taken literally before its `*?[` are. Raises InputError for what matches nothing or
    is listed twice.
    """
    listed = [paths] if isinstance(paths, str) else list(paths)
    if not listed:
        raise InputError("data lists no files: give a Parquet file, a directory or a glob.")
    found: list[Location] = []
    for text in listed:
        try:
            found += _expand(text)
        except OSError as error:
            raise InputError(f"data={text} cannot be listed: {one_line(error)}.") from error
        except InputError:
            raise
        except OrcdError as error:
            raise InputError(str(error)) from error
    seen: set[tuple[str, str]] = set()
    for location in found:
        key = (location.filesystem.type_name, location.path)
        if key in seen:
            raise InputError(f"data lists {location} twice: list each file once.")
        seen.add(key)
    return found


def would_read(paths: Sequence[str], output: str) -> bool:
    """Whether `find_files(paths)` would give `output` if it existed."""
    wanted = Location.parse(output)
    path = os.path.realpath(wanted.path) if wanted.local else wanted.path
    for location in map(Location.parse, paths):
        root = os.path.realpath(location.path) if location.local else location.path
        below = path[len(root) :] if path.startswith(root + "/") else None
        if (
            path == root
            or (below is not None and _is_parquet(below) and location.is_directory())
            or (_matches(wanted.path.split("/"), location.path.split("/")))
        ):
            return wanted.local == location.local
    return False


def _expand(text: str) -> list[Location]:
    location = Location.parse(text)
    if location.is_file():
        return [location]
    if location.is_directory():
        return _in_directory(location)
    if not any(character in location.path for character in _GLOB_CHARACTERS):
        raise InputError(f"data={text} does not exist: give a Parquet file, a directory or a glob.")
    matches = _local_matches(location) if location.local else _remote_matches(location)
    found = [file for match in matches for file in _match_files(match)]
    if not found:
        raise InputError(f"data={text} matches no Parquet file: check the pattern.")
    return found


def _in_directory(location: Location) -> list[Location]:
    found = [
        file
        for file in location.files_below(recursive=True)
        if _is_parquet(file.path[len(location.path) :])
    ]
    if not found:
        raise InputError(
            f"The directory {location} holds no Parquet files (names ending in "
            f"{', '.join(_EXTENSIONS)}): check data."
        )
    return found


def _match_files(match: Location) -> list[Location]:
    return _in_directory(match) if match.is_directory() else [match]


def _local_matches(location: Location) -> list[Location]:
    names = sorted(glob.glob(location.path, recursive=True))
    shown = [name for name in names if not _is_hidden(os.path.basename(name))]
    return [Location(location.filesystem, name, True) for name in shown]


def _remote_matches(location: Location) -> list[Location]:
    parts = location.path.split("/")
    first = next(i for i, part in enumerate(parts) if set(part) & set(_GLOB_CHARACTERS))
    root = Location(location.filesystem, "/".join(parts[:first]), False)
    return [
        file
        for file in root.files_below(recursive=True)
        if _matches(file.path.split("/"), parts) and not _is_hidden(file.name)
    ]


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether path components match glob components, `**` standing for any number of them."""
    if not patterns or not names:
        return not names and all(pattern == "**" for pattern in patterns)
    if patterns[0] == "**":
        return _matches(names, patterns[1:]) or _matches(names[1:], patterns)
    return fnmatch.fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


def _is_parquet(relative_path: str) -> bool:
    """Whether a file at this place below a directory is read."""
    return relative_path.lower().endswith(_EXTENSIONS) and not _is_hidden(relative_path)


def _is_hidden(relative_path: str) -> bool:
    parts = [part for part in relative_path.split("/") if part]
    return any(part[0] in "_." for part in parts) or any(
        part.endswith(".parts") for part in parts[:-1]
    )
