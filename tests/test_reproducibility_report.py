"""The report's contents and its page: what it says of runs, and that nobody's text gets out."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.made_runs import failed, made_run, made_sweep
from support.paths import REPO_ROOT

from orcd_batch import cli
from orcd_batch.errors import InputError
from orcd_batch.reproducibility import report_contents, report_html, report_tables
from orcd_batch.reproducibility.plots import can_draw
from orcd_batch.reproducibility.report import busy_seconds, report
from orcd_batch.reproducibility.report_page import Fact, Page, Section, Table, plain, render_html
from orcd_batch.reproducibility.report_statistics import Histogram, gather
from orcd_batch.reproducibility.run_output import RunOutput

NASTY = (
    "<script>fetch('http://evil.example/')</script>",
    '</title><img src="http://evil.example/x.png" onerror="window.hacked=1">',
    "</style><svg onload=alert(1)>{{ 7*7 }}{% raw %}",
    "--> <!-- $\\frac{1}{0}$ ]]>",
    "\x1b[31m\x00 control \u202e",
)
needs_matplotlib = pytest.mark.skipif(
    not can_draw(), reason="matplotlib is not installed; the extra [report] brings it"
)


class Reader(HTMLParser):
    """Tags, attributes and text of a page, as a browser would take them apart."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.headings: list[str] = []
        self.text = ""
        self._heading = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._heading = bool(re.fullmatch("h[1-6]", tag))
        if self._heading:
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        self._heading = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._heading:
            self.headings[-1] += data


def page_of(runs: list[str], directory: Path) -> str:
    written = report_html.write_page(report_contents.contents(report(runs)), directory)
    return written.page.read_text()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's directory."""
    return made_sweep(tmp_path_factory.mktemp("made") / "sweep")


@pytest.fixture(scope="module")
def sweep_page(sweep: Path) -> report_html.WrittenPage:
    """The sweep's page, with its pictures."""
    return report_html.write_page(report_contents.contents(report([str(sweep)])), sweep / "page")


def test_nobody_s_text_becomes_markup(tmp_path: Path) -> None:
    root = made_sweep(
        tmp_path / "<b>sweep",
        prompts=NASTY,
        ids=NASTY,
        change=lambda r: failed(r, str(r.id)) if r.id == NASTY[0] else r,
    )
    for runs in ([str(root)], [str(path) for path in sorted(root.glob("*/*.parquet"))[:2]]):
        html = page_of(runs, tmp_path / "out")
        read = Reader(html)
        assert not {"script", "img", "iframe", "object", "embed", "base", "form"} & set(read.tags)
        assert not [name for name, _ in read.attributes if name.startswith("on")]
        assert "<script>fetch('http://evil.example/')</script>" in read.text
        assert "{{ 7*7 }}" in read.text
        assert "\x00" not in html
        assert "\x1b" not in html


def test_the_page_refers_to_nothing_outside_itself(sweep_page: report_html.WrittenPage) -> None:
    html = sweep_page.page.read_text()
    read = Reader(html)
    links = [
        v for n, v in read.attributes if n in ("href", "src", "xlink:href", "srcset", "action")
    ]
    assert all(link.startswith("#") or link == "data:," for link in links), links
    assert not re.findall(r"(?:https?:)?//[a-z]", html)
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    policy = next(v for n, v in read.attributes if n == "content" and "default-src" in v)
    assert policy.startswith("default-src 'none'")


def test_the_page_has_a_sensible_outline_and_named_pictures(
    sweep_page: report_html.WrittenPage,
) -> None:
    html = sweep_page.page.read_text()
    read = Reader(html)
    assert read.headings[:2] == ["Sweep sweep", "Seeds and temperature"]
    assert read.tags.count("h1") == 1
    assert ("lang", "en") in read.attributes
    ids = [value for name, value in read.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    if can_draw():
        alts = [v for n, v in read.attributes if n == "aria-label"]
        assert read.tags.count("svg") == 5
        assert sum("pairs" in alt.lower() for alt in alts) >= 3


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_text_and_lines_stand_out_in_light_and_dark() -> None:
    from orcd_batch.reproducibility.report_template import STYLE

    blocks = re.findall(r":root \{(.*?)\}", STYLE, re.S)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        text = dict.fromkeys(("ink", "quiet", "good", "warning", "bad"), 4.5)
        for name, least in {**text, **{f"s{i}": 3.0 for i in range(1, 7)}}.items():
            for ground in ("card", "page"):
                bright = sorted(luminance(colours[n]) for n in (name, ground))
                assert (bright[1] + 0.05) / (bright[0] + 0.05) >= least, (name, ground)


@needs_matplotlib
def test_every_kind_of_report_has_its_pictures(
    sweep: Path, sweep_page: report_html.WrittenPage, tmp_path: Path
) -> None:
    jobs = [str(path) for path in sorted(sweep.glob("*/*.parquet"))]
    pages = [
        report_html.write_page(report_contents.contents(report(runs)), tmp_path / str(len(runs)))
        for runs in (jobs[:1], jobs[:3])
    ]
    expected = [
        {"length", "logprob", "margins", "time"},
        {"length", "logprob", "agreement"},
        {"together", "diversity", "length", "logprob", "agreement"},
    ]
    for written, pictures in zip([*pages, sweep_page], expected, strict=True):
        assert {path.stem for path in written.images} == pictures
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in written.images)


@needs_matplotlib
def test_pictures_take_their_colours_from_the_page(sweep_page: report_html.WrittenPage) -> None:
    html = sweep_page.page.read_text()
    drawings = re.findall(r"<svg.*?</svg>", html, re.S)
    assert all("var(--s1)" in drawing and "var(--card)" in drawing for drawing in drawings)
    assert "#010a" not in html


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    path = made_run(tmp_path / "a" / "completions.parquet", ["x", "y"])
    assert page_of([path], tmp_path / "1") == page_of([path], tmp_path / "2")


def test_without_matplotlib_the_page_has_its_tables_and_says_so(tmp_path: Path) -> None:
    root = made_sweep(tmp_path / "sweep")
    script = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'matplotlib' else find(n, *a)\n"
        f"from orcd_batch import cli; sys.exit(cli.main(['report', {str(root)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=REPO_ROOT
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["images"] == []
    read = Reader(Path(document["page"]).read_text())
    assert "pip install 'orcd-batch[report]'" in read.text
    assert "svg" not in read.tags
    assert "table" in read.tags


def test_a_run_s_report_counts_what_is_in_the_file(tmp_path: Path) -> None:
    path = made_run(
        tmp_path / "run" / "completions.parquet",
        [f"p{i}" for i in range(30)],
        change=lambda r: failed(r, "too long") if r.id == "row 7" else r,
    )
    output = RunOutput(path)
    found = gather(output)
    output.close()
    table = pq.read_table(path)
    good = [margins for margins in table["margins"].to_pylist() if margins is not None]
    assert (found.num_good, found.num_tokens) == (29, 145)
    assert found.reasons == {"too long": 1}
    assert found.margins.total == sum(map(len, good))
    assert [row.id for row in found.closest[:3]] == ["row 0", "row 1", "row 2"]
    assert found.closest[0].value == pytest.approx(0.25)
    assert (found.length_quantile(0.5), found.length_quantile(0.95)) == (5, 5)
    read = Reader(page_of([path], tmp_path / "out"))
    assert "Error rows: 1 (1 × too long)." in read.text


@given(st.lists(st.floats(-19.9, -0.01), min_size=1, max_size=200), st.floats(0.01, 0.99))
@settings(deadline=None)
def test_quantiles_are_exact_to_a_bin(values: list[float], share: float) -> None:
    histogram = Histogram(np.linspace(-20, 0, 2001))
    histogram.add(np.array(values))
    exact = np.quantile(values, share, method="inverted_cdf")
    low = np.quantile(values, max(0.0, share - 1 / len(values)), method="inverted_cdf")
    found = histogram.quantile(share)
    assert found is not None
    assert low - 0.011 <= found <= exact + 0.011


def test_an_empty_run_has_a_report(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run" / "completions.parquet", [None], change=failed)
    read = Reader(page_of([path], tmp_path / "out"))
    assert "Run run" in read.text


def test_runs_that_overlapped_are_timed_once() -> None:
    def manifest(end: str, seconds: float) -> dict[str, Any]:
        return {"statistics": {"ended": f"2026-11-21T14:{end}+00:00", "generate_s": seconds}}

    apart = [manifest("10:00", 20.5), manifest("11:00", 20.25)]
    together = [manifest("10:00", 60.0), manifest("10:01", 60.0), manifest("10:00", 60.0)]
    assert busy_seconds(apart) == 40.75
    assert busy_seconds(together) == pytest.approx(61.0)
    assert busy_seconds([{}]) is None
    group = {"generate_s": 2.5, "tokens_computed": 100}
    fused = {"statistics": {"ended": "2026-11-21T14:10:00+00:00", "group": group}}
    assert busy_seconds([fused] * 30) == pytest.approx(2.5)


def test_where_a_report_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = made_run(Path("run/completions.parquet"), ["x"])
    made_run(Path("out.parquet"), ["x"])
    assert report_html.default_directory(["run"]) == Path("run/report")
    assert report_html.default_directory(["out.parquet"]) == Path("out.report")
    several = report_html.default_directory([run, "out.parquet"])
    assert re.fullmatch(r"outputs/report-[0-9a-f]{12}", str(several))
    assert (
        report_html.default_directory(["run/../run/completions.parquet", "out.parquet"]) == several
    )


def test_a_report_that_cannot_be_written_says_where_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_run(tmp_path / "run" / "completions.parquet", ["x"])
    (tmp_path / "taken").write_text("a file")
    assert cli.main(["report", run, "-o", str(tmp_path / "taken")]) == 2
    assert "choose --output" in capsys.readouterr().err


def test_a_damaged_sweep_file_is_named(tmp_path: Path) -> None:
    root = made_sweep(tmp_path / "sweep")
    (root / "multirun.yaml").write_text("hydra: [")
    with pytest.raises(InputError, match=r"multirun\.yaml cannot be read"):
        report([str(root)])


def test_control_characters_do_not_reach_a_terminal_or_a_page() -> None:
    assert plain("a\x1b[31mb\u202e\n") == "a�[31mb�\n"
    page = Page("\x1b]0;title\x07", "", [Fact("a", "\x00")])
    page.sections.append(Section("s", tables=[Table("t", ("\x1bc",), [("\x1b[2J",)])]))
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", render_html(page))


def test_op_times_of_a_debug_run_are_shown_longest_first() -> None:
    times = {
        "linear": {"calls": 10, "seconds": 2.0, "us_per_call": 2e5},
        "attention": {"calls": 5, "seconds": 3.0, "us_per_call": 6e5},
    }
    memory = {"weights": 2_000_000}
    backend = {"op_times": times, "memory_by_use": memory}
    manifest = {"statistics": {"start_s": 1.5}, "engine": {"backend": backend}}
    statistics, ops = report_tables.resources(manifest)
    assert statistics.rows == [("start_s", "1.500 s"), ("memory: weights", "2.0 MB")]
    assert [row[0] for row in ops.rows] == ["attention", "linear"]
