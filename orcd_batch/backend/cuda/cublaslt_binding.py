"""nvmath's binding of cuBLASLt, without the rest of nvmath.

`import nvmath` loads every library it binds (cuFFT, cuSOLVER, cuSPARSE, …), none of which is used
here: 0.33 s of a start, against 0.06 s for cuBLASLt alone (docs/log.md).
"""

import sys
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_NAME = "nvmath.bindings.cublasLt"


@cache
def cublaslt() -> Any:
    """The module. Raises ImportError without nvmath, and nvmath's own errors."""
    packages = [_NAME.rsplit(".", level)[0] for level in (2, 1)]
    if any(name in sys.modules for name in packages):
        return import_module(_NAME)
    found = find_spec(packages[0])
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"No module named {packages[0]!r}")
    folder = found.submodule_search_locations[0]
    try:
        for name, path in zip(packages, (folder, f"{folder}/bindings"), strict=True):
            sys.modules[name] = _bare_package(name, path)
        return import_module(_NAME)
    finally:  # whoever imports nvmath later gets the real one
        for name in packages:
            sys.modules.pop(name, None)


def _bare_package(name: str, folder: str) -> ModuleType:
    """A package whose submodules can be imported and whose own code does not run."""
    package = ModuleType(name)
    package.__spec__ = ModuleSpec(name, None, is_package=True)
    package.__spec__.submodule_search_locations = [folder]
    package.__path__ = [folder]
    return package
