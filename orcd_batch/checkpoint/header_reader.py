"""Reads the numbers, strings and arrays of a GGUF header, never beyond the end of the file."""

import struct
from mmap import mmap
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from orcd_batch.errors import CheckpointError

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_SCALARS = {
    0: ("uint8", struct.Struct("<B")),
    1: ("int8", struct.Struct("<b")),
    2: ("uint16", struct.Struct("<H")),
    3: ("int16", struct.Struct("<h")),
    4: ("uint32", _U32),
    5: ("int32", struct.Struct("<i")),
    6: ("float32", struct.Struct("<f")),
    10: ("uint64", _U64),
    11: ("int64", struct.Struct("<q")),
    12: ("float64", struct.Struct("<d")),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9


def quoted(text: str) -> str:
    """The text in quotes and without control characters, shortened to 80 characters."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def shown(value: object) -> str:
    """A metadata value for a message: short, and arrays by their length alone."""
    if isinstance(value, list | np.ndarray):
        return f"an array of {len(value)} values"
    return quoted(value) if isinstance(value, str) else str(value)


class HeaderReader:
    """A cursor over the mapped file. Every method raises CheckpointError on bytes it cannot trust.

    The values follow the GGUF specification, versions 2 and 3, little-endian.
    """

    def __init__(self, data: mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self.position = 0

    @property
    def remaining(self) -> int:
        """Bytes between the cursor and the end of the file."""
        return len(self._data) - self.position

    def fail(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"{self._path} is not a usable GGUF file: {what}; download or convert it again."
        )

    def take(self, num_bytes: int, what: str) -> bytes:
        if num_bytes > self.remaining:
            self.fail(
                f"{what} takes {num_bytes} bytes at offset {self.position}, "
                f"but only {self.remaining} are left in the file"
            )
        start = self.position
        self.position = start + num_bytes
        return self._data[start : self.position]

    def u32(self, what: str) -> int:
        value: int = _U32.unpack(self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack(self.take(8, what))[0]
        return value

    def count(self, what: str, min_bytes: int) -> int:
        """A count of things that take at least `min_bytes` bytes each in the rest of the file."""
        count = self.u64(what)
        if count * min_bytes > self.remaining:
            self.fail(
                f"{what} is {count}, more than the {self.remaining} bytes "
                f"after offset {self.position} can hold"
            )
        return count

    def string(self, what: str, max_bytes: int | None = None) -> str:
        num_bytes = self.u64(f"the length of {what}")
        if max_bytes is not None and num_bytes > max_bytes:
            self.fail(f"{what} is {num_bytes} bytes long, and at most {max_bytes} are allowed")
        raw = self.take(num_bytes, what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not valid UTF-8 ({error.reason} at byte {error.start})")

    def value(self, what: str) -> tuple[object, str]:
        """One typed metadata value, and its type in words such as `uint32` or `string[12]`."""
        kind = self.u32(f"the type of {what}")
        if kind == _ARRAY:
            return self._array(what)
        if kind == _STRING:
            return self.string(what), "string"
        if kind == _BOOL:
            byte = self.take(1, what)[0]
            if byte > 1:
                self.fail(f"{what} is a boolean with the value {byte}, which must be 0 or 1")
            return bool(byte), "bool"
        if kind not in _SCALARS:
            self.fail(f"{what} has value type {kind}, and only 0 to 12 exist")
        name, layout = _SCALARS[kind]
        return layout.unpack(self.take(layout.size, what))[0], name

    def _array(self, what: str) -> tuple[object, str]:
        kind = self.u32(f"the element type of {what}")
        if kind == _ARRAY:
            self.fail(f"{what} is an array of arrays, which no known model needs")
        if kind == _STRING:
            count = self.count(f"the number of strings in {what}", 8)
            return self._strings(count, what), f"string[{count}]"
        if kind == _BOOL:
            flags = self._numbers(np.dtype(np.uint8), what)
            if flags.size and int(flags.max()) > 1:
                self.fail(f"{what} holds a boolean other than 0 and 1")
            return flags.view(np.bool_), f"bool[{flags.size}]"
        if kind not in _SCALARS:
            self.fail(f"{what} has element type {kind}, and only 0 to 12 exist")
        name, _ = _SCALARS[kind]
        numbers = self._numbers(np.dtype(name).newbyteorder("<"), what)
        return numbers, f"{name}[{numbers.size}]"

    def _numbers(self, dtype: np.dtype[np.generic], what: str) -> NDArray[np.generic]:
        count = self.count(f"the number of values in {what}", dtype.itemsize)
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)

    def _strings(self, count: int, what: str) -> list[str]:
        """The loop that vocabularies of 300,000 strings go through: kept short on purpose."""
        data, limit, position = self._data, len(self._data), self.position
        read_length = _U64.unpack_from
        strings: list[bytes] = []
        append = strings.append
        for _ in range(count):
            start = position + 8
            if start > limit:
                self.fail(f"{what} ends after {len(strings)} of {count} strings")
            (length,) = read_length(data, position)
            position = start + length
            if position > limit:
                self.fail(f"string {len(strings)} of {what} is {length} bytes long, past the end")
            append(data[start:position])
        self.position = position
        try:
            return list(map(bytes.decode, strings))
        except UnicodeDecodeError as error:
            index = strings.index(error.object)
            self.fail(f"string {index} of {what} is not valid UTF-8 ({error.reason})")
