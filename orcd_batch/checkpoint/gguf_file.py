"""A GGUF file opened, checked and mapped: its metadata, where its tensors lie, and their bytes.

Our own parser, because `gguf.GGUFReader` takes seconds for a large vocabulary. The layout is that
of the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import mmap
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from orcd_batch.checkpoint.ggml_types import GGML_TYPES
from orcd_batch.checkpoint.header_reader import HeaderReader, quoted, shown
from orcd_batch.errors import CheckpointError, ClosedError

_MIN_METADATA_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8
_MAX_KEY_BYTES = 65535
_MAX_TENSOR_NAME_BYTES = 64
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. shape: outermost dimension first, so a linear weight is (out, in).

    ggml_type: GGML's name, such as "Q4_1". offset, num_bytes: in bytes, offset from the file's
    first byte.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: str
    offset: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


class FileIdentity(NamedTuple):
    """What tells a changed file from the one that was opened."""

    size: int
    mtime_ns: int
    inode: int


class GGUFFile:
    """A validated, memory-mapped GGUF file of version 2 or 3; a context manager.

    path: as given. version: 2 or 3. metadata: value by key; numbers, booleans and strings as
    Python's own, arrays of strings as lists, other arrays as read-only numpy arrays. value_types:
    type by key, in words. tensors: by name, in file order. identity: size, time and inode. file:
    the same file to read from, for as long as it is open: a file cut short after it was opened
    gives an error there, where touching its mapping would end the process.
    """

    def __init__(
        self,
        path: Path,
        version: int,
        metadata: Mapping[str, object],
        value_types: Mapping[str, str],
        tensors: dict[str, TensorInfo],
        header_size: int,
        identity: FileIdentity,
        mapping: mmap.mmap,
        file: FileIO,
    ) -> None:
        self.path = path
        self.version = version
        self.metadata = metadata
        self.value_types = value_types
        self.tensors = tensors
        self.identity = identity
        self.file = file
        self._header_size = header_size
        self._mapping: mmap.mmap | None = mapping

    @classmethod
    def open(cls, path: str | Path) -> "GGUFFile":
        """Maps the file and checks every count, offset and size in it against its length.

        Raises CheckpointError where it cannot be read, is no GGUF, or contradicts itself.
        """
        path = Path(path)
        mapping, identity, file = _map_file(path)
        try:
            return cls._parse(path, mapping, identity, file)
        except BaseException:
            mapping.close()
            file.close()
            raise

    @classmethod
    def _parse(
        cls, path: Path, mapping: mmap.mmap, identity: FileIdentity, file: FileIO
    ) -> "GGUFFile":
        reader = HeaderReader(mapping, path)
        version = _read_version(reader)
        num_tensors = reader.count("the number of tensors", _MIN_TENSOR_BYTES)
        metadata, value_types = _read_metadata(reader)
        alignment = _alignment(reader, metadata)
        tensors = _read_tensors(reader, num_tensors, alignment, identity.size)
        facts = (path, version, metadata, value_types, tensors, reader.position, identity)
        return cls(*facts, mapping, file)

    @property
    def header_bytes(self) -> NDArray[np.uint8]:
        """Everything in front of the tensor data: (n,) uint8, a read-only view of the file."""
        return self._view(0, self._header_size)

    def raw(self, tensor: str | TensorInfo) -> NDArray[np.uint8]:
        """A tensor's bytes as they lie in the file: (num_bytes,) uint8, a read-only view.

        tensor: a name, or a TensorInfo, which may describe only some rows of a tensor.
        Raises CheckpointError for a name that is not in the file, ClosedError after `close()`.
        """
        if isinstance(tensor, str):
            if tensor not in self.tensors:
                raise CheckpointError(f"{self.path} has no tensor {quoted(tensor)}.")
            tensor = self.tensors[tensor]
        return self._view(tensor.offset, tensor.num_bytes)

    def _view(self, offset: int, num_bytes: int) -> NDArray[np.uint8]:
        if self._mapping is None:
            raise ClosedError(f"{self.path} was closed; open it again to read its bytes.")
        return np.frombuffer(self._mapping, np.uint8, num_bytes, offset)

    def close(self) -> None:
        """Lets go of the file. Views handed out stay valid; the mapping ends with the last one."""
        mapping, self._mapping = self._mapping, None
        self.file.close()
        if mapping is not None:
            with suppress(BufferError):
                mapping.close()

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _map_file(path: Path) -> tuple[mmap.mmap, FileIdentity, FileIO]:
    file: FileIO | None = None
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path} is not a regular file; name a GGUF file.")
        file = FileIO(path)
        facts = os.fstat(file.fileno())
        if facts.st_size == 0:
            raise CheckpointError(f"{path} is empty; download or convert it again.")
        mapping = mmap.mmap(file.fileno(), facts.st_size, access=mmap.ACCESS_READ)
    except BaseException as error:
        if file is not None:
            file.close()
        if not isinstance(error, OSError | ValueError):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"Cannot open the model file {path}: {reason}.") from error
    return mapping, FileIdentity(facts.st_size, facts.st_mtime_ns, facts.st_ino), file


def _read_version(reader: HeaderReader) -> int:
    magic = reader.take(4, "the magic number")
    if magic != b"GGUF":
        reader.fail(f"it begins with {magic!r} instead of b'GGUF'")
    version = reader.u32("the version")
    if version and version & 0xFFFF == 0:
        reader.fail("it is big-endian, and only little-endian files are supported")
    if version not in (2, 3):
        reader.fail(f"its version is {version}, and only 2 and 3 are supported")
    return version


def _read_metadata(reader: HeaderReader) -> tuple[dict[str, object], dict[str, str]]:
    metadata: dict[str, object] = {}
    value_types: dict[str, str] = {}
    for index in range(reader.count("the number of metadata entries", _MIN_METADATA_BYTES)):
        key = reader.string(f"metadata key {index}", _MAX_KEY_BYTES)
        if not key:
            reader.fail(f"metadata key {index} is empty")
        if key in metadata:
            reader.fail(f"the metadata key {quoted(key)} occurs twice")
        metadata[key], value_types[key] = reader.value(f"the metadata value {quoted(key)}")
    return metadata, value_types


def _alignment(reader: HeaderReader, metadata: Mapping[str, object]) -> int:
    value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or isinstance(value, bool) or value.bit_count() != 1 or value < 1:
        reader.fail(f"general.alignment is {shown(value)}, which must be a power of two")
    return value


def _read_tensors(
    reader: HeaderReader, count: int, alignment: int, file_size: int
) -> dict[str, TensorInfo]:
    relative: dict[str, TensorInfo] = {}
    for index in range(count):
        tensor = _read_tensor(reader, index, alignment)
        if tensor.name in relative:
            reader.fail(f"the tensor {quoted(tensor.name)} occurs twice")
        relative[tensor.name] = tensor
    data_start = -(-reader.position // alignment) * alignment
    tensors = {
        name: TensorInfo(name, info.shape, info.ggml_type, data_start + info.offset, info.num_bytes)
        for name, info in relative.items()
    }
    _check_placement(reader, tensors, file_size)
    return tensors


def _read_tensor(reader: HeaderReader, index: int, alignment: int) -> TensorInfo:
    """One entry of the tensor table; its offset is still relative to the start of the data."""
    name = reader.string(f"the name of tensor {index}", _MAX_TENSOR_NAME_BYTES)
    what = f"tensor {quoted(name)}"
    if not name:
        reader.fail(f"tensor {index} has an empty name")
    num_dims = reader.u32(f"the number of dimensions of {what}")
    if not 1 <= num_dims <= 4:
        reader.fail(f"{what} has {num_dims} dimensions, and only 1 to 4 are possible")
    dims = [reader.u64(f"a dimension of {what}") for _ in range(num_dims)]
    if 0 in dims:
        reader.fail(f"{what} has a dimension of size 0")
    number = reader.u32(f"the type of {what}")
    offset = reader.u64(f"the offset of {what}")
    if number not in GGML_TYPES:
        reader.fail(f"{what} has GGML type {number}, which is unknown or withdrawn")
    ggml_type = GGML_TYPES[number]
    if dims[0] % ggml_type.block_size:
        reader.fail(
            f"{what} has rows of {dims[0]} values, not a multiple of "
            f"the {ggml_type.block_size} values in a block of {ggml_type.name}"
        )
    if offset % alignment:
        reader.fail(f"{what} begins at {offset}, not a multiple of the alignment {alignment}")
    num_bytes = prod(dims) // ggml_type.block_size * ggml_type.block_bytes
    return TensorInfo(name, tuple(reversed(dims)), ggml_type.name, offset, num_bytes)


def _check_placement(
    reader: HeaderReader, tensors: Mapping[str, TensorInfo], file_size: int
) -> None:
    end, previous = 0, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        what = f"tensor {quoted(tensor.name)}"
        if tensor.offset < end:
            reader.fail(f"{what} overlaps tensor {quoted(previous)}")
        end, previous = tensor.offset + tensor.num_bytes, tensor.name
        if end > file_size:
            reader.fail(
                f"{what} needs bytes up to {end}, but the file has {file_size}: it was cut short"
            )
