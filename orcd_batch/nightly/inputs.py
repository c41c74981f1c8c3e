"""The input of a check's variations: the same rows in another order, or one of them alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orcd_batch.config import DatasetOptions, JobOptions
from orcd_batch.data import InputDataset
from orcd_batch.nightly.plan import Variation

# Ids of an input without any: a row's index, which is its id there.
_INDEX_COLUMN = "orcd_row"


class InputVariations:
    """Writes Parquet files of the input's rows, each row keeping its id, into one folder."""

    def __init__(self, dataset: InputDataset, options: JobOptions, folder: Path) -> None:
        self._dataset, self._options, self._folder = dataset, options, folder

    @property
    def num_rows(self) -> int:
        """Input rows."""
        return self._dataset.num_rows

    def options_of(self, variation: Variation) -> JobOptions:
        """The job's options with what the variation replaces; its input is written when needed."""
        options = self._options
        if variation.engine:
            options = replace(options, engine=replace(options.engine, **variation.engine))
        if variation.replicas is not None:
            workers = replace(options.scale_out, kind="ray", replicas=variation.replicas)
            options = replace(options, scale_out=workers)
        if variation.order is None and variation.row is None:
            return options
        path = self._write(variation)
        return replace(options, data=[str(path)], dataset=self._dataset_options())

    def _dataset_options(self) -> DatasetOptions:
        columns = self._dataset.columns
        return replace(
            self._options.dataset,
            id_column=columns.id or _INDEX_COLUMN,
            drop_columns=[],
            limit=None,
        )

    def _write(self, variation: Variation) -> Path:
        table = self._rows()
        if variation.row is not None:
            table = table.slice(variation.row, 1)
        else:
            shuffle = np.random.default_rng(variation.order).permutation(table.num_rows)
            table = table.take(shuffle)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{variation.name}.parquet"
        pq.write_table(table, path)
        return path

    def _rows(self) -> pa.Table:
        columns = self._dataset.columns
        schema = pa.schema([self._dataset.schema.field(name) for name in columns.read])
        batches = [batch for _, batch in self._dataset.batches(columns.read)]
        table = pa.Table.from_batches(batches, schema)
        if columns.id is None:
            table = table.append_column(_INDEX_COLUMN, pa.array(range(table.num_rows), pa.int64()))
        return table
