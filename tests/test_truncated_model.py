"""A model file cut short after it was opened: an error that says so, never a dead process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.gguf_factory import write_model
from support.paths import REPO_ROOT

# In a process of its own: touching the mapping beyond the file's end would kill it.
LOAD = """
from orcd_batch.backend.numpy_ops import NumpyOps
from orcd_batch.model import load_weights
load_weights(gguf, weight_map(gguf, config), config, NumpyOps())
"""
HASH = """
from orcd_batch.checkpoint.content_hash import model_hash
model_hash(gguf)
"""
SCRIPT = """
import os, sys
from orcd_batch.checkpoint import GGUFFile, read_model_config, weight_map
from orcd_batch.errors import CheckpointError
path, left = sys.argv[1], int(sys.argv[2])
with GGUFFile.open(path) as gguf:
    config = read_model_config(gguf)
    os.truncate(path, left)
    try:
{body}
    except CheckpointError as error:
        print(error)
"""


@pytest.mark.parametrize("body", [LOAD, HASH], ids=["load", "hash"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.999])
def test_a_model_file_cut_short_after_it_was_opened_is_an_error(
    tmp_path: Path, body: str, share: float
) -> None:
    path = tmp_path / "tiny.gguf"
    write_model(path, num_layers=2, hidden_size=128, num_heads=2, num_kv_heads=1,
                intermediate_size=256, context_length=64)  # fmt: skip
    left = int(os.stat(path).st_size * share)
    script = SCRIPT.format(body="\n".join(f"        {line}" for line in body.splitlines()))
    done = subprocess.run([sys.executable, "-c", script, str(path), str(left)], cwd=REPO_ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    assert f"tiny.gguf ends at byte {left:,}" in done.stdout, done.stdout
    assert "it was cut short while it was read; fetch it again." in done.stdout
