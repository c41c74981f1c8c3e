"""Tests in this folder need an NVIDIA GPU; they are marked `gpu` and skip, saying why, without."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest


@cache
def _unavailable() -> str | None:
    from orcd_batch.backend.cuda.device import device_unavailable_reason

    return device_unavailable_reason()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := _unavailable()):
        pytest.skip(reason)


@pytest.fixture
def device() -> Iterator[Any]:
    """A device that the test has for itself; its memory is checked to have come back."""
    from orcd_batch.backend.cuda.device import Device

    opened = Device()
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def ops() -> Iterator[Any]:
    """One CudaOps for all op tests: kernels stay compiled, work buffers grow as needed."""
    from orcd_batch.backend.cuda.ops import CudaOps

    opened = CudaOps()
    yield opened
    opened.close()
