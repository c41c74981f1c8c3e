"""Sampling parameters read from columns: which types a column may have, and one row's values."""

import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from orcd_batch.data.parquet_file import is_text
from orcd_batch.data.row_values import BadCell
from orcd_batch.errors import InputError

_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
_MAXIMA = {"top_k": 2**31 - 1, "seed": 2**64 - 1, "max_tokens": 2**31 - 1, "n": 2**31 - 1}
SAMPLING_NAMES = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("seed", "max_tokens", "stop", "n"),
)


def check_sampling_type(name: str, data_type: Any) -> None:
    """Raises InputError when no value of this pyarrow type could serve as the parameter."""
    types = pa.types
    if types.is_dictionary(data_type):
        data_type = data_type.value_type
    if name == "stop":
        is_list = types.is_list(data_type) or types.is_large_list(data_type)
        good = is_text(data_type.value_type) if is_list else is_text(data_type)
        expected = "a string or a list of strings"
    else:
        good = (
            types.is_integer(data_type)
            or types.is_floating(data_type)
            or types.is_decimal(data_type)
        )
        expected = "a number"
    if not (good or types.is_null(data_type)):
        raise InputError(
            f"The sampling column {name} has type {data_type} where {expected} is needed: "
            "convert it, or leave it out of dataset.sampling_columns."
        )


def overrides_of(values: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """One row's overrides without its nulls, and the reason when a value cannot be used.

    Numbers get their parameter's Python type; whether they are in range is checked where the
    config's own values are. A value that cannot be used is left out.
    """
    overrides: dict[str, Any] = {}
    reason: str | None = None
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, BadCell):
            reason = reason or f"The sampling column {name} {value.reason}."
            continue
        try:
            overrides[name] = _converted(name, value)
        except (TypeError, ValueError, OverflowError) as error:
            reason = reason or f"The sampling column {name} holds {value!r:.80}: {error}."
    return overrides, reason


def _converted(name: str, value: Any) -> Any:
    if name == "stop":
        strings = (value,) if isinstance(value, str) else tuple(value)
        if not all(isinstance(text, str) and text for text in strings):
            raise ValueError("stop strings must not be null or empty")
        return strings
    if not math.isfinite(value):
        raise ValueError("it must be a finite number")
    if name in _NUMBERS:
        return float(value)
    if value != int(value):
        raise ValueError("it must be a whole number")
    if name == "top_k" and value == -1:
        return 0
    if not 0 <= value <= _MAXIMA[name]:
        raise ValueError(f"it must be between 0 and {_MAXIMA[name]}")
    return int(value)
