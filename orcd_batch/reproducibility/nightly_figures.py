"""The plots of the nightly page: speed over the nights, and when which fact changed."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from orcd_batch.reproducibility.plots import Palette, figure, label
from orcd_batch.reproducibility.report_page import Figure

Night = Mapping[str, Any]

# What the timeline shows, in words, and the columns behind it.
TRACKS: dict[str, tuple[str, ...]] = {
    "results (bits)": ("run_hash",),
    "model file": ("model_hash", "tokenizer_hash", "template_hash"),
    "prompts": ("input_hash",),
    "code": ("code_hash", "kernels_hash"),
    "device": ("engine", "device", "cpu"),
    "versions": ("versions",),
}


def changed(before: Night, now: Night) -> list[str]:
    """The facts in which two nights differ, results aside; versions by name."""
    names = [name for columns in list(TRACKS.values())[1:-1] for name in columns]
    found = [name for name in names if before[name] != now[name]]
    mine, other = before["versions"], now["versions"]
    return found + [name for name in sorted({*mine, *other}) if mine.get(name) != other.get(name)]


def throughput(nights: Sequence[Night]) -> Figure:
    """Tokens per second, night by night; failed nights are crosses."""

    def draw(axes: Any, palette: Palette) -> None:
        points = [(x, night["tokens_per_s"]) for x, night in enumerate(nights)]
        known = [(x, rate) for x, rate in points if rate]
        axes.plot(*_columns(known), color=palette.series[0], linewidth=1.5)
        for good, marker, colour in ((True, "o", palette.good), (False, "X", palette.bad)):
            chosen = [(x, rate) for x, rate in known if (nights[x]["verdict"] == "pass") == good]
            name = "passed" if good else "failed"
            axes.plot(*_columns(chosen), marker, color=colour, markersize=7, label=name)
        axes.set_ylim(0, 1.25 * max((rate for _, rate in known), default=1.0))
        axes.set(ylabel="tokens/s")
        axes.legend(loc="lower left", ncols=2)
        _night_names(axes, nights)

    return figure("throughput", "Throughput", "Tokens/s of the reference, night by night.", draw)


def timeline(nights: Sequence[Night]) -> Figure:
    """One strip per fact; its colour changes on the night its value changes."""

    def draw(axes: Any, palette: Palette) -> None:
        for y, columns in enumerate(TRACKS.values()):
            values = [tuple(repr(night[name]) for name in columns) for night in nights]
            order = {value: i for i, value in enumerate(dict.fromkeys(values))}
            first = 0
            for value, same in groupby(values):
                num_nights = len(list(same))
                colour = palette.series[order[value] % len(palette.series)]
                axes.barh(y, num_nights, 0.62, first - 0.5, color=colour)
                if first:
                    axes.plot([first - 0.5] * 2, [y - 0.42, y + 0.42], color=palette.ink)
                first += num_nights
        failed = [x for x, night in enumerate(nights) if night["verdict"] != "pass"]
        axes.plot(failed, [-0.75] * len(failed), "X", color=palette.bad, markersize=7)
        axes.set_yticks(range(len(TRACKS)), list(TRACKS))
        axes.set_ylim(len(TRACKS) - 0.4, -1.2)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        _night_names(axes, nights)

    alt = "A strip changes colour on the night its value changes; a cross marks a failed night."
    return figure("timeline", "What changed when", alt, draw)


def _night_names(axes: Any, nights: Sequence[Night]) -> None:
    """The first, middle and last night by name."""
    last = len(nights) - 1
    shown = sorted({0, last // 2, last} if last > 5 else {0, last})
    axes.set_xticks(shown, [label(nights[x]["night"])[:10] for x in shown])
    axes.set_xlim(-0.6, last + 0.6)
    for name, side in zip(axes.get_xticklabels(), ("left", "center", "right"), strict=False):
        name.set_horizontalalignment(side if len(shown) == 3 else "center")
    axes.grid(visible=False, axis="x")


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
