"""While rows are run, Python's collector looks at little; afterwards it is as before."""

import gc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.gguf_factory import write_model

from orcd_batch.collector import relax_collector, relaxed_collector
from orcd_batch.config import EngineOptions, JobOptions, ModelOptions, SamplingOptions
from orcd_batch.generation import Generation
from orcd_batch.job import run_job


def test_the_collector_is_relaxed_and_then_as_before() -> None:
    before = gc.get_threshold(), gc.get_freeze_count()
    restore = relax_collector()
    try:
        assert gc.get_threshold()[0] > before[0][0]
        assert gc.get_freeze_count() > before[1]
    finally:
        restore()
    assert gc.get_threshold() == before[0]
    assert gc.get_freeze_count() == 0


def test_a_job_runs_its_rows_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_model(tmp_path / "tiny.gguf", num_layers=1, hidden_size=64, num_heads=2,
                num_kv_heads=1, intermediate_size=64, context_length=128)  # fmt: skip
    pq.write_table(pa.table({"prompt": ["one", "two"]}), "in.parquet")
    options = JobOptions(
        model=ModelOptions("tiny", "tiny.gguf", architectures=["llama"], chat=False),
        sampling=SamplingOptions(max_tokens=2),
        engine=EngineOptions("numpy", num_threads=1),
        data=["in.parquet"],
        output="out.parquet",
    )
    before, meanwhile = gc.get_threshold(), list[tuple[int, ...]]()
    run = Generation.run

    def watched(self: Generation, *arguments: Any) -> None:
        meanwhile.append(gc.get_threshold())
        run(self, *arguments)

    monkeypatch.setattr(Generation, "run", watched)
    run_job(options, tmp_path)
    assert [threshold[0] > before[0] for threshold in meanwhile] == [True]
    assert gc.get_threshold() == before


def test_it_is_as_before_after_an_error_too() -> None:
    before = gc.get_threshold()
    with pytest.raises(ZeroDivisionError), relaxed_collector():
        raise ZeroDivisionError
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0
