"""The nightly page: the trend, the first drift, and what changed that night."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.browser import Browser, open_browser, require_browser

from orcd_batch.errors import InputError
from orcd_batch.reproducibility.history import History
from orcd_batch.reproducibility.plots import can_draw
from orcd_batch.reproducibility.report_nightly import (
    nightly_page,
    read_nights,
    write_nightly_report,
)
from orcd_batch.reproducibility.report_page import Table

FIRST = datetime(2026, 11, 1, 2, 30, tzinfo=UTC)


def a_night(number: int, **changes: Any) -> dict[str, Any]:
    started = FIRST + timedelta(days=number)
    return {
        "night": started.strftime("%Y-%m-%d_%H-%M-%S"),
        "started": started,
        "seconds": 100.0,
        "verdict": "pass",
        "run_hash": "1" * 64,
        "model_name": "A model",
        "model_hash": "2" * 64,
        "code_hash": "3" * 64,
        "engine": "numpy",
        "device": "a CPU",
        "versions": {"numpy": "2.4.6"},
        "tokens_per_s": 100.0 + number,
        "baseline_status": "equal",
        "num_comparisons": 3,
        "num_failed": 0,
        "facts": "{}",
        **changes,
    }


def drifted(number: int) -> dict[str, Any]:
    return a_night(
        number,
        verdict="fail",
        cause="Tokens differ from the baseline; <b>the model file</b> changed.",
        run_hash="9" * 64,
        model_hash="8" * 64,
        num_failed=1,
        failing_since=a_night(number)["night"],
        changed=[{"field": "model.tensors.x", "before": "2" * 64, "now": "8" * 64}],
        first_difference={
            **{"comparison": "baseline", "kind": "tokens", "id": "<script>1</script>"},
            **{"sample_index": 0, "position": 4, "token_a": 7, "token_b": 9},
            **{"margin_a": 0.25, "margin_b": 0.125},
        },
    )


def history_of(path: Path, nights: list[dict[str, Any]]) -> Path:
    with History(str(path)) as history:
        for night in nights:
            history.append(night)
    return path


def tables(page: Any) -> dict[str, Table]:
    return {table.title: table for section in page.sections for table in section.tables}


def test_a_drift_is_named_with_its_night_its_bits_and_what_changed(tmp_path: Path) -> None:
    nights = [*(a_night(i) for i in range(5)), drifted(5)]
    page = nightly_page(read_nights(history_of(tmp_path / "h.parquet", nights)), nights[-1])
    found = tables(page)
    (drift,) = found["Drifts"].rows
    assert drift[:4] == ("2026-11-06_02-30-00", "fail", "1" * 12, "9" * 12)
    assert drift[4] == "model.tensors.x"
    assert ("position", "4") in found["First row that differs"].rows
    assert found["What changed"].rows == [("model.tensors.x", "2" * 12, "8" * 12)]
    assert page.notices[0].kind == "bad"
    assert "Tokens differ" in page.notices[0].text


def test_a_silent_change_is_worked_out_from_the_columns(tmp_path: Path) -> None:
    changed = {"run_hash": "5" * 64, "versions": {"numpy": "2.5.0", "new": "1"}}
    nights = [a_night(0), a_night(1), a_night(2, **changed)]
    page = nightly_page(read_nights(history_of(tmp_path / "h.parquet", nights)), nights[-1])
    (drift,) = tables(page)["Drifts"].rows
    assert drift[4] == "new, numpy"


def test_good_nights_are_counted_and_compared(tmp_path: Path) -> None:
    nights = [drifted(0), *(a_night(i) for i in range(1, 5))]
    page = nightly_page(read_nights(history_of(tmp_path / "h.parquet", nights)), nights[-1])
    facts = {fact.name: (fact.value, fact.note) for fact in page.facts}
    assert facts["nights passed in a row"] == ("4", "of 5 in all")
    assert facts["comparisons equal"][0] == "3 of 3"
    assert facts["tokens/s"] == ("104.0", "+2.5 % to the last nights")
    assert page.notices[0].kind == "good"
    assert "What differs" not in [section.title for section in page.sections]


def test_this_night_is_shown_once_whether_the_history_has_it_or_not(tmp_path: Path) -> None:
    nights = [a_night(i) for i in range(3)]
    with_it = history_of(tmp_path / "with.parquet", nights)
    without = history_of(tmp_path / "without.parquet", nights[:2])
    pages = [
        write_nightly_report(path, nights[-1], tmp_path / path.stem).read_text()
        for path in (with_it, without)
    ]
    assert pages[0] == pages[1]
    assert "of 3 in all" in pages[0]


def test_the_first_night_and_an_older_history_have_a_page(tmp_path: Path) -> None:
    first = write_nightly_report(tmp_path / "none.parquet", a_night(0), tmp_path / "first")
    assert "of 1 in all" in first.read_text()
    old = pa.table({"night": ["2026-10-01"], "verdict": ["pass"]})
    pq.write_table(old, tmp_path / "old.parquet")
    page = write_nightly_report(tmp_path / "old.parquet", a_night(1), tmp_path / "second")
    assert "2026-10-01" in page.read_text()


def test_a_file_that_is_no_history_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "h.parquet")
    with pytest.raises(InputError, match="has no column night"):
        read_nights(tmp_path / "h.parquet")
    (tmp_path / "h.parquet").write_text("not Parquet")
    with pytest.raises(InputError, match="cannot be read"):
        read_nights(tmp_path / "h.parquet")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser(require_browser()) as opened:
        yield opened


def test_the_nightly_page_fits_a_phone_and_asks_for_nothing(
    browser: Browser, tmp_path: Path
) -> None:
    nights = [*(a_night(i) for i in range(40)), drifted(40)]
    comparison = {"title": "<i>order</i>", "equal": False, "num_rows": 3, "explanation": "x" * 300}
    night = nights[-1] | {"comparisons": [comparison], "skipped": [{"title": "a", "reason": "b"}]}
    path = write_nightly_report(history_of(tmp_path / "h.parquet", nights), night, tmp_path)
    for scheme in ("light", "dark"):
        browser.open(path.as_uri(), 390, 844, scheme)
        assert browser.evaluate("document.scrollingElement.scrollWidth") <= 390
        assert [u for u in browser.requested if not u.startswith("data:")] == [path.as_uri()]
    headings = browser.evaluate("[...document.querySelectorAll('h2')].map(h => h.textContent)")
    assert headings == ["What differs", "The trend", "This night", "All nights"]
    assert "<script>1</script>" in browser.evaluate("document.body.innerText")
    assert browser.evaluate("document.scripts.length") == 0
    drawings = browser.evaluate("document.querySelectorAll('svg[role=img]').length")
    assert drawings == (2 if can_draw() else 0)
