"""BLAS stays at one thread until the last model that relies on it is closed."""

import numpy as np  # noqa: F401  (loads its BLAS)
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from orcd_batch.backend.blas_limit import BlasLimit


def blas_threads() -> list[int]:
    return [info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"]


def test_the_limit_ends_with_its_last_holder_and_no_sooner() -> None:
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        if set(before) != {2}:
            pytest.skip(f"BLAS here cannot be set to two threads: {before}")
        first, second = BlasLimit(), BlasLimit()
        assert set(blas_threads()) == {1}
        first.release()
        first.release()
        assert set(blas_threads()) == {1}
        second.release()
        assert blas_threads() == before
