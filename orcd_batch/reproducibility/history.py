"""The history of a nightly check: one Parquet file, one row a night, never lost by a crash."""

import json
import os
from collections.abc import Mapping
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from orcd_batch.data.durable import put
from orcd_batch.data.location import Location, one_line, reported_as
from orcd_batch.data.output_lock import OutputLock
from orcd_batch.errors import InputError, OutputError

_TEXT, _COUNT, _SMALL, _REAL = pa.string(), pa.int64(), pa.int32(), pa.float64()

VARIATION = pa.struct(
    {
        **dict.fromkeys(("name", "title", "status", "run_hash"), _TEXT),
        **dict.fromkeys(("num_rows", "num_differing"), _COUNT),
        **dict.fromkeys(("tokens_per_s", "seconds"), _REAL),
    }
)
DIFFERENCE = pa.struct(
    {
        **dict.fromkeys(("comparison", "kind", "id"), _TEXT),
        **dict.fromkeys(("sample_index", "position", "token_a", "token_b"), _SMALL),
        **dict.fromkeys(("margin_a", "margin_b"), _REAL),
    }
)
CHANGE = pa.struct(dict.fromkeys(("field", "before", "now"), _TEXT))

# One night. docs/nightly.md says what each column means.
SCHEMA = pa.schema(
    {
        "night": _TEXT,
        "started": pa.timestamp("us", "UTC"),
        "seconds": _REAL,
        **dict.fromkeys(("verdict", "cause", "run_hash", "model_name", "model_hash"), _TEXT),
        **dict.fromkeys(("tokenizer_hash", "template_hash", "input_hash"), _TEXT),
        **dict.fromkeys(("code_hash", "kernels_hash", "package_version", "git_commit"), _TEXT),
        **dict.fromkeys(("engine", "device", "cpu"), _TEXT),
        "num_devices": _SMALL,
        "versions": pa.map_(_TEXT, _TEXT),
        **dict.fromkeys(("num_rows", "num_tokens", "num_errors"), _COUNT),
        **dict.fromkeys(("tokens_per_s", "start_s"), _REAL),
        "variations": pa.list_(VARIATION),
        **dict.fromkeys(("baseline_status", "baseline_hash"), _TEXT),
        **dict.fromkeys(("num_comparisons", "num_failed"), _SMALL),
        "first_difference": DIFFERENCE,
        **dict.fromkeys(("last_good_night", "failing_since"), _TEXT),
        "changed": pa.list_(CHANGE),
        "facts": _TEXT,
    }
)


class History:
    """A history file, held by one process at a time; a context manager.

    path: local, or a URI that pyarrow.fs opens. Raises OutputError when another check holds it,
    InputError when the file there is not a history.
    """

    def __init__(self, path: str) -> None:
        self.location = Location.parse(path)
        self._lock: OutputLock | None = None
        if self.location.local:
            os.makedirs(os.path.dirname(self.location.path), exist_ok=True)
            self._lock = OutputLock(self.location.path + ".lock")
        try:
            self._table = self._read()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def check_new(self, night: str) -> None:
        """Raises OutputError when there is a night of that name."""
        if night in self._table["night"].to_pylist():
            raise OutputError(
                f"{self.location} already has the night {night}: give this one a directory of its "
                "own with hydra.run.dir."
            )

    def last_good(self) -> dict[str, Any] | None:
        """The newest night that passed: `night`, and `facts` as a dict."""
        for row in range(len(self) - 1, -1, -1):
            found = self._night(row)
            if found["verdict"] == "pass":
                return found | {"facts": json.loads(found["facts"])}
        return None

    def failing_since(self) -> str | None:
        """The first night of the run of failures that the last night belongs to."""
        since = None
        for row in range(len(self) - 1, -1, -1):
            found = self._night(row)
            if found["verdict"] == "pass":
                break
            since = str(found["night"])
        return since

    def append(self, night: Mapping[str, Any]) -> None:
        """Adds one row, keyed by column. Raises OutputError; the file then is as it was."""
        unknown = set(night) - set(SCHEMA.names)
        assert not unknown, f"the history has no columns {unknown}"
        row = pa.Table.from_pylist([dict(night)], SCHEMA)
        self._table = pa.concat_tables([self._table, row], promote_options="default")
        sink = pa.BufferOutputStream()
        pq.write_table(self._table, sink, compression="zstd")
        with reported_as(OutputError, f"The history {self.location} cannot be written"):
            put(self.location, memoryview(sink.getvalue()))

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> Any:
        if not self.location.is_file():
            return SCHEMA.empty_table()
        try:
            with self.location.open() as file:
                table = pq.read_table(file)
            pa.unify_schemas([table.schema, SCHEMA])
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(
                f"{self.location} is not a history that a night can be added to "
                f"({one_line(error)}): move it away, or name another with check.history."
            ) from error
        if "night" not in table.column_names:
            raise InputError(
                f"{self.location} is no history, it has the columns "
                f"{', '.join(table.column_names)}: name another with check.history."
            )
        return table

    def _night(self, row: int) -> dict[str, Any]:
        columns = ["night", "verdict", "facts"]
        found: dict[str, Any] = self._table.select(columns).slice(row, 1).to_pylist()[0]
        return found
