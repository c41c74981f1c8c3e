"""Which input columns mean what: the prompt, the id, the sampling overrides, what is kept."""

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from orcd_batch.data.parquet_file import is_text
from orcd_batch.data.results import COMPUTED_NAMES
from orcd_batch.data.sampling_values import SAMPLING_NAMES, check_sampling_type
from orcd_batch.errors import InputError

InputKind = Literal["prompt", "messages", "token_ids"]


@dataclass(frozen=True, slots=True)
class DatasetOptions:
    """How to read the input and name the output's columns.

    prompt_column, messages_column, token_ids_column: exactly one of them is read; the default
    name is used when there is such a column, None turns one off. id_column: None takes `id` when
    there is one, else the row's index; "" always takes the index. sampling_columns: columns that
    override the sampling options of their row. drop_columns: input columns left out of the
    output. output_prefix: put before the name of every computed column. limit: first rows only.
    """

    prompt_column: str | None = "prompt"
    messages_column: str | None = "messages"
    token_ids_column: str | None = "token_ids"
    id_column: str | None = None
    sampling_columns: Sequence[str] = ()
    drop_columns: Sequence[str] = ()
    output_prefix: str = ""
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Columns:
    """The roles of an input's columns.

    kind: which of the three inputs is read, from the column `input`. id: the id column, or None
    for the row's index. sampling: columns that override. kept: columns that go to the output.
    output_id: the output's id column; it is the input's own when it is among `kept`.
    """

    kind: InputKind
    input: str
    id: str | None
    sampling: tuple[str, ...]
    kept: tuple[str, ...]
    output_id: str

    @property
    def read(self) -> tuple[str, ...]:
        """The columns that running a row needs, each once."""
        names = (self.input, *((self.id,) if self.id is not None else ()), *self.sampling)
        return tuple(dict.fromkeys(names))


def choose_columns(schema: Any, options: DatasetOptions) -> Columns:
    """Finds every column's role in a pyarrow schema, before any row is read.

    Raises InputError with one sentence for a missing, ambiguous, ill-typed or colliding column.
    """
    repeated = [name for name, count in Counter(schema.names).items() if count > 1]
    if repeated:
        raise InputError(
            f"The input has several columns named {listed(repeated[:1])}: rename them in the file."
        )
    kind, column = _input_column(schema, options)
    id_column = _id_column(schema, options)
    for name in options.sampling_columns:
        _check_sampling_name(name)
        _check_exist(schema, "dataset.sampling_columns", [name])
        check_sampling_type(name, schema.field(name).type)
    _check_exist(schema, "dataset.drop_columns", options.drop_columns)
    kept = tuple(name for name in schema.names if name not in set(options.drop_columns))
    output_id = options.output_prefix + "id"
    _check_collisions(kept, id_column, options.output_prefix)
    return Columns(kind, column, id_column, tuple(options.sampling_columns), kept, output_id)


def _input_column(schema: Any, options: DatasetOptions) -> tuple[InputKind, str]:
    """A name other than the default is the user's own choice and wins over the defaults."""
    wanted: dict[InputKind, str | None] = {
        "prompt": options.prompt_column,
        "messages": options.messages_column,
        "token_ids": options.token_ids_column,
    }
    named = {kind: name for kind, name in wanted.items() if name is not None and name != kind}
    for kind, name in named.items():
        _check_exist(schema, f"dataset.{kind}_column", [name])
    defaults = {kind: kind for kind, name in wanted.items() if name in schema.names}
    chosen = named or defaults
    if not chosen:
        looked_for = ", ".join(name for name in wanted.values() if name is not None)
        raise InputError(
            f"The input has none of the columns {looked_for or '(all three are turned off)'}; "
            f"it has {listed(schema.names)}: name one with dataset.prompt_column, "
            "dataset.messages_column or dataset.token_ids_column."
        )
    if len(chosen) > 1:
        off = " ".join(f"dataset.{kind}_column=null" for kind in list(chosen)[1:])
        raise InputError(
            f"The input has several columns to run, {', '.join(chosen.values())}: choose one by "
            f"turning the others off, such as {off}."
        )
    kind, name = next(iter(chosen.items()))
    _check_input_type(kind, name, schema.field(name).type)
    return kind, name


def _check_input_type(kind: InputKind, name: str, data_type: Any) -> None:
    good = pa.types.is_null(data_type)
    if kind == "prompt":
        good = good or is_text(data_type)
        expected = "string"
    elif kind == "messages":
        good = good or (_is_list(data_type) and _is_message(data_type.value_type))
        expected = "list<struct<role: string, content: string>>"
    else:
        good = good or (_is_list(data_type) and pa.types.is_integer(data_type.value_type))
        expected = "list<int32>"
    if not good:
        raise InputError(
            f"The column {name} has type {data_type} where dataset.{kind}_column needs {expected}: "
            "convert it, or name another column."
        )


def _id_column(schema: Any, options: DatasetOptions) -> str | None:
    name = options.id_column
    if name == "" or (name is None and "id" not in schema.names):
        return None
    if name is None:
        name = "id"
    _check_exist(schema, "dataset.id_column", [name])
    data_type = schema.field(name).type
    checks = (is_text, pa.types.is_integer, pa.types.is_null)
    if not any(check(data_type) for check in checks):
        raise InputError(
            f"The id column {name} has type {data_type} where a string or an integer is needed: "
            "name another with dataset.id_column, or use the row's index with "
            "dataset.id_column=''."
        )
    return name


def _check_sampling_name(name: str) -> None:
    if name not in SAMPLING_NAMES:
        near = difflib.get_close_matches(name, SAMPLING_NAMES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(SAMPLING_NAMES)}."
        raise InputError(f"dataset.sampling_columns cannot override {name}: {hint}")


def _check_collisions(kept: Sequence[str], id_column: str | None, prefix: str) -> None:
    computed = {prefix + name for name in COMPUTED_NAMES}
    clashes = [name for name in kept if name in computed]
    if id_column == prefix + "id" and id_column in clashes:
        clashes.remove(id_column)
    if clashes:
        raise InputError(
            f"The input's columns {', '.join(clashes)} have the names of output columns: leave "
            f"them out with 'dataset.drop_columns=[{','.join(clashes)}]', or rename the output's "
            "with dataset.output_prefix=new_."
        )


def _check_exist(schema: Any, option: str, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in schema.names]
    if missing:
        near = difflib.get_close_matches(missing[0], schema.names, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(
            f"{option} names the column {missing[0]}, which the input lacks{hint}: "
            f"it has {listed(schema.names)}."
        )


def listed(names: Sequence[str]) -> str:
    """Column names for a sentence; those that would break a line are quoted."""
    shown = [name if name.isprintable() else repr(name) for name in names]
    return ", ".join(shown) or "no columns"


def _is_list(data_type: Any) -> bool:
    types = pa.types
    checks = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view)
    return any(check(data_type) for check in checks)


def _is_message(data_type: Any) -> bool:
    if pa.types.is_map(data_type):
        return is_text(data_type.key_type)
    names = {field.name for field in data_type} if pa.types.is_struct(data_type) else set()
    return {"role", "content"} <= names
