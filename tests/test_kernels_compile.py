"""Every kernel compiles with NVRTC, no GPU needed, for each architecture its header lists."""

import io
import os
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

from orcd_batch.backend.cuda.program import compile_kernel, kernel_dir
from orcd_batch.errors import DeviceError

pytest.importorskip("cuda.core", reason="cuda-python is not installed")

FACTS = ("computes", "layout", "mapping", "bound by", "order", "architectures", "spills")


def header_facts(source: str) -> dict[str, str]:
    """The labelled facts of a kernel's opening comment; a fact runs on until the next label."""
    facts: dict[str, str] = {}
    label = ""
    for line in source.splitlines()[1:]:
        if not line.startswith("//"):
            break
        found = re.match(r"// ([a-z][a-z ]*): +(.*)", line)
        if found:
            label = found[1]
        if label:
            facts[label] = (
                f"{facts.get(label, '')} {found[2] if found else line[2:].strip()}".strip()
            )
    return facts


def variants(facts: dict[str, str]) -> list[dict[str, str]]:
    """The sets of macros of the `compile` fact: `A=1 B=2 | A=3 B=4`."""
    sets = facts.get("compile", "").split("|")
    return [dict(pair.split("=", 1) for pair in macros.split()) for macros in sets]


def compiler_log(name: str, arch: str, defines: dict[str, str]) -> str:
    log = io.StringIO()
    assert len(compile_kernel(name, arch, defines, log=log, verbose=True).code) > 0
    return log.getvalue()


KERNELS = sorted(kernel_dir().glob("*.cu"))


@pytest.fixture(scope="module", autouse=True)
def _nvrtc() -> None:
    from cuda.bindings import nvrtc

    try:
        nvrtc.nvrtcVersion()
    except Exception as error:
        pytest.skip(f"NVRTC is not installed: {error}")


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_every_kernel_opens_with_its_facts(path: Path) -> None:
    source = path.read_text()
    assert source.startswith(f"// {path.stem}: ")
    assert not [fact for fact in FACTS if fact not in header_facts(source)]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_every_kernel_compiles_for_its_architectures_and_spills_as_it_says(path: Path) -> None:
    facts = header_facts(path.read_text())
    architectures = facts["architectures"].split()
    assert any(int(arch.removeprefix("sm_").rstrip("af")) <= 80 for arch in architectures) or (
        "generic twin" in facts
    ), "a kernel without an sm_80 build names its generic twin"
    builds = list(product(architectures, variants(facts)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        logs = list(pool.map(lambda build: compiler_log(path.stem, *build), builds))
    for build, log in zip(builds, logs, strict=True):
        spilled = [int(n) for n in re.findall(r"(\d+) bytes (?:stack|spill)", log)]
        assert spilled, log
        if facts["spills"].startswith("none"):
            assert not any(spilled), f"{path.name} {build}: {log}"


def test_a_kernel_that_does_not_compile_names_its_file_and_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "common.cuh").write_text((kernel_dir() / "common.cuh").read_text())
    (tmp_path / "broken.cu").write_text('extern "C" __global__ void broken() {\n  undeclared();\n}')
    monkeypatch.setattr("orcd_batch.backend.cuda.program.kernel_dir", lambda: tmp_path)
    with pytest.raises(DeviceError, match=r"(?s)broken\[sm_90\].*broken\.cu\(2\)"):
        compile_kernel("broken", "sm_90")


def test_a_kernel_that_does_not_exist_is_named() -> None:
    with pytest.raises(DeviceError, match=r"no_such_kernel\.cu"):
        compile_kernel("no_such_kernel", "sm_90")
