"""Loading speed: raw tensors of a page-cached file to proven fp16 weights on the GPU.

Run on a GPU machine: `python benchmarks/cuda_load.py [--gigabytes 7.6]`. The file lies in shared
memory, so that only the path from host memory to the GPU is measured.
"""

import argparse
import json
import mmap
import sys
import tempfile
import time
from io import FileIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from results_file import RESULTS, write_results

from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.cuda.loader import Loader
from orcd_batch.backend.cuda.program import Kernels
from orcd_batch.backend.cuda.tensor_types import row_bytes
from orcd_batch.backend.ops import TensorPart
from orcd_batch.engine_factory import choose_engine

PCIE_BYTES_PER_S = 55e9
SHAPE = (16384, 3072)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=7.6)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    num_bytes = int(options.gigabytes * 1e9)
    results = []
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        pattern = np.random.default_rng(0).integers(0, 60, 64 << 20, dtype=np.uint8).tobytes()
        for _ in range(-(-num_bytes // len(pattern))):
            file.write(pattern)
        file.flush()
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            data = np.frombuffer(mapped, np.uint8)
            with FileIO(file.fileno(), closefd=False) as opened:
                for ggml_type in ("F16", "F16", "Q8_0", "Q4_K"):
                    results.append(load(data, opened, ggml_type))
                    print(" ".join(f"{key}={value}" for key, value in results[-1].items()))
            del data
    write_results(options.results, "load", choose_engine("cuda"), {"rows": results})
    print(json.dumps(results))


def load(data: np.ndarray, file: FileIO, ggml_type: str) -> dict:
    device = Device()
    loader = Loader(device, Kernels(device))
    size = SHAPE[0] * row_bytes(ggml_type, SHAPE[1])
    started = time.perf_counter()
    for start in range(0, data.nbytes - size + 1, size):
        raw = data[start : start + size]
        part = TensorPart(f"at {start}", raw, ggml_type, SHAPE, file=file, offset=start)
        loader.load_linear([part])
    queued = time.perf_counter() - started
    statistics = loader.finish()
    seconds = time.perf_counter() - started
    device.close()
    return {
        "type": ggml_type,
        "seconds": round(seconds, 3),
        "until_queued_s": round(queued, 3),
        "gb_per_s": round(statistics["file_bytes"] / seconds / 1e9, 1),
        "share_of_pcie": round(statistics["file_bytes"] / seconds / PCIE_BYTES_PER_S, 2),
    }


if __name__ == "__main__":
    main()
