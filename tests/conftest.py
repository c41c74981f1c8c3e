"""Fixtures that several rooms share."""

from pathlib import Path

import pytest
from support.paths import require_real_model


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct in Q4_1; the test skips, saying so, where the file is not there."""
    return require_real_model()
