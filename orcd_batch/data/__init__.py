"""Parquet in, Parquet out: streamed rows, committed parts, and the manifest beside the results.

The names are loaded on first use, so that importing the package does not import pyarrow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orcd_batch.data.columns import DatasetOptions
    from orcd_batch.data.dataset import InputDataset, InputRow
    from orcd_batch.data.first_rows import preview
    from orcd_batch.data.manifest import read_manifest
    from orcd_batch.data.part_store import PartStore
    from orcd_batch.data.results import SampleResult

__all__ = [
    "DatasetOptions",
    "InputDataset",
    "InputRow",
    "PartStore",
    "SampleResult",
    "preview",
    "read_manifest",
]

_HOMES = {
    "DatasetOptions": "columns",
    "InputDataset": "dataset",
    "InputRow": "dataset",
    "PartStore": "part_store",
    "SampleResult": "results",
    "preview": "first_rows",
    "read_manifest": "manifest",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
