"""The records of a run hash for many output rows at once, out of their Arrow columns."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orcd_batch.reproducibility.hashes import RunHash


def add_batch(run_hash: RunHash, batch: Any) -> None:
    """Adds rows as `RunHash.add` adds each of them.

    batch: RecordBatch with the columns id (typed, as a part has it: "i5", "s5"), sample_index,
    token_hash, numerics_hash and error_kind.
    """
    run_hash.add_messages(_messages(batch).to_pylist())


def add_output(run_hash: RunHash, batch: Any) -> None:
    """As `add_batch`, with ids as an output has them: integers or strings."""
    ids = batch.column("id")
    is_number = pa.types.is_integer(ids.type)
    typed = pc.binary_join_element_wise("i" if is_number else "s", ids.cast(pa.string()), "")
    place = batch.schema.get_field_index("id")
    add_batch(run_hash, batch.set_column(place, "id", typed))


def _messages(batch: Any) -> Any:
    """What each row's record is the hash of, as an Arrow array of bytes."""
    ids = batch.column("id").cast(pa.binary())
    numbers = np.empty((batch.num_rows, 2), dtype="<i8")
    numbers[:, 0] = batch.column("sample_index").to_numpy()
    numbers[:, 1] = pc.binary_length(ids).to_numpy()
    buffers = [None, pa.py_buffer(numbers)]
    heads = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), batch.num_rows, buffers)
    return pc.binary_join_element_wise(heads.cast(pa.binary()), ids, _outcomes(batch), b"")


def _outcomes(batch: Any) -> Any:
    names = ("token_hash", "numerics_hash", "error_kind")
    tokens, numerics, errors = (batch.column(name).cast(pa.binary()) for name in names)
    good = pc.binary_join_element_wise(
        tokens, numerics, b" ", null_handling="replace", null_replacement="None"
    )
    if errors.null_count == len(errors):
        return good
    return pc.coalesce(pc.binary_join_element_wise(b"error", errors, b" "), good)
