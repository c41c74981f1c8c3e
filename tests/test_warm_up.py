"""Getting the GPU ready in the background: it helps, or it is as if it had not been there."""

import subprocess
import sys
import threading
import time
from importlib.util import find_spec

import pytest
from support.paths import REPO_ROOT

from orcd_batch import warm_up
from orcd_batch.phases import Phases, seconds_since_process_start
from orcd_batch.warm_up import WarmUp, gpu_warm_up


def test_the_steps_run_in_order_beside_the_main_thread() -> None:
    seen, go_on = [], threading.Event()

    def first() -> None:
        go_on.wait(10)
        seen.append("first")

    with WarmUp([first, lambda: seen.append("second")]) as running:
        seen.append("main")
        go_on.set()
        assert running._thread is not None
        running._thread.join(10)
    assert seen == ["main", "first", "second"]


def test_a_step_that_fails_ends_the_warming_up_and_nothing_else() -> None:
    seen = []

    def fails() -> None:
        raise RuntimeError("no driver")

    with WarmUp([fails, lambda: seen.append("second")]):
        pass
    assert seen == []


def test_leaving_waits_for_the_step_under_way_and_starts_no_other() -> None:
    seen, begun, go_on = [], threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        go_on.wait(10)
        seen.append("first")

    with WarmUp([first, lambda: seen.append("second")]) as running:
        assert begun.wait(10)
        threading.Timer(0.01, go_on.set).start()
        running._stop.set()
    assert seen == ["first"]


@pytest.mark.parametrize(
    ("args", "is_wanted"),
    [((), True), (("engine=cuda",), True), (("engine=numpy",), False),
     (("engine.kind=numpy", "x=1"), False), (("--config-name", "acceptance"), False)],
)  # fmt: skip
def test_the_gpu_is_warmed_up_where_there_is_a_driver_and_it_may_be_used(
    args: tuple[str, ...], is_wanted: bool, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr(warm_up, "_DRIVER_FILES", (tmp_path / "missing",))
    assert not gpu_warm_up(args)._steps
    monkeypatch.setattr(warm_up, "_DRIVER_FILES", (tmp_path,))
    assert bool(gpu_warm_up(args)._steps) is is_wanted


def test_phases_count_from_the_start_of_the_process_and_end_once() -> None:
    phases = Phases()
    phases.end("a")
    first = phases.ends()["a"]
    while seconds_since_process_start() < first + 0.02:
        pass
    phases.end("b")
    phases.end("a")
    assert list(phases.ends()) == ["a", "b"]
    assert phases.ends()["a"] == first < phases.ends()["b"]


def test_a_new_process_is_young() -> None:
    script = (
        "from orcd_batch.phases import seconds_since_process_start as s\nimport time\n"
        "first = s(); time.sleep(0.1); print(first, s())"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO_ROOT, capture_output=True,
                          text=True, check=True)  # fmt: skip
    took = time.perf_counter() - started
    first, second = map(float, done.stdout.split())
    assert 0 <= first < second <= took + 0.02
    assert second - first >= 0.08


def test_cublaslts_binding_is_loaded_alone_and_leaves_nvmath_whole() -> None:
    if find_spec("nvmath") is None:
        pytest.skip("nvmath-python is not installed")
    script = (
        "import sys\nfrom orcd_batch.backend.cuda.cublaslt_binding import cublaslt\n"
        "alone = cublaslt()\nassert not {'nvmath', 'nvmath.fft'} & sys.modules.keys()\n"
        "import nvmath\nfrom nvmath.bindings import cublasLt\n"
        "assert cublasLt is alone is cublaslt() and nvmath.linalg\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO_ROOT, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
