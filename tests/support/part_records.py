"""A store's finished rows one by one: the plain definition of what run_totals does by columns."""

from collections.abc import Iterator
from typing import NamedTuple

from orcd_batch.data import PartStore
from orcd_batch.data.part_file import id_from_text


class Record(NamedTuple):
    """What the run hash and the totals need of one output row."""

    row_index: int
    id: int | str
    sample_index: int
    token_hash: str | None
    numerics_hash: str | None
    completion_tokens: int | None
    error_kind: str | None


def records(store: PartStore) -> Iterator[Record]:
    """Every result, those of earlier runs included; of a row in several parts only the newest."""
    for batch in store.record_batches():
        for row in batch.to_pylist():
            yield Record(**row | {"id": id_from_text(row["id"])})
