"""The pictures of docs/performance.md, from stored results: `make pictures`.

    python benchmarks/draw.py [--results benchmarks/results] [--to docs/pictures]

For each figure the newest stored result counts: `*-ops.json` and `*-linear.json` for the roofline,
`*-workloads*.json` for the bars, beside peer_figures.json. A picture whose results are missing is
left as it is, and said so.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
READ_GB_PER_S = 4660.0
TFLOPS = 780.0
# Where an op counts as moving bytes rather than computing, in TFLOP/s.
_SOME_TFLOPS = 0.5
WORKLOADS = ("w1", "w2", "w3", "w4", "w5")
OWN = "orcd_batch"
COLOURS = {OWN: "#1b6ca8", "vLLM 0.26": "#e08e0b", "vLLM batch-invariant": "#f0c77d",
           "SGLang 0.5.17": "#5b9a4c", "SGLang deterministic": "#abd29f",
           "llama.cpp": "#a05195"}  # fmt: skip
FAMILIES = {"linear": "#1b6ca8", "attention decode": "#c8453b", "attention prefill": "#e08e0b",
            "other": "#777777"}  # fmt: skip


def newest(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """Stored results of that name, oldest first."""
    found = [json.loads(path.read_text()) for path in folder.glob(pattern)]
    return sorted(found, key=lambda result: result["date"])


def op_rows(folder: Path) -> list[dict[str, Any]]:
    """Every op and product of the newest results: name, gb_per_s, tflops, share_of_limit."""
    rows = []
    for result in newest(folder, "*-h200-ops.json")[-1:]:
        rows += [row | {"name": row["op"]} for row in result["rows"]]
    for result in newest(folder, "*-h200-linear.json")[-1:]:
        products = result["rows"]
        if isinstance(products, dict):
            products = products["products"]
        rows += [row | {"name": f"linear {row['linear']} M={row['M']}"} for row in products]
    return rows


def own_figures(folder: Path, shape: str = "phi3") -> dict[str, float]:
    """Tokens per second by workload: the newest result that has it, its fastest row."""
    found: dict[str, float] = {}
    for result in newest(folder, "*-h200-workloads*.json"):
        newer: dict[str, float] = {}
        for entry in result["shapes"]:
            for row in entry["rows"] if entry["shape"] == shape else ():
                name = row["workload"]
                newer[name] = max(newer.get(name, 0.0), row["tokens_per_s"])
        found |= newer
    return found


def family(name: str) -> str:
    return next((known for known in FAMILIES if name.startswith(known)), "other")


def draw_roofline(rows: list[dict[str, Any]], path: Path) -> None:
    """Left: operations per byte against TFLOP/s under the two ceilings. Right: the ops that only
    move bytes, as shares of the read ceiling."""
    computing = [row for row in rows if row["tflops"] >= _SOME_TFLOPS]
    moving = [row for row in rows if row["tflops"] < _SOME_TFLOPS]
    figure, (roof, bars) = plt.subplots(
        1, 2, figsize=(12, 6.2), width_ratios=(3, 2), layout="constrained"
    )
    ridge = TFLOPS / READ_GB_PER_S * 1e3
    roof.plot([0.5, ridge, 1e4], [0.5 * READ_GB_PER_S / 1e3, TFLOPS, TFLOPS], color="black")
    roof.text(ridge * 1.3, TFLOPS * 1.07, f"{TFLOPS:.0f} TFLOP/s", fontsize=9)
    roof.text(0.6, 0.9 * READ_GB_PER_S / 1e3, f"{READ_GB_PER_S / 1e3} TB/s", fontsize=9,
              rotation=38)  # fmt: skip
    for kind, colour in FAMILIES.items():
        mine = [row for row in computing if family(row["name"]) == kind]
        if mine:
            intensity = [row["tflops"] / row["gb_per_s"] * 1e3 for row in mine]
            roof.scatter(intensity, [row["tflops"] for row in mine], s=26, color=colour,
                         label=f"{kind} ({len(mine)})", alpha=0.85)  # fmt: skip
    roof.set(xscale="log", yscale="log", xlim=(0.5, 1e4), ylim=(0.3, 1500),
             xlabel="operations per byte moved", ylabel="TFLOP/s",
             title="Attention and products under one H200's ceilings")  # fmt: skip
    roof.legend(loc="lower right", fontsize=9)
    roof.grid(True, which="major", alpha=0.3)
    _share_bars(bars, moving)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _share_bars(axes: Any, rows: list[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda row: row["gb_per_s"])
    names = [row["name"] for row in rows]
    axes.barh(names, [row["gb_per_s"] / READ_GB_PER_S for row in rows], color=FAMILIES["other"])
    axes.axvline(1.0, color="black")
    axes.set(xlim=(0, 1.1), xlabel="share of the read ceiling",
             title="Ops that move bytes")  # fmt: skip
    axes.tick_params(axis="y", labelsize=7)


def draw_workloads(own: dict[str, float], peers: dict[str, Any], path: Path) -> None:
    """Each engine's share of the card's limit, workload by workload, with its tokens per second."""
    engines = {OWN: own, **peers["engines"]}
    figure, axes = plt.subplots(figsize=(12, 5.2), layout="constrained")
    width = 0.84 / len(engines)
    for index, (name, figures) in enumerate(engines.items()):
        for group, workload in enumerate(WORKLOADS):
            value = figures.get(workload)
            if value is None:
                continue
            x = group + (index - (len(engines) - 1) / 2) * width
            share = value / peers["limits"][workload]
            axes.bar(x, share, width * 0.94, color=COLOURS[name],
                     label=name if group == 0 else None)  # fmt: skip
            axes.text(x, share + 0.012, f"{value:,.0f}", rotation=90, ha="center", fontsize=8,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # fmt: skip
    for group, workload in enumerate(WORKLOADS):
        target = peers["targets"][workload] / peers["limits"][workload]
        axes.hlines(target, group - 0.45, group + 0.45, color="black", linestyles="dotted",
                    label="target" if group == 0 else None)  # fmt: skip
    labels = [f"{name}\nlimit {peers['limits'][name]:,} tok/s" for name in WORKLOADS]
    axes.set_xticks(range(len(WORKLOADS)), labels)
    axes.set(ylim=(0, 1.12), ylabel="share of the card's limit",
             title="Phi-3-mini's shape, fp16, one H200: tokens per second")  # fmt: skip
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.legend(loc="upper center", ncols=4, fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def told(path: Path, missing: Iterable[str] = ()) -> None:
    lacking = ", ".join(missing)
    size = f"{path.stat().st_size / 1e3:.0f} kB" if path.exists() else "not there"
    note = f"; no result for {lacking}" if lacking else ""
    print(f"{path.name}: {size}{note}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--to", type=Path, default=HERE.parent / "docs" / "pictures")
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    # The same results give the same bytes: no date, and names instead of random ids.
    matplotlib.rcParams.update({"svg.hashsalt": OWN, "svg.fonttype": "none",
                                "font.family": "sans-serif"})  # fmt: skip
    rows, roofline = op_rows(options.results), options.to / "roofline.svg"
    if rows:
        draw_roofline(rows, roofline)
    told(roofline, () if rows else ["ops", "linear"])
    own, workloads = own_figures(options.results), options.to / "workloads.svg"
    if own:
        peers = json.loads((HERE / "peer_figures.json").read_text())
        draw_workloads(own, peers, workloads)
    told(workloads, [name for name in WORKLOADS if name not in own])


if __name__ == "__main__":
    main()
