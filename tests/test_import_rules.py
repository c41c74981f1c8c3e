"""Data flows one way: which room may import which, read from the source itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "orcd_batch"
NOBODY: set[str] = set()

# What each room may import of ours; the modules at the top (job, adapter, …) may import anything.
ALLOWED = {
    "errors": NOBODY,
    "config": {"errors"},
    "checkpoint": {"errors"},
    "text": {"errors"},
    "data": {"errors"},
    "backend": {"errors"},
    "model": {"errors", "backend.ops", "checkpoint"},
    "engine": {"errors", "backend.ops", "model"},
    "reproducibility": {"errors", "data"},
    "hydra_plugins": {"errors"},
    "hydra_app": {
        "errors",
        "config",
        "resources",
        "hydra_plugins",
        "job",
        "job_logs",
        "job_run",
        "sweep",
        "nightly",
    },
    "scale_out": {
        *("errors", "config", "data", "reproducibility", "prompts", "provenance", "row_runner"),
        *("engine_factory", "loaded_engine", "model_source", "collector"),
    },
    "sweep": {"errors", "config", "interrupts", "job", "job_run", "reproducibility", "view"},
    "nightly": {
        "errors",
        "config",
        "interrupts",
        "job",
        "view",
        "checkpoint",
        "data",
        "reproducibility",
        "backend.cuda.device_names",
    },
}
FORBIDDEN_PACKAGES = {
    "model": {"hydra", "omegaconf", "cuda", "nvmath", "gguf", "pyarrow", "tokenizers"},
    "engine": {"hydra", "omegaconf", "cuda", "nvmath", "gguf", "pyarrow", "tokenizers"},
    "backend": {"hydra", "omegaconf", "pyarrow", "tokenizers"},
    "checkpoint": {"hydra", "omegaconf", "cuda", "nvmath", "pyarrow", "tokenizers"},
    "text": {"hydra", "omegaconf", "cuda", "nvmath", "pyarrow"},
    "data": {"hydra", "omegaconf", "cuda", "nvmath", "gguf", "tokenizers"},
    "scale_out": {"hydra", "omegaconf", "cuda", "nvmath", "gguf", "tokenizers", "numpy"},
}
HEAVY = ["numpy", "gguf", "tokenizers", "pyarrow", "hydra", "jinja2", "rich", "cuda", "ray"]


def modules() -> list[str]:
    paths = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    return sorted(".".join(path.with_suffix("").parts) for path in paths)


def imports(module: str) -> Iterator[str]:
    """Every module named by an import statement anywhere in the file, in full."""
    tree = ast.parse((PACKAGE / Path(*module.split("."))).with_suffix(".py").read_text())
    package = ["orcd_batch", *module.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                is_module = (PACKAGE.parent / Path(*base.split("."), alias.name)).with_suffix(".py")
                yield f"{base}.{alias.name}" if is_module.exists() else base


def is_allowed(imported: str, room: str) -> bool:
    inside = imported.removeprefix("orcd_batch").removeprefix(".")
    allowed = {room, *ALLOWED[room]}
    return any(inside == name or inside.startswith(f"{name}.") for name in allowed)


@pytest.mark.parametrize("module", [m for m in modules() if m.split(".")[0] in ALLOWED])
def test_a_room_imports_only_the_rooms_below_it(module: str) -> None:
    room = module.split(".")[0]
    ours = [name for name in imports(module) if name.split(".")[0] == "orcd_batch"]
    bad = sorted({name for name in ours if not is_allowed(name, room)})
    assert not bad, f"{module} imports {', '.join(bad)}"


@pytest.mark.parametrize("module", [m for m in modules() if m.split(".")[0] in FORBIDDEN_PACKAGES])
def test_a_room_stays_clear_of_packages_that_are_not_its_business(module: str) -> None:
    room = module.split(".")[0]
    tops = {name.split(".")[0] for name in imports(module)}
    bad = sorted(tops & FORBIDDEN_PACKAGES[room])
    assert not bad, f"{module} imports {', '.join(bad)}"


@pytest.mark.parametrize("module", [m for m in modules() if not m.startswith("backend.cuda")])
def test_cuda_packages_are_imported_by_the_cuda_backend_alone(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(module)} & {"cuda", "nvmath"}


@pytest.mark.parametrize("module", [m for m in modules() if not m.startswith("scale_out")])
def test_ray_is_imported_for_scale_out_alone(module: str) -> None:
    assert "ray" not in {name.split(".")[0] for name in imports(module)}


@pytest.mark.parametrize("module", [m for m in modules() if m.startswith("backend.")])
def test_the_two_backends_do_not_know_each_other(module: str) -> None:
    other = "backend.numpy_" if module.startswith("backend.cuda") else "backend.cuda"
    assert not [name for name in imports(module) if name.startswith(f"orcd_batch.{other}")]


def test_every_package_of_ours_has_its_rule_or_stands_at_the_top() -> None:
    top = {m.split(".")[0] for m in modules() if "." in m}
    assert top <= set(ALLOWED), top - set(ALLOWED)


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("orcd_batch", HEAVY),
        ("orcd_batch.scale_out.keeper", HEAVY),
        ("orcd_batch.scale_out.driver", ["ray", "hydra", "cuda"]),
    ],
)
def test_importing_a_module_loads_nothing_heavy(module: str, heavy: list[str]) -> None:
    script = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
