"""A report as headings, tables, figures and notices: one content for HTML and terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from orcd_batch.reproducibility.report_template import STYLE, TEMPLATE


@dataclass(frozen=True, slots=True)
class Fact:
    """A key figure: a large value under a short name. note: what to compare it with."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Notice:
    """A sentence that must not be missed. kind: "good", "warning" or "bad"."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are shown as text. numeric: columns set flush right. folded: closed at first."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()
    note: str = ""
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot. svg: our own drawing, put into the page as it is. alt: what it shows, in words."""

    title: str
    alt: str
    svg: str
    png: bytes
    name: str


@dataclass(frozen=True, slots=True)
class Reading:
    """One prompt and what became of it: (label, completion) pairs."""

    prompt: str
    completions: Sequence[tuple[str, str]]


@dataclass(slots=True)
class Section:
    """A heading and what stands under it, in this order."""

    title: str
    intro: str = ""
    notices: list[Notice] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)


@dataclass(slots=True)
class Page:
    """The whole report. subtitle: model, device and the like, in one line."""

    title: str
    subtitle: str
    facts: list[Fact] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)

    @property
    def figures(self) -> Iterator[Figure]:
        for section in self.sections:
            yield from section.figures


def render_html(page: Page) -> str:
    """One HTML document that loads nothing: style and drawings are inside. All text is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE).render(
        page=page, style=STYLE, plain=plain, signs=_SIGNS
    )


# Colour alone must not carry the meaning.
_SIGNS = {"good": "✓", "warning": "▲", "bad": "✗"}


def render_terminal(page: Page) -> Any:
    """A rich renderable: the page's notices and tables; figures are named in the HTML only."""
    from rich.console import Group
    from rich.text import Text

    facts = "  ·  ".join(f"{fact.name} {fact.value}" for fact in page.facts)
    parts: list[Any] = [Text(plain(page.title), style="bold"), Text(plain(page.subtitle))]
    parts += [Text(plain(facts))] if facts else []
    parts += [_notice(notice) for notice in page.notices]
    for section in page.sections:
        parts += [_notice(notice) for notice in section.notices]
        parts += [_rich_table(table) for table in section.tables if not table.folded]
    return Group(*parts)


def plain(text: object) -> str:
    """Text without control characters, which could steer a terminal or be invalid in HTML."""
    return "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in str(text)
    )


def _notice(notice: Notice) -> Any:
    from rich.text import Text

    styles = {"good": "green", "warning": "yellow", "bad": "bold red"}
    return Text(f"{_SIGNS[notice.kind]} {plain(notice.text)}", style=styles[notice.kind])


def _rich_table(table: Table) -> Any:
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(title=Text(table.title, style="bold"), title_justify="left")
    for index, name in enumerate(table.columns):
        shown.add_column(
            Text(plain(name)),
            overflow="fold",
            justify="right" if index in table.numeric else "left",
        )
    for row in table.rows:
        shown.add_row(*(Text(plain(cell)) for cell in row))
    return shown
