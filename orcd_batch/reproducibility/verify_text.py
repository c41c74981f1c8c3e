"""A comparison as a short text for the terminal."""

from typing import TYPE_CHECKING, Any

from orcd_batch.data.manifest import shortened

if TYPE_CHECKING:
    from orcd_batch.reproducibility.verify import Comparison, RowDifference

_MAX_ROWS = 10
_MAX_FIELDS = 30


def render(comparison: "Comparison") -> Any:
    """A rich renderable: the verdict, the counts, the first differences, and what explains them."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [Text(_verdict(comparison), style="bold"), Text(_counts(comparison))]
    if comparison.differing:
        parts.append(_differences_table(comparison))
    for side, other, rows, number in (
        ("A", "B", comparison.only_a, comparison.num_only_a),
        ("B", "A", comparison.only_b, comparison.num_only_b),
    ):
        if number:
            names = ", ".join(f"{row_id!r} sample {sample}" for row_id, sample in rows[:_MAX_ROWS])
            more = f" and {number - _MAX_ROWS:,} more" if number > _MAX_ROWS else ""
            parts.append(Text(f"In {side} but not in {other}: id {names}{more}"))
    parts.append(_manifest_table(comparison))
    return Group(*parts)


def explanation(comparison: "Comparison", a: str = "A", b: str = "B") -> str:
    """The comparison as one sentence without its end: how many rows, which kind, the first of them.

    a, b: what the two sides are called.
    """
    if comparison.equal:
        return f"all {comparison.num_equal:,} rows are equal, tokens and numerics, bit for bit"
    counts = (
        (comparison.num_tokens_differ, "differ in tokens"),
        (comparison.num_numerics_differ, "differ in numerics only"),
        (comparison.num_only_a, f"are only in {a}"),
        (comparison.num_only_b, f"are only in {b}"),
    )
    found = [
        f"{number:,} of {_rows(comparison):,} rows {what}" for number, what in counts if number
    ]
    first = (
        f"; the first is {_first(comparison.differing[0], a, b)}" if comparison.differing else ""
    )
    return ", ".join(found) + first


def _rows(comparison: "Comparison") -> int:
    return comparison.num_rows_a + comparison.num_only_b


def _first(row: "RowDifference", a: str, b: str) -> str:
    """One differing row: its id, the position, what is there on each side, and how close it was."""
    name = f"id {row.id!r}" + (f" sample {row.sample_index}" if row.sample_index else "")
    if row.kind == "error":
        return f"{name}: {row.error_a or 'ran'} in {a}, {row.error_b or 'ran'} in {b}"
    if row.kind == "prompt":
        return f"{name}: the prompts' tokens differ"
    margins = f"margin {_shown(row.margin_a)} in {a}, {_shown(row.margin_b)} in {b}"
    if row.kind == "numerics":
        return f"{name}: same tokens, other logits from position {row.position} on ({margins})"
    tokens = f"{_shown(row.token_a)} in {a}, {_shown(row.token_b)} in {b}"
    before = row.numerics_position
    since = f"; other logits since position {before}" if before not in (None, row.position) else ""
    return f"{name}: token {tokens} at position {row.position} ({margins}{since})"


def _verdict(comparison: "Comparison") -> str:
    if comparison.equal:
        return f"Equal: all {comparison.num_equal:,} rows, tokens and numerics, bit for bit."
    return f"Different: {comparison.a} (A) and {comparison.b} (B)."


def _counts(comparison: "Comparison") -> str:
    counts = (
        (comparison.num_equal, "equal"),
        (comparison.num_tokens_differ, "with different tokens"),
        (comparison.num_numerics_differ, "with the same tokens and different numerics"),
        (comparison.num_only_a, "only in A"),
        (comparison.num_only_b, "only in B"),
    )
    return "Rows: " + ", ".join(f"{number:,} {what}" for number, what in counts) + "."


def _differences_table(comparison: "Comparison") -> Any:
    from rich.table import Table
    from rich.text import Text

    total = comparison.num_tokens_differ + comparison.num_numerics_differ
    shown = comparison.differing[:_MAX_ROWS]
    table = Table(title=f"First differences ({len(shown)} of {total:,} rows)", title_justify="left")
    for name in ("id", "sample", "what", "at token", "A", "B", "margin A", "margin B"):
        table.add_column(name, justify="left" if name in ("id", "what", "A", "B") else "right")
    for row in shown:
        table.add_row(*(Text(cell) for cell in _cells(row)))
    return table


def _cells(row: "RowDifference") -> list[str]:
    a, b = _shown(row.token_a), _shown(row.token_b)
    if row.kind == "error":
        a, b = row.error_a or "ran", row.error_b or "ran"
    margins = [_shown(row.margin_a), _shown(row.margin_b)]
    return [
        f"{row.id!r:.40}",
        str(row.sample_index),
        row.kind,
        _shown(row.position),
        a,
        b,
        *margins,
    ]


def _shown(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _manifest_table(comparison: "Comparison") -> Any:
    from rich.table import Table
    from rich.text import Text

    found = comparison.manifest_differences
    if not found:
        return Text("The manifests agree in everything that could explain a difference.")
    title = "Manifest fields that differ" + ("" if comparison.equal else " and could explain it")
    table = Table(title=title, title_justify="left")
    for name in ("field", "A", "B"):
        table.add_column(name)
    for name, ours, theirs in found[:_MAX_FIELDS]:
        table.add_row(Text(name), Text(shortened(ours)), Text(shortened(theirs)))
    if len(found) > _MAX_FIELDS:
        table.add_row(f"… {len(found) - _MAX_FIELDS} more")
    return table
