"""The GPU tests under compute-sanitizer: memcheck (bad addresses) and racecheck (shared memory).

    python tests/sanitize_gpu.py [--tool memcheck] [--limit 240] [--parts 4] [FILES] [-- -k WORDS]

One process per tool and test file, or part of one, some at a time. Prints a line for each, stores
them in benchmarks/results with the logs beside them when something is wrong, and exits 1 on an
error, a hazard, a failed test or a process that did not end in time. Racecheck runs without cuBLAS
(see support/own_products.py); for memcheck, calls that fail on purpose are no errors. With several
jobs, tests that watch the free memory are left out. Needs compute-sanitizer (CUDA toolkit).
"""

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from results_file import RESULTS, write_results

from orcd_batch.engine_factory import choose_engine

ROOT = Path(__file__).resolve().parents[1]
TOOLS = {
    "memcheck": (["--report-api-errors", "no"], []),
    "racecheck": ([], ["-p", "support.own_products"]),
}
# Tests that are about cuBLAS's algorithms, and those that watch the card's free memory.
NO_CUBLAS = "not split_k and not disagrees and not algorithm_16 and not stored_choice"
NO_NEIGHBOURS = "not memory_is_planned and not gives_all and not frees_everything"
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
_TESTS = {name: re.compile(rf"(\d+) {name}") for name in ("passed", "failed", "skipped")}


@dataclass(frozen=True, slots=True)
class Work:
    """What one process runs. part: "1/3" is the first of three parts of the file's tests."""

    tool: str
    file: str
    part: str
    tests: list[str]


def collected(file: str, selection: list[str]) -> list[str]:
    """The tests of a file, as pytest names them."""
    command = [sys.executable, "-m", "pytest", file, "--collect-only", "-q", *selection]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return [line for line in found.stdout.splitlines() if "::" in line]


def divided(tool: str, file: str, selection: list[str], parts: int) -> list[Work]:
    """Every parts-th test together, so that the long ones of a kind are spread."""
    tests = collected(file, selection)
    parts = min(parts, len(tests))
    return [Work(tool, file, f"{n + 1}/{parts}", tests[n::parts]) for n in range(parts)]


def sanitize(work: Work, limit: int, logs: Path) -> dict[str, Any]:
    """One process: some tests under one tool."""
    tool, file = work.tool, work.file
    options, plugins = TOOLS[tool]
    pytest = ["-m", "pytest", "-q", *plugins, "-p", "no:cacheprovider", "--tb=short"]
    sanitizer = ["compute-sanitizer", "--tool", tool, "--show-backtrace", "no", *options]
    started = time.perf_counter()
    log = logs / f"{tool}-{Path(file).stem}-{work.part.replace('/', '-of-')}.log"
    with log.open("w") as output:
        try:
            code = subprocess.run(
                [*sanitizer, sys.executable, *pytest, *work.tests],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                timeout=limit,
                stdout=output,
                stderr=subprocess.STDOUT,
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    text = log.read_text(errors="replace")
    errors = _SUMMARY.findall(text)
    counts = {name: sum(map(int, found.findall(text)[-1:])) for name, found in _TESTS.items()}
    run = {
        "tool": tool,
        "file": file,
        "part": work.part,
        "command": " ".join([*sanitizer, "python", *pytest, file]),
        "seconds": round(time.perf_counter() - started, 1),
        "exit_code": code,
        "errors": int(errors[-1]) if errors else None,
        **counts,
        "clean": code == 0 and errors[-1:] == ["0"] and counts["passed"] > 0,
    }
    if run["clean"]:
        log.unlink()
    return run


def shown(run: dict[str, Any]) -> str:
    verdict = "clean" if run["clean"] else "NOT CLEAN"
    ended = "" if run["exit_code"] >= 0 else ", not at its end in time"
    return (
        f"{run['tool']:9} {Path(run['file']).stem:24} {run['part']:5} {verdict:9} "
        f"errors {run['errors']}, "
        f"{run['passed']} passed, {run['failed']} failed, {run['skipped']} skipped, "
        f"exit code {run['exit_code']}, {run['seconds']} s{ended}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", help="default: every file in tests/gpu")
    parser.add_argument("--tool", choices=TOOLS, help="default: both")
    parser.add_argument("--jobs", type=int, default=4, help="processes at a time")
    parser.add_argument("--parts", type=int, default=1, help="processes for each file")
    parser.add_argument("--limit", type=int, default=1800, help="seconds for each process")
    parser.add_argument("--results", type=Path, default=RESULTS)
    own, rest = sys.argv[1:], []
    if "--" in own:
        own, rest = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    files = options.files or sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "gpu").glob("test_*.py")
    )
    options.results.mkdir(parents=True, exist_ok=True)

    def works(job: tuple[str, str]) -> list[Work]:
        tool, file = job
        left_out = [NO_CUBLAS] * (tool == "racecheck") + [NO_NEIGHBOURS] * (options.jobs > 1)
        selection = ["-k", " and ".join(left_out)] if left_out and "-k" not in rest else []
        return divided(tool, file, [*selection, *rest], options.parts)

    def run(work: Work) -> dict[str, Any]:
        found = sanitize(work, options.limit, options.results)
        print(shown(found), flush=True)
        return found

    jobs = [(tool, file) for tool in ([options.tool] if options.tool else TOOLS) for file in files]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(run, [work for found in pool.map(works, jobs) for work in found]))
    write_results(options.results, "sanitizer", choose_engine("auto"), {"runs": runs})
    sys.exit(0 if all(run["clean"] for run in runs) else 1)


if __name__ == "__main__":
    main()
