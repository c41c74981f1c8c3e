"""A built wheel carries everything that a checkout has."""

import tomllib

from support.paths import REPO_ROOT


def test_every_room_and_resource_is_packaged():
    setuptools = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = {
        ".".join(path.parent.relative_to(REPO_ROOT).parts)
        for path in (REPO_ROOT / "orcd_batch").rglob("*.py")
    }
    resources = {"orcd_batch.conf", "orcd_batch.jobs", "orcd_batch.kernels"}
    assert set(setuptools["packages"]) == rooms | resources
    for name in resources:
        folder = REPO_ROOT / setuptools["package-dir"][name]
        patterns = setuptools["package-data"][name]
        packaged = {path for pattern in patterns for path in folder.glob(pattern)}
        assert packaged == {path for path in folder.rglob("*") if path.is_file()}
