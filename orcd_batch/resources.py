"""Where conf/ and kernels/ are: inside an installed package, or beside it in a checkout."""

from pathlib import Path

from orcd_batch.errors import OrcdError


def resource_directory(name: str) -> Path:
    """The absolute directory `name` ("conf" or "kernels").

    Raises OrcdError when the installation lacks it.
    """
    package = Path(__file__).resolve().parent
    for directory in (package / name, package.parent / name):
        if directory.is_dir():
            return directory
    raise OrcdError(
        f"The installation lacks its {name}/ directory (looked in {package} and beside it): "
        "install orcd-batch again."
    )
