"""Where the tests find things that are not committed, and why a test skips without them."""

import os
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[2]
ORACLE_DIR = REPO_ROOT / "tests" / "oracle"
VOCAB_DIR = REPO_ROOT.parent / "shared" / "vocab"
REAL_MODEL_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
REAL_MODEL_VARIABLE = "ORCD_TEST_MODEL"


def real_model_path() -> Path:
    """The SmolLM2 file: what the environment names, else models/ under the repository root."""
    named = os.environ.get(REAL_MODEL_VARIABLE)
    return Path(named) if named else REPO_ROOT / "models" / REAL_MODEL_NAME


def require_real_model() -> Path:
    """The SmolLM2 file, or a skip that says how to get it."""
    path = real_model_path()
    if not path.is_file():
        pytest.skip(
            f"no real model at {path}; `make demo` fetches it, "
            f"or set {REAL_MODEL_VARIABLE} to a copy of {REAL_MODEL_NAME}"
        )
    return path


def vocabularies(*names: str) -> list[str]:
    """The names to parametrize over: those that are there, else one, whose test then skips."""
    present = [name for name in names if (VOCAB_DIR / f"ggml-vocab-{name}.gguf").is_file()]
    return present or list(names[:1])


def require_vocab(name: str) -> Path:
    """A vocabulary-only GGUF such as "phi-3", or a skip that says where it was looked for.

    The test cases lie beside it as `.gguf.inp` and `.gguf.out`.
    """
    path = VOCAB_DIR / f"ggml-vocab-{name}.gguf"
    if not path.is_file():
        pytest.skip(f"no shared vocabulary at {path}")
    return path
