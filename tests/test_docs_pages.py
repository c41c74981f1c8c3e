"""The code in the docs runs as it stands there, and prints what stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
from support.doc_blocks import blocks_of, run, working_directory
from support.paths import REPO_ROOT

PAGES = {"python_api": (), "reading_results": ("duckdb", "polars")}
# It begins with a run and a sweep of the real model, twenty seconds of two cores.
RUN = ["python_api", pytest.param("reading_results", marks=pytest.mark.slow)]


def cells(text: str) -> list[str]:
    """The text without rules and frames, which differ between versions of a library."""
    return re.sub(r"[─-╿]", " ", text).split()


@pytest.mark.parametrize("name", RUN)
def test_a_page_s_code_prints_what_the_page_says(
    name: str, real_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in PAGES[name]:
        pytest.importorskip(package, reason=f"{package} is not installed; the extra [dev] has it")
    monkeypatch.chdir(working_directory(tmp_path, real_model))
    names: dict[str, Any] = {}
    found = blocks_of((REPO_ROOT / "docs" / f"{name}.md").read_text())
    assert len([block for block in found if block.printed]) >= 5
    for block in found:
        printed = run(block, names, tmp_path)
        if block.printed is not None:
            assert cells(printed) == cells(block.printed), f"docs/{name}.md, line {block.line}"


@pytest.mark.parametrize("name", [*PAGES, "reports"])
def test_a_page_links_to_pages_that_exist(name: str) -> None:
    page = REPO_ROOT / "docs" / f"{name}.md"
    links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
