"""A fault on the GPU ends the run with a sentence and an exit code, whatever fails after it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from support.gguf_factory import write_model
from support.paths import REPO_ROOT

from orcd_batch import SamplingParams
from orcd_batch.backend.op_times import TIMED_OPS
from orcd_batch.checkpoint import GGUFFile, read_model_config
from orcd_batch.config import EngineOptions
from orcd_batch.engine.request import Request
from orcd_batch.engine_factory import OpenModel, build_engine, choose_engine

# The command line with one op that writes to an address nobody owns.
FAULTY_RUN = """
import sys
from cuda.core import LaunchConfig, Program, ProgramOptions, launch
from orcd_batch import cli
from orcd_batch.backend.cuda.ops import CudaOps

gated_linear = CudaOps.gated_linear

def faulty(self, x, weight):
    source = 'extern "C" __global__ void fault(int* nowhere) { *nowhere = 1; }'
    program = Program(source, "c++", ProgramOptions(arch=self.device.arch))
    kernel = program.compile("cubin").get_kernel("fault")
    launch(self.device.stream, LaunchConfig(grid=1, block=1), kernel, 16)
    return gated_linear(self, x, weight)

CudaOps.gated_linear = faulty
sys.exit(cli.main(sys.argv[1:]))
"""

# The command line with a step kernel whose blocks lose patience as soon as they have to wait.
IMPATIENT_RUN = """
import sys
from orcd_batch import cli
from orcd_batch.backend.cuda import few_rows_step

few_rows_step.SPIN_LIMIT = 1
sys.exit(cli.main(sys.argv[1:]))
"""


def run_program(program: str, folder: Path, **model: Any) -> subprocess.CompletedProcess[str]:
    """The command line, changed by `program`, over two prompts."""
    facts = {"num_layers": 1, "hidden_size": 64, "num_heads": 1, "num_kv_heads": 1,
             "intermediate_size": 64, "context_length": 128, **model}  # fmt: skip
    write_model(folder / "tiny.gguf", **facts)
    pq.write_table(pa.table({"prompt": ["one", "two"]}), folder / "in.parquet")
    options = (f'model.path="{folder}/tiny.gguf"', f'data="{folder}/in.parquet"')
    return subprocess.run(
        [sys.executable, "-c", program, "model=smollm2", "engine=cuda", "model.chat=false",
         "engine.kv_cache_bytes=100000000", "output=out.parquet", *options],
        capture_output=True, text=True, cwd=folder, timeout=120,
        env={**os.environ, "PYTHONPATH": f"{REPO_ROOT}:{':'.join(sys.path)}"},
    )  # fmt: skip


def test_an_illegal_address_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    done = run_program(FAULTY_RUN, tmp_path)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    said = next(line for line in done.stderr.splitlines() if line.startswith("orcd-batch: "))
    assert said.startswith("orcd-batch: The GPU reported CUDA_ERROR_ILLEGAL_ADDRESS"), said
    assert said.endswith("Run the same command again; if it fails again, test the card.")
    assert not (tmp_path / "out.parquet").exists()


def test_a_step_whose_blocks_wait_too_long_ends_the_run_instead_of_hanging(tmp_path: Path) -> None:
    facts = {"hidden_size": 128, "intermediate_size": 256, "tokenizer": "llama"}
    done = run_program(IMPATIENT_RUN, tmp_path, **facts)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "orcd-batch: The GPU reported CUDA_ERROR_" in done.stderr, done.stderr[-3000:]


def test_closing_after_a_fault_tries_everything_and_tells_the_first_failure() -> None:
    script = """
from cuda.core import LaunchConfig, Program, ProgramOptions, launch
import numpy as np
from orcd_batch.backend.cuda.ops import CudaOps
from orcd_batch.errors import DeviceError

ops = CudaOps()
ops.staging.place("a", [np.zeros(9)])
source = 'extern "C" __global__ void fault(int* nowhere) { *nowhere = 1; }'
kernel = Program(source, "c++", ProgramOptions(arch=ops.device.arch)).compile("cubin")
launch(ops.device.stream, LaunchConfig(grid=1, block=1), kernel.get_kernel("fault"), 16)
for call in (ops.device.synchronize, lambda: ops.staging.place("a", [np.zeros(9)]), ops.close):
    try:
        call()
    except DeviceError as error:
        print(error)
print("buffers left", ops.device.memory_by_use())
ops.close()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          cwd=REPO_ROOT, timeout=120)  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(lines) == 4, done.stdout + done.stderr
    assert all("CUDA_ERROR_ILLEGAL_ADDRESS" in line for line in lines[:3]), done.stdout
    assert lines[3] == "buffers left {}"


def test_under_debug_every_op_is_timed_and_no_bit_changes(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_model(path, num_layers=2, hidden_size=128, num_heads=2, num_kv_heads=1,
                intermediate_size=128, context_length=256)  # fmt: skip
    options = EngineOptions(kind="cuda", kv_cache_bytes=100_000_000, graphs=True)
    found, tables = [], []
    for debug in (False, True):
        with GGUFFile.open(path) as gguf:
            model = OpenModel(gguf, read_model_config(gguf))
            with build_engine(model, options, choose_engine("cuda"), debug=debug) as built:
                for index in range(3):
                    built.engine.add(
                        Request(index, (5, 6, 7 + index), SamplingParams(max_tokens=20))
                    )
                done = []
                while built.engine.has_unfinished:
                    done += built.engine.step()
                tables.append(built.describe()["backend"]["op_times"])
        found.append(sorted((d.key, tuple(d.token_ids), tuple(d.fingerprints)) for d in done))
    assert found[0] == found[1]
    assert tables[0] is None
    assert set(tables[1]) == {*TIMED_OPS} - {"place"}
    calls = {op: row["calls"] for op, row in tables[1].items()}
    assert calls["linear"] == calls["attention"] == calls["gated_linear"] > 20
    assert all(row["seconds"] > 0 for row in tables[1].values())
