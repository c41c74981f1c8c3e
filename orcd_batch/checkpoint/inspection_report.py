"""An inspection for people (terminal tables, a Markdown report) and for programs (JSON)."""

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from orcd_batch.checkpoint.inspection import Inspection
from orcd_batch.checkpoint.inspection_sections import Section, sections, shown

if TYPE_CHECKING:
    from rich.console import RenderableType

# An underscore inside a word is no emphasis and stays readable.
_MARKDOWN_SPECIALS = re.compile(r"([\\`*\[\]<|~&]|\b_|_\b)")


def render_terminal(inspection: Inspection) -> "RenderableType":
    """Tables for `rich.console.Console.print`; nothing in the file is taken as markup."""
    from rich.console import Group

    return Group(*(_terminal_table(section) for section in sections(inspection)))


def _terminal_table(section: Section) -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(section.title), title_justify="left", expand=False)
    for index, column in enumerate(section.columns):
        justify: Any = "right" if index in section.numbers else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for row in section.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def render_markdown(inspection: Inspection) -> str:
    """A report in GitHub's Markdown, ending in a newline; what the file says is escaped."""
    parts = [f"# {_escaped(shown(inspection.name or inspection.path))}"]
    for section in sections(inspection):
        rule = ["---:" if i in section.numbers else "---" for i in range(len(section.columns))]
        lines = [section.columns, tuple(rule)]
        lines += [tuple(_escaped(cell) for cell in row) for row in section.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"## {_escaped(section.title)}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    return _MARKDOWN_SPECIALS.sub(r"\\\1", text)


def as_json(inspection: Inspection) -> dict[str, Any]:
    """Everything as a dict that `json.dumps(allow_nan=False)` takes; sizes in bytes."""
    return {"runnable": inspection.runnable, **asdict(inspection)}
