"""What driver and workers tell each other arrives as it was, and costs no looking for garbage."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from orcd_batch.data import InputRow, SampleResult
from orcd_batch.data.part_file import part_batch
from orcd_batch.scale_out.messages import packed, unpacked
from orcd_batch.scale_out.runner import RowBatch

texts = st.none() | st.text(max_size=6)
rows = st.builds(
    InputRow,
    index=st.integers(0, 2**40),
    id=st.integers(-(2**63), 2**64 - 1) | st.text(max_size=6),
    prompt=texts,
    messages=st.none() | st.lists(st.fixed_dictionaries({"role": texts, "content": texts})),
    token_ids=st.none() | st.lists(st.integers(0, 9)).map(tuple),
    overrides=st.dictionaries(st.sampled_from(["n", "seed", "stop"]), st.integers(0, 9)),
    error=texts,
)


@given(st.lists(st.tuples(rows, st.frozensets(st.integers(0, 3))), min_size=1, max_size=6))
def test_rows_arrive_as_they_were_sent(sent: list[tuple[InputRow, Any]]) -> None:
    assert unpacked(packed(sent)) == sent


def test_a_row_is_refused_for_any_of_its_samples_and_told_once() -> None:
    good = SampleResult(3, 0, 7, "a", [1], "stop", 1, 1, -0.5, [-0.5], [0.1], [11], "t", "n")
    results = [
        good,
        SampleResult.failed(3, 1, 7, "not finite", "input"),
        SampleResult.failed(4, 0, "x", "too long", "input"),
        SampleResult.failed(4, 1, "x", "too long", "input"),
    ]
    batch = RowBatch(0, part_batch(results))
    assert batch.refused == [(3, 7, "not finite"), (4, "x", "too long")]
    assert RowBatch(0, part_batch([good])).refused == []
