"""The manifest in a Parquet file's key-value metadata, and how two of them are compared."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orcd_batch.data.location import Location, reported_as
from orcd_batch.data.parquet_file import ParquetInput
from orcd_batch.errors import InputError

MANIFEST_KEY = b"orcd_batch"


def read_manifest(path: str) -> dict[str, Any]:
    """The manifest of an output file.

    Raises InputError when the file is not Parquet or was not written by this program.
    """
    location = Location.parse(path)
    if not location.is_file():
        raise InputError(f"{location} does not exist: name an output file.")
    parquet = ParquetInput(location)
    try:
        manifest = manifest_of(parquet)
    finally:
        parquet.close()
    if manifest is None:
        raise InputError(f"{location} was not written by orcd_batch: it carries no manifest.")
    return manifest


def manifest_of(parquet: ParquetInput) -> dict[str, Any] | None:
    """The manifest of an open file, or None where there is none. Raises InputError."""
    text = (parquet.metadata.metadata or {}).get(MANIFEST_KEY)
    if text is None:
        return None
    with reported_as(InputError, f"The manifest in {parquet.location} is not JSON"):
        manifest = json.loads(text)
    if not isinstance(manifest, dict):
        raise InputError(f"The manifest in {parquet.location} is not a JSON object.")
    return manifest


def encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as JSON, keys in the order given; floats must be finite."""
    return json.dumps(manifest, ensure_ascii=False, allow_nan=False).encode()


def flattened(document: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings as (dotted name, value); lists are leaves."""
    if not isinstance(document, Mapping) or (not document and prefix):
        yield prefix, document
        return
    for key, value in document.items():
        yield from flattened(value, f"{prefix}.{key}" if prefix else str(key))


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The leaves that differ as (dotted name, ours, theirs); None where one side lacks it."""
    mine, other = dict(flattened(ours)), dict(flattened(theirs))
    names = [*mine, *(name for name in other if name not in mine)]
    return [
        (name, mine.get(name), other.get(name))
        for name in names
        if mine.get(name) != other.get(name)
    ]


def shortened(value: Any) -> str:
    """A value for a sentence: long hashes by their first 12 characters, long text cut."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) >= 32 and all(character in "0123456789abcdef" for character in text):
        return text[:12]
    return text if len(text) <= 60 else text[:57] + "…"


def differences_sentence(found: Sequence[tuple[str, Any, Any]]) -> str:
    """The differences as one clause: "name is A here and B there; …"."""
    return "; ".join(
        f"{name} is {shortened(ours)} here and {shortened(theirs)} there"
        for name, ours, theirs in found
    )
