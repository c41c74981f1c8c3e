"""The suite's scripts are there, and the pictures of the documents follow from stored results."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.paths import REPO_ROOT

BENCHMARKS = REPO_ROOT / "benchmarks"
OPS = [
    {"op": "attention decode phi3", "gb_per_s": 4200, "tflops": 4.2, "share_of_limit": 0.9},
    {"op": "rms_norm T=4096", "gb_per_s": 3800, "tflops": 0.0, "share_of_limit": 0.8},
]
PRODUCTS = [{"linear": "attn_qkv", "M": 256, "gb_per_s": 2100, "tflops": 560.0}]


def store(folder: Path, name: str, facts: dict[str, Any], date: str = "2026-01-01") -> None:
    (folder / f"{date}-h200-{name}.json").write_text(json.dumps({"date": date, **facts}))


def workloads(**figures: float) -> dict[str, Any]:
    rows = [{"workload": name, "tokens_per_s": value} for name, value in figures.items()]
    return {"shapes": [{"shape": "phi3", "rows": rows}, {"shape": "qwen2_5", "rows": []}]}


def draw(results: Path, to: Path) -> str:
    command = [sys.executable, "benchmarks/draw.py", "--results", str(results), "--to", str(to)]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_pictures_are_small_say_what_was_measured_and_are_the_same_every_time(
    tmp_path: Path,
) -> None:
    pytest.importorskip("matplotlib")
    store(tmp_path, "ops", {"rows": OPS})
    store(tmp_path, "linear", {"rows": {"products": PRODUCTS}})
    store(tmp_path, "workloads", workloads(w1=1.0, w2=12345.0))
    store(tmp_path, "workloads-w1", workloads(w1=432.0), date="2026-01-02")
    told = draw(tmp_path, tmp_path / "a")
    draw(tmp_path, tmp_path / "b")
    for name in ("roofline.svg", "workloads.svg"):
        picture = (tmp_path / "a" / name).read_bytes()
        assert picture == (tmp_path / "b" / name).read_bytes()
        assert len(picture) < 200_000
    bars = (tmp_path / "a" / "workloads.svg").read_text()
    assert {">432<", ">12,345<", ">8,980<"} <= {f">{part}<" for part in re.split("[<>]", bars)}
    assert "attention decode (1)" in (tmp_path / "a" / "roofline.svg").read_text()
    assert "no result for w3, w4, w5" in told


def test_without_results_no_picture_is_made_up(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told = draw(tmp_path, tmp_path / "pictures")
    assert list((tmp_path / "pictures").iterdir()) == []
    assert "no result for ops, linear" in told


def test_the_peers_figures_name_their_source_and_every_workload() -> None:
    peers = json.loads((BENCHMARKS / "peer_figures.json").read_text())
    names = ["w1", "w2", "w3", "w4", "w5"]
    assert "H200" in peers["source"]
    for figures in (peers["limits"], peers["targets"], *peers["engines"].values()):
        assert list(figures) == names


@pytest.mark.parametrize("script", ["suite.py", "peers.py", "start_up.py", "draw.py"])
def test_every_script_says_what_it_does(script: str) -> None:
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", "--help"], cwd=REPO_ROOT, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_the_suite_runs_scripts_that_are_there() -> None:
    listing = "import sys; sys.path.insert(0, 'benchmarks'); import suite; print(*[s.script for s in suite.STEPS])"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", listing], cwd=REPO_ROOT, capture_output=True,
                          text=True, check=True)  # fmt: skip
    scripts = done.stdout.split()
    assert scripts
    assert all((BENCHMARKS / script).is_file() for script in scripts)
