"""The report's page in a real browser: nothing is fetched, and it fits a phone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import Browser, open_browser, require_browser
from support.made_runs import made_run, made_sweep

from orcd_batch.reproducibility.report import report
from orcd_batch.reproducibility.report_contents import contents
from orcd_batch.reproducibility.report_html import write_page

PHONE, DESKTOP = (390, 844), (1280, 900)
NASTY = (
    '<img src="http://evil.example/x.png" onerror="window.hacked=1">',
    "<script>window.hacked=1</script>",
    "word" * 200,
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = require_browser()
    with open_browser(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One page of each kind."""
    root = tmp_path_factory.mktemp("pages")
    sweep = made_sweep(root / "sweep", prompts=NASTY, ids=NASTY, unfinished=[(0.7, 2)])
    one = made_run(root / "one" / "completions.parquet", NASTY, 1, num_samples=3)
    two = made_run(root / ("long name " * 12) / "completions.parquet", NASTY, 2)
    named = {"sweep": [str(sweep)], "run": [one], "runs": [one, two]}
    return {
        name: write_page(contents(report(runs)), root / f"page {name}").page
        for name, runs in named.items()
    }


@pytest.mark.parametrize("kind", ["sweep", "run", "runs"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", [PHONE, DESKTOP])
def test_a_page_fits_its_window_and_asks_for_nothing(
    browser: Browser, pages: dict[str, Path], kind: str, scheme: str, window: tuple[int, int]
) -> None:
    browser.open(pages[kind].as_uri(), *window, scheme)
    assert browser.evaluate("document.scrollingElement.scrollWidth") <= window[0]
    assert browser.evaluate("innerWidth") == window[0]
    assert [url for url in browser.requested if not url.startswith("data:")] == [
        pages[kind].as_uri()
    ]
    complaints = [e for e in browser.events if e.get("method") == "Log.entryAdded"]
    assert complaints == []


@pytest.mark.parametrize("kind", ["sweep", "run", "runs"])
def test_a_page_shows_its_headings_and_runs_nobody_s_script(
    browser: Browser, pages: dict[str, Path], kind: str
) -> None:
    browser.open(pages[kind].as_uri(), *PHONE)
    shown = browser.evaluate(
        "[...document.querySelectorAll('h1, h2')].filter(h => h.offsetHeight > 0)"
        ".map(h => h.textContent)"
    )
    expected = {
        "sweep": ["Sweep sweep", "Seeds and temperature", "Jobs", "To read", "What ran"],
        "run": ["Run one", "Rows", "Time and memory", "To read", "What ran"],
        "runs": ["2 runs side by side", "Results", "Agreement", "To read", "What ran"],
    }
    assert shown == expected[kind]
    assert browser.evaluate("window.hacked === undefined")
    assert browser.evaluate("document.scripts.length + document.images.length") == 0
    assert NASTY[1] in browser.evaluate("document.body.innerText")


def test_dark_is_dark_and_light_is_light(browser: Browser, pages: dict[str, Path]) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        browser.open(pages["sweep"].as_uri(), *PHONE, scheme)
        colour = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        grounds[scheme] = sum(int(part) for part in colour[4:-1].split(","))
    assert grounds["light"] > 600 > 150 > grounds["dark"]


def test_wide_tables_scroll_inside_their_box(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["sweep"].as_uri(), *PHONE)
    wider = browser.evaluate(
        "[...document.querySelectorAll('.scroll')]"
        ".filter(box => box.scrollWidth > box.clientWidth).length"
    )
    assert wider >= 1


def test_a_page_reads_well_enough_to_be_pictured(
    browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    browser.open(pages["run"].as_uri(), *PHONE)
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
    sizes = browser.evaluate(
        "[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)"
        ".filter(h => h > 0)"
    )
    assert not sizes or min(sizes) >= 8
