"""A small share of the fuzzing in the default run; `make fuzz` does the rest."""

import os
import subprocess
import sys

from support.paths import REPO_ROOT


def test_1000_mutated_files_give_a_typed_error_or_a_valid_result() -> None:
    command = [sys.executable, str(REPO_ROOT / "tests" / "fuzz_gguf.py"), "--count", "1000"]
    path = os.pathsep.join(filter(None, [str(REPO_ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1000 mutated GGUF files, 0 failures" in result.stdout
