"""Where conf/, jobs/ and kernels/ are: inside an installed package, or beside it in a checkout."""

from collections.abc import Sequence
from pathlib import Path

from orcd_batch.errors import OrcdError


def resource_directory(name: str) -> Path:
    """The absolute directory `name` ("conf", "jobs" or "kernels").

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


def with_jobs_found(args: Sequence[str]) -> list[str]:
    """The arguments with `--config-dir jobs` meaning the package's own jobs/ where there is no
    such directory here."""
    found = list(args)
    for index, argument in enumerate(found):
        name, equals, value = argument.partition("=")
        if name not in ("--config-dir", "-cd"):
            continue
        place = index if equals else index + 1
        value = value if equals else "".join(found[place : place + 1])
        if Path(value) == Path("jobs") and not Path("jobs").is_dir():
            found[place] = (
                f"{name}={resource_directory('jobs')}"
                if equals
                else str(resource_directory("jobs"))
            )
    return found
