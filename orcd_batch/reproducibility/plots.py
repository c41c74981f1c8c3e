"""Drawing with matplotlib: small figures that read on a phone, as themed SVG and as PNG."""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from orcd_batch.reproducibility.report_page import Figure, plain

MISSING = "matplotlib is not installed, so there are no plots: pip install 'orcd-batch[report]'."

# One inch is 72 units of the SVG: 5 inches are a phone's width, so text keeps its size there.
WIDTH_INCHES = 5.0
_PNG_DPI = 200


@dataclass(frozen=True, slots=True)
class Palette:
    """Colours by role: ink for text, quiet for axes, line for grids, series for data."""

    ink: str
    quiet: str
    line: str
    card: str
    good: str
    bad: str
    series: tuple[str, ...]


_PNG = Palette(
    ink="#1a1f26",
    quiet="#545d6a",
    line="#d5dae1",
    card="#ffffff",
    good="#116329",
    bad="#a40e26",
    series=("#2f5fd0", "#c2500a", "#0f7b6c", "#8a3ea8", "#b3255f", "#5d6b1c"),
)
# Stand-ins that become the page's own variables, so that a drawing follows light and dark.
_SVG = Palette(
    ink="#010aa1",
    quiet="#010aa2",
    line="#010aa3",
    card="#010aa4",
    good="#010aa5",
    bad="#010aa6",
    series=("#010ab1", "#010ab2", "#010ab3", "#010ab4", "#010ab5", "#010ab6"),
)
_VARIABLES = {
    **{getattr(_SVG, name): name for name in ("ink", "quiet", "line", "card", "good", "bad")},
    **{colour: f"s{number}" for number, colour in enumerate(_SVG.series, 1)},
}
_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "lines.linewidth": 2,
    "legend.frameon": False,
}

Draw = Callable[[Any, Palette], None]


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def figure(name: str, title: str, alt: str, draw: Draw, height_inches: float = 3.0) -> Figure:
    """A figure of one plot. name: of the PNG file. draw: fills the axes it is given."""
    svg = _drawn(draw, _SVG, height_inches, format="svg", metadata=_no_metadata())
    png = _drawn(draw, _PNG, height_inches, format="png", dpi=_PNG_DPI)
    return Figure(title, alt, _inline(svg.decode(), name, alt), png, name)


def label(text: object, most: int = 28) -> str:
    """Text for an axis or legend: one short line."""
    line = " ".join(plain(text).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def _no_metadata() -> dict[str, None]:
    return dict.fromkeys(("Creator", "Date", "Format", "Type"))


def _drawn(draw: Draw, palette: Palette, height: float, **save: Any) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    style: Any = {
        **_STYLE,
        "text.color": palette.ink,
        "axes.labelcolor": palette.quiet,
        "axes.edgecolor": palette.line,
        "axes.facecolor": palette.card,
        "figure.facecolor": palette.card,
        "grid.color": palette.line,
        "xtick.color": palette.quiet,
        "ytick.color": palette.quiet,
        "svg.hashsalt": "orcd_batch",
    }
    sink = io.BytesIO()
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the page's own font has it
        canvas = Canvas(figsize=(WIDTH_INCHES, height), layout="constrained")
        draw(canvas.add_subplot(), palette)
        canvas.savefig(sink, **save)
    return sink.getvalue()


def _inline(svg: str, name: str, alt: str) -> str:
    """The drawing as an element of a page: own ids, the page's colours, a name for readers."""
    from markupsafe import escape

    body = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="([-0-9. ]+)"', body)
    assert box is not None, "matplotlib writes a viewBox"
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(xlink:)?href="#', f'href="#{name}-', body)
    body = body.replace("url(#", f"url(#{name}-")
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    content = body[body.index(">") + 1 :]
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(alt)}">{content}'


def rows_height(count: int, each: float = 0.42, least: float = 1.8) -> float:
    """Inches for a plot with so many rows."""
    return max(least, 0.9 + each * count)


def spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the values, evenly chosen, first and last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
