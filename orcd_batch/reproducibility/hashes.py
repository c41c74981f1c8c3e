"""The hashes that state what a run produced, and the digest that seeds a row's random numbers."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_STREAM_TAG = b"orcd_batch stream\n"
_TOKEN_TAG = b"orcd_batch tokens\n"
_RUN_TAG = b"orcd_batch run\n"

IntSequence = Sequence[int] | NDArray[np.integer]


def typed_id(row_id: int | str) -> bytes:
    """An id as bytes in which the int 5 and the string "5" differ: `i5` and `s5`."""
    if isinstance(row_id, str):
        return b"s" + row_id.encode("utf-8")
    return b"i%d" % row_id


def stream_digest(row_id: int | str, sample_index: int) -> int:
    """The 64-bit Philox stream of one sample: the first 8 bytes (little-endian) of a SHA-256.

    The hash covers a domain tag, the sample index (int64, little-endian) and the typed id.
    """
    message = _STREAM_TAG + sample_index.to_bytes(8, "little", signed=True) + typed_id(row_id)
    return int.from_bytes(hashlib.sha256(message).digest()[:8], "little")


def token_hash(prompt_ids: IntSequence, completion_ids: IntSequence) -> str:
    """Hex SHA-256 over a domain tag, both lengths (int64) and both id lists (int32), little-endian.

    Raises OverflowError when an id does not fit into int32.
    """
    lengths = np.array([len(prompt_ids), len(completion_ids)], dtype="<i8")
    digest = hashlib.sha256(_TOKEN_TAG + lengths.tobytes())
    for ids in (prompt_ids, completion_ids):
        digest.update(np.asarray(ids, dtype="<i4").tobytes())
    return digest.hexdigest()


def numerics_hash(fingerprints: IntSequence) -> str:
    """Hex SHA-256 over the fingerprints as little-endian int64."""
    return hashlib.sha256(np.asarray(fingerprints, dtype="<i8").tobytes()).hexdigest()


class RunHash:
    """SHA-256 over the sorted records of a run, whatever order they are added in.

    A record is the SHA-256 of sample index (int64, little-endian), length of the typed id
    (int64), typed id, token_hash and numerics_hash; an error row counts as its kind in place of
    the two hashes. Sorting the 32-byte records keeps memory at 32 bytes a row (64 while sorting).
    """

    def __init__(self) -> None:
        self._records = bytearray()

    def __len__(self) -> int:
        return len(self._records) // 32

    def add(
        self,
        row_id: int | str,
        sample_index: int,
        token_hash: str | None,
        numerics_hash: str | None,
        error_kind: str | None = None,
    ) -> None:
        """Adds one output row; the hashes are ignored when `error_kind` is given."""
        key = typed_id(row_id)
        outcome = f"{token_hash} {numerics_hash}" if error_kind is None else f"error {error_kind}"
        head = np.array([sample_index, len(key)], dtype="<i8").tobytes()
        self.add_messages([head + key + outcome.encode()])

    def add_messages(self, messages: Iterable[bytes]) -> None:
        """Adds output rows by what their records are the hashes of."""
        sha256 = hashlib.sha256
        self._records += b"".join([sha256(message).digest() for message in messages])

    def hexdigest(self) -> str:
        """The hash of everything added so far; more may be added afterwards."""
        records = np.sort(np.frombuffer(self._records, dtype="S32"))
        digest = hashlib.sha256(_RUN_TAG)
        digest.update(records.data)
        return digest.hexdigest()
