"""The plots of a report over runs: each answers one question at a glance."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from orcd_batch.reproducibility.plots import Palette, figure, label, rows_height, spread
from orcd_batch.reproducibility.report_page import Figure
from orcd_batch.reproducibility.report_statistics import NEAR_TIE, RunStatistics
from orcd_batch.reproducibility.variants import VariantStatistics

MAX_LINES = 6
MAX_BOXES = 40
_MAX_NAMES = 12

_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)


def together(names: Sequence[str], found: Sequence[VariantStatistics]) -> Figure:
    """How long the variants of a prompt stay the same, one line per group."""
    lines = spread(list(zip(names, found, strict=True)), MAX_LINES)
    last = max(_last_position(variants) for _, variants in lines)

    def draw(axes: Any, palette: Palette) -> None:
        positions = np.arange(1, last + 1)
        for (name, variants), colour in zip(lines, palette.series, strict=False):
            share = 100 * variants.agreement_curve[1 : last + 1]
            axes.step(positions, share, where="post", color=colour, label=label(name))
        axes.set(xscale="log", xlabel="completion tokens", ylabel="pairs still the same, %")
        axes.set(xlim=(1, max(last, 2)), ylim=(-3, 103))
        _plain_ticks(axes, [2**i for i in range(10) if 2**i <= max(last, 2)])
        if len(lines) > 1:
            axes.legend()

    alt = "Share of pairs of one prompt's variants whose first tokens are all the same."
    return figure("together", "How long variants stay together", alt, draw)


def diversity(names: Sequence[str], found: Sequence[VariantStatistics]) -> Figure:
    """Four shares per group, as dots on one line each."""
    kinds = [
        ("same completion", "o", [v.same_tokens for v in found]),
        ("edit distance", "s", [v.mean_edit_distance for v in found]),
        ("distinct tokens", "^", [v.distinct_1 for v in found]),
        ("distinct token pairs", "D", [v.distinct_2 for v in found]),
    ]
    shown = spread(range(len(names)), MAX_BOXES)

    def draw(axes: Any, palette: Palette) -> None:
        for index, (kind, marker, values) in enumerate(kinds):
            colour, offset = palette.series[index], 0.13 * (index - 1.5)
            points = [(values[i], y + offset) for y, i in enumerate(shown) if values[i] is not None]
            x, y = zip(*points, strict=True) if points else ((), ())
            axes.plot(
                [100 * share for share in x], y, marker, color=colour, label=kind, markersize=7
            )
        axes.set(xlabel="%", xlim=(-4, 104))
        _row_names(axes, [names[i] for i in shown])
        axes.figure.legend(loc="outside upper center", ncols=2)

    alt = (
        "Shares over a prompt's variants: equal pairs, tokens to edit, new tokens and token pairs."
    )
    return figure(
        "diversity", "How different the variants are", alt, draw, rows_height(len(shown)) + 0.6
    )


def lengths(names: Sequence[str], found: Sequence[RunStatistics]) -> Figure:
    """Completion lengths, a box a row."""
    boxes = [[s.length_quantile(share) for share in _SHARES] for s in found]
    alt = "Tokens a completion: middle half as a bar, median as a line, 5 to 95 % as a thin line."
    return _boxes("length", "Completion length", alt, "completion tokens", names, boxes)


def logprobs(names: Sequence[str], found: Sequence[RunStatistics]) -> Figure:
    """Mean token log-probability of the rows, a box a row."""
    boxes = [[s.logprobs.quantile(share) for share in _SHARES] for s in found]
    alt = "Mean log-probability of a row's tokens: nearer to zero is surer. Bars as for the length."
    return _boxes("logprob", "Log-probability", alt, "natural log, per token", names, boxes)


def length_histogram(found: RunStatistics) -> Figure:
    """One run's completion lengths."""

    def draw(axes: Any, palette: Palette) -> None:
        longest = len(found.lengths) - 1
        width = max(1, -(-(longest + 1) // 40))
        padded = np.zeros(-(-(longest + 1) // width) * width, np.int64)
        padded[: longest + 1] = found.lengths
        counts = padded.reshape(-1, width).sum(axis=1)
        axes.bar(
            np.arange(len(counts)) * width,
            counts,
            width * 0.9,
            align="edge",
            color=palette.series[0],
        )
        axes.set(xlabel="completion tokens", ylabel="rows")
        axes.grid(visible=False, axis="x")

    return figure("length", "Completion length", "How many rows have how many tokens.", draw)


def logprob_histogram(found: RunStatistics) -> Figure:
    """One run's mean token log-probabilities, over the range that holds them."""

    def draw(axes: Any, palette: Palette) -> None:
        low = found.logprobs.quantile(0.005) or -1.0
        used = np.flatnonzero(found.logprobs.counts)
        high = found.logprobs.edges[used[-1] + 1] if len(used) else 0.0
        edges = np.linspace(min(low, high - 0.2), high, 41)
        centres = (found.logprobs.edges[:-1] + found.logprobs.edges[1:]) / 2
        counts, _ = np.histogram(centres, edges, weights=found.logprobs.counts)
        axes.bar(edges[:-1], counts, np.diff(edges) * 0.9, align="edge", color=palette.series[0])
        axes.set(xlabel="natural log, mean over a row's tokens", ylabel="rows")
        axes.grid(visible=False, axis="x")

    return figure("logprob", "Log-probability", "How sure the model was, row by row.", draw)


def margin_histogram(found: RunStatistics) -> Figure:
    """Margins of all tokens on a log scale, near ties marked."""

    def draw(axes: Any, palette: Palette) -> None:
        edges, counts = found.margins.edges, found.margins.counts
        colours = [palette.bad if edge < NEAR_TIE else palette.series[0] for edge in edges[:-1]]
        axes.bar(edges[:-1], counts, np.diff(edges) * 0.9, align="edge", color=colours)
        used = np.flatnonzero(counts)
        axes.axvline(NEAR_TIE, color=palette.bad, linewidth=1)
        axes.set(xscale="log", xlabel="best minus second-best logit", ylabel="tokens")
        low, high = (edges[used[0]], edges[used[-1] + 1]) if len(used) else (0.001, 10)
        _plain_ticks(axes, [tick for tick in 10.0 ** np.arange(-6, 3) if low <= tick <= high])
        axes.set_xlim(low / 1.2, high * 1.2)
        axes.grid(visible=False, axis="x")

    alt = f"How close each token's choice was; left of the line, under {NEAR_TIE:g}, are near ties."
    return figure("margins", "Margins", alt, draw)


def time_bars(title: str, seconds: Sequence[tuple[str, float]]) -> Figure:
    """Named seconds as bars, longest first as given."""

    def draw(axes: Any, palette: Palette) -> None:
        values = [value for _, value in seconds]
        bars = axes.barh(range(len(values)), values, 0.6, color=palette.series[0])
        axes.bar_label(bars, [f"{value:,.3g} s" for value in values], padding=4)
        axes.set_xlim(0, max(values, default=1.0) * 1.2 or 1.0)
        axes.set(xlabel="seconds")
        _row_names(axes, [name for name, _ in seconds])

    name = "time" if title.startswith("Where") else "ops"
    return figure(
        name, title, "Seconds by what they were spent on.", draw, rows_height(len(seconds))
    )


def agreement(names: Sequence[str], shares: Any, meaning: str) -> Figure:
    """names: one per run, of what `meaning` says.

    shares: (runs, runs), of the samples two runs share those with the same tokens; NaN for none.
    """

    def draw(axes: Any, palette: Palette) -> None:
        from matplotlib.patches import Rectangle

        size = len(names)
        for y, x in np.ndindex(size, size):
            if not np.isnan(shares[y, x]):
                alpha = 0.06 + 0.94 * shares[y, x]
                colour = palette.series[0]
                axes.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fc=colour, alpha=alpha))
                if size <= 8:
                    ink = palette.card if shares[y, x] > 0.55 else palette.ink
                    axes.text(
                        x, y, f"{100 * shares[y, x]:.0f}", ha="center", va="center", color=ink
                    )
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), aspect="equal")
        shown = spread(range(size), _MAX_NAMES)
        axes.set_xticks(shown, [str(i) for i in shown])
        axes.set_yticks(shown, [label(names[i], 22) for i in shown])
        axes.set(xlabel="number of the run", ylabel=label(meaning, 40))
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)

    alt = (
        "Pairs of runs; the fuller the colour, the more completions are the same, token for token."
    )
    return figure("agreement", "Which runs agree", alt, draw, 3.6)


def _boxes(
    name: str,
    title: str,
    alt: str,
    unit: str,
    names: Sequence[str],
    boxes: Sequence[Sequence[float | None]],
) -> Figure:
    rows: list[tuple[str, Any]] = [
        (text, box) for text, box in zip(names, boxes, strict=True) if None not in box
    ]
    rows = spread(rows, MAX_BOXES)

    def draw(axes: Any, palette: Palette) -> None:
        for y, (_, (low, first, middle, third, high)) in enumerate(rows):
            axes.plot([low, high], [y, y], color=palette.series[0], linewidth=1.5)
            axes.barh(y, third - first, 0.5, first, color=palette.series[0], alpha=0.45)
            axes.plot([middle] * 2, [y - 0.25, y + 0.25], color=palette.series[0], linewidth=3)
        axes.set(xlabel=unit)
        axes.locator_params(axis="x", nbins=6, integer="tokens" in unit)
        axes.margins(x=0.06)
        _row_names(axes, [text for text, _ in rows])

    return figure(name, title, alt, draw, rows_height(len(rows)))


def _row_names(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _last_position(found: VariantStatistics) -> int:
    """The last position worth showing: where the longest pair still differed."""
    changes = np.flatnonzero(np.diff(found.agreeing))
    return int(changes[-1]) + 2 if len(changes) else 8


def _plain_ticks(axes: Any, ticks: Sequence[float]) -> None:
    """Ticks of a logarithmic axis as ordinary numbers."""
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
