"""Reading the few numbers we need out of Thrift's compact protocol, with every length checked.

The format: Apache Thrift, doc/specs/thrift-compact-protocol.md.
"""

from collections.abc import Mapping
from typing import Any

# What to keep of a struct: field id -> None (a number or bytes), a struct's own shape, or [shape]
# for a list of structs, [None] for a list of numbers or bytes. Other fields are skipped.
Shape = Mapping[int, Any]

_MAX_DEPTH = 32
_BOOL_TRUE, _BOOL_FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = (
    *(1, 2, 3, 7, 8, 9, 10, 11, 12, 13),
)
_INTEGERS = frozenset((4, 5, 6))
_FIXED_SIZES = {_BOOL_TRUE: 1, _BOOL_FALSE: 1, _BYTE: 1, _DOUBLE: 8, _UUID: 16}


class TruncatedError(ValueError):
    """The bytes end inside a value."""


def read_struct(data: bytes, shape: Shape) -> tuple[dict[int, Any], int]:
    """The wanted fields of the struct at the start of `data`, and the number of its bytes.

    Raises TruncatedError when the bytes end too early, ValueError when they are not Thrift.
    """
    reader = _Reader(data)
    try:
        return reader.struct(shape, 0), reader.position
    except IndexError as error:
        raise TruncatedError("its Thrift data ends too early") from error


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def struct(self, shape: Shape, depth: int) -> dict[int, Any]:
        if depth > _MAX_DEPTH:
            raise ValueError(f"its Thrift data nests deeper than {_MAX_DEPTH} levels")
        found: dict[int, Any] = {}
        field = 0
        while head := self._byte():
            kind, delta = head & 15, head >> 4
            field = field + delta if delta else self._signed()
            if field not in shape:
                self._skip(kind, depth, in_field=True)
            elif kind in _INTEGERS and shape[field] is None:
                found[field] = self._signed()
            elif kind == _STRUCT and isinstance(shape[field], Mapping):
                found[field] = self.struct(shape[field], depth + 1)
            elif kind == _LIST and isinstance(shape[field], list):
                found[field] = self._list(shape[field][0], depth)
            else:
                raise ValueError(f"its Thrift field {field} has the unexpected type {kind}")
        return found

    def _list(self, shape: Shape | None, depth: int) -> list[Any]:
        size, kind = self._list_head()
        if shape is not None and kind == _STRUCT:
            return [self.struct(shape, depth + 1) for _ in range(size)]
        if shape is None and kind == _BINARY:
            return [self._bytes() for _ in range(size)]
        if size:
            raise ValueError(f"its Thrift list has elements of the unexpected type {kind}")
        return []

    def _skip(self, kind: int, depth: int, in_field: bool) -> None:
        if in_field and kind in (_BOOL_TRUE, _BOOL_FALSE):
            return
        if kind in _INTEGERS:
            self._unsigned()
        elif kind in _FIXED_SIZES:
            self._advance(_FIXED_SIZES[kind])
        elif kind == _BINARY:
            self._advance(self._unsigned())
        elif kind == _STRUCT:
            self.struct({}, depth + 1)
        elif kind in (_LIST, _SET):
            size, element = self._list_head()
            self._skip_all([element], size, depth)
        elif kind == _MAP:
            size = self._unsigned()
            kinds = self._byte() if size else 0
            self._skip_all([kinds >> 4, kinds & 15], size, depth)
        else:
            raise ValueError(f"its Thrift data holds the unknown type {kind}")

    def _skip_all(self, kinds: list[int], size: int, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError(f"its Thrift data nests deeper than {_MAX_DEPTH} levels")
        self._check_remaining(size)
        for _ in range(size):
            for kind in kinds:
                self._skip(kind, depth + 1, in_field=False)

    def _list_head(self) -> tuple[int, int]:
        head = self._byte()
        size = head >> 4
        if size == 15:
            size = self._unsigned()
        self._check_remaining(size)
        return size, head & 15

    def _check_remaining(self, size: int) -> None:
        if size > len(self._data) - self.position:
            raise IndexError

    def _bytes(self) -> bytes:
        size = self._unsigned()
        start = self.position
        self._advance(size)
        return self._data[start : self.position]

    def _advance(self, size: int) -> None:
        self._check_remaining(size)
        self.position += size

    def _byte(self) -> int:
        value = self._data[self.position]
        self.position += 1
        return value

    def _unsigned(self) -> int:
        value = self._byte()
        if value < 0x80:
            return value
        value &= 0x7F
        for shift in range(7, 70, 7):
            more = self._byte()
            value |= (more & 0x7F) << shift
            if more < 0x80:
                return value
        raise ValueError("its Thrift data holds a number of more than 10 bytes")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
