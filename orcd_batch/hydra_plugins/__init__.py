"""This folder as a part of the namespace package `hydra_plugins`, where Hydra looks for plug-ins.

It joins the namespace when the program starts, for this process alone: other programs that use
Hydra do not see it, and a checkout needs no installation.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

_NAMESPACE = "hydra_plugins"


def register() -> None:
    """Makes Hydra know the plug-ins of this folder; calling it again does nothing."""
    from hydra.core.plugins import Plugins

    namespace, folder = _namespace(), str(Path(__file__).parent)
    if folder not in namespace.__path__:
        namespace.__path__ = [*namespace.__path__, folder]
    launcher = importlib.import_module(f"{_NAMESPACE}.orcd_batch_launcher")
    Plugins.instance().register(launcher.FusedLauncher)


def _namespace() -> ModuleType:
    """The namespace package; where no plug-in is installed there is none yet."""
    try:
        return importlib.import_module(_NAMESPACE)
    except ModuleNotFoundError:
        namespace = sys.modules[_NAMESPACE] = ModuleType(_NAMESPACE)
        namespace.__path__ = []
        return namespace
