"""Matrix products of Phi-3-mini on the GPU: the proven choice, gemm_k16, and split-K beside them.

Run on a GPU machine: `python benchmarks/cuda_linear.py [--rows 1,16,256,4096]`. Times are GPU
times of graph replays with weights taken in turn, so that none is in the L2 cache.
"""

import argparse
import json
import sys
import time
from functools import partial

import numpy as np

from orcd_batch.backend.cuda.array import FP16, FP32
from orcd_batch.backend.cuda.cublas import ANY_REDUCTION, CublasLt
from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.cuda.gemm_k16 import gemm_k16
from orcd_batch.backend.cuda.program import Kernels
from orcd_batch.backend.cuda.self_test import SelfTest
from orcd_batch.backend.cuda.workspace import Workspace

READ_BYTES_PER_S = 4.66e12
FLOPS = 780e12
SHAPES = {
    "attn_qkv": (9216, 3072),
    "attn_output": (3072, 3072),
    "ffn_gate_up": (16384, 3072),
    "ffn_down": (3072, 8192),
    "output": (32064, 3072),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,16,64,128,256,512,1024,4096")
    rows = [int(text) for text in parser.parse_args().rows.split(",")]
    device = Device()
    kernels = Kernels(device)
    library = CublasLt(device)
    workspace = Workspace(device)
    results = []
    print(f"{device.name}, cuBLASLt {library.version}", file=sys.stderr)
    for name, (n, k) in SHAPES.items():
        weights = random_weights(device, n, k)
        y = workspace.take("y", (max(rows), n), FP32)
        test = SelfTest(device, kernels, weights, y)
        for num_rows in rows:
            started = time.perf_counter()
            best, record = test.choose(library, num_rows, num_rows)
            tested_s = time.perf_counter() - started
            own = test.time(num_rows, partial(gemm_k16, kernels), 10)
            seconds = own if best is None else test.time(num_rows, partial(library.run, best))
            anything = test.by_time(
                library, library.offers(num_rows, (n, k), ANY_REDUCTION), num_rows
            )
            unfaithful = test.time(num_rows, partial(library.run, anything[0]))
            limit = max(n * k * 2 / READ_BYTES_PER_S, 2 * num_rows * n * k / FLOPS)
            row = {
                "linear": name,
                "M": num_rows,
                "us": round(seconds * 1e6, 1),
                "share_of_limit": round(limit / seconds, 2),
                "gb_per_s": round(n * k * 2 / seconds / 1e9),
                "tflops": round(2 * num_rows * n * k / seconds / 1e12, 1),
                "split_k_allowed_us": round(unfaithful * 1e6, 1),
                "gemm_k16_us": round(own * 1e6, 1),
                "equal": record["equal_to_gemm_k16"],
                "dropped": [config["ID"] for config in record["dropped"]],
                "test_s": round(tested_s, 3),
            }
            results.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), file=sys.stderr)
        test.close()
        device.free_use("weights")
    library.close()
    device.close()
    print(json.dumps(results))


def random_weights(device: Device, n: int, k: int) -> list:
    from cuda.bindings import driver

    from orcd_batch.backend.cuda.array import DeviceArray
    from orcd_batch.backend.cuda.driver import call

    values = (np.random.default_rng(0).standard_normal((n, k), np.float32) * 0.05).astype(FP16)
    weights = []
    for _ in range(max(2, -(-(256 << 20) // values.nbytes))):
        buffer = device.allocate(values.nbytes, "weights")
        call(driver.cuMemcpyHtoD(buffer.ptr, values.ctypes.data, values.nbytes))
        weights.append(DeviceArray(buffer.ptr, (n, k), FP16))
    return weights


if __name__ == "__main__":
    main()
