"""debug=true on the numpy engine: every op in the table, not one bit changed."""

from pathlib import Path

import pytest
from support.gguf_factory import write_model

from orcd_batch.backend.op_times import TIMED_OPS, OpSums, as_lines
from orcd_batch.backend.ops import Ops
from orcd_batch.checkpoint import GGUFFile, read_model_config
from orcd_batch.config import EngineOptions
from orcd_batch.engine import Request, SamplingParams
from orcd_batch.engine_factory import OpenModel, build_engine, choose_engine


def test_every_op_of_a_step_is_timed_in_the_protocols_order() -> None:
    methods = [name for name, value in vars(Ops).items() if callable(value)]
    first, last = methods.index("place"), methods.index("sample")
    assert list(TIMED_OPS) == methods[first : last + 1]


def test_under_debug_every_op_is_timed_and_no_bit_changes(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_model(path, num_layers=2, hidden_size=64, num_heads=2, num_kv_heads=1,
                intermediate_size=64, context_length=64)  # fmt: skip
    found, tables = [], []
    for debug in (False, True):
        with GGUFFile.open(path) as gguf:
            model = OpenModel(gguf, read_model_config(gguf))
            options = EngineOptions(kind="numpy")
            with build_engine(model, options, choose_engine("numpy"), debug=debug) as built:
                for index in range(3):
                    params = SamplingParams(max_tokens=5)
                    built.engine.add(Request(index, (5, 6, 7 + index), params))
                done = []
                while built.engine.has_unfinished:
                    done += built.engine.step()
                tables.append(built.describe()["backend"].get("op_times"))
        found.append(sorted((d.key, tuple(d.token_ids), tuple(d.fingerprints)) for d in done))
    assert found[0] == found[1]
    assert tables[0] is None
    assert list(tables[1]) == list(TIMED_OPS)
    steps = tables[1]["sample"]["calls"]
    assert tables[1]["attention"]["calls"] == 2 * steps
    assert tables[1]["linear"]["calls"] == tables[1]["gated_linear"]["calls"] == 2 * steps
    assert tables[1]["linear_add"]["calls"] == 2 * 2 * steps
    assert tables[1]["logits"]["calls"] == steps


def test_the_table_sums_calls_and_the_log_puts_the_dearest_first() -> None:
    sums = OpSums()
    for name, seconds in (("linear", 0.5), ("sample", 0.25), ("linear", 2.25)):
        sums.add(name, seconds)
    table = sums.table()
    assert table["linear"] == {"calls": 2, "seconds": 2.75, "us_per_call": 1375000.0}
    first, second = as_lines(table)
    assert (first.split()[0], first.split()[-1]) == ("linear", "91.7%")
    assert (second.split()[0], second.split()[-1]) == ("sample", "8.3%")


@pytest.mark.parametrize("clear", [True, False])
def test_what_was_summed_can_be_forgotten(clear: bool) -> None:
    sums = OpSums()
    sums.add("linear", 1.0)
    if clear:
        sums.clear()
    assert bool(sums.table()) is not clear
