"""Matrix products of Phi-3-mini on the GPU, and what determinism costs beside split-K.

Run on a GPU machine: `python benchmarks/cuda_linear.py [--rows 1,64,256,1024,8192]`. Times are GPU
times of graph replays with weights taken in turn, so that none is in the L2 cache; the proven
product and the fastest of all that cuBLASLt offers, split-K included, are timed in turn, with the
activation behind it for gate and up. The cost of a step adds its products up: a decode step of M
rows has the output projection, a prefill not.
Up to 8 rows every time is that of the product and a small kernel before it, as in a step.
`--lasting` also times the fastest of a short run where each goes on, which brings the card to its
power limit: what steps of many rows find.
"""

import argparse
import json
import sys
import time
from functools import partial
from typing import Any

import numpy as np

from orcd_batch.backend.cuda.array import FP16, DeviceArray
from orcd_batch.backend.cuda.candidates import Candidates
from orcd_batch.backend.cuda.cublas import ANY_REDUCTION, CublasLt
from orcd_batch.backend.cuda.device import Device
from orcd_batch.backend.cuda.product import Key, Output
from orcd_batch.backend.cuda.program import Kernels
from orcd_batch.backend.cuda.self_test import Candidate, SelfTest
from orcd_batch.backend.cuda.workspace import Workspace

READ_BYTES_PER_S = 4.66e12
FLOPS = 780e12
LAYERS = 32
SHAPES: dict[str, Key] = {
    "attn_qkv": (9216, 3072, Output.FP16),
    "attn_output": (3072, 3072, Output.ADD),
    "ffn_gate_up": (16384, 3072, Output.GATED),
    "ffn_down": (3072, 8192, Output.ADD),
    "output": (32064, 3072, Output.FP32),
}
# A step's rows from which on it is a prefill step, and rows beyond which no step has logits.
PREFILL_ROWS = 1024
MOST_LOGITS = 512
MOST_LASTING = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,64,256,1024,8192")
    parser.add_argument("--lasting", action="store_true")
    options = parser.parse_args()
    rows = [int(text) for text in options.rows.split(",")]
    device = Device()
    kernels = Kernels(device)
    ways = Candidates(device, kernels, Workspace(device))
    library = CublasLt(device)
    print(f"{device.name}, cuBLASLt {library.version}", file=sys.stderr)
    results = []
    for name, key in SHAPES.items():
        weights = random_weights(device, key[0], key[1])
        wanted = [m for m in rows if m <= MOST_LOGITS or key[2] is not Output.FP32]
        n, _, output = key
        shape = (max(wanted), output.num_columns(n))
        buffer = device.allocate(shape[0] * shape[1] * output.dtype.itemsize, "staging")
        y = DeviceArray(buffer.ptr, shape, output.dtype)
        between = ways.between(shape[0], n, output)
        test = SelfTest(device, kernels, weights, y, output, ways.reference(output), between)
        for m in wanted:
            row = measure(test, ways, library, name, key, m)
            more = {"lasting": measure_lasting(test, ways, key, m)} if options.lasting else {}
            results.append(row | more)
        test.close()
        device.free(buffer)
        device.free_use("weights")
    costs = {step_name(m): step_cost(results, m) for m in rows}
    for name in SHAPES:
        mine = ((r["M"], r["cost"]) for r in results if r["linear"] == name)
        print(f"cost of {name}: " + ", ".join(f"M={m} {cost:.1%}" for m, cost in mine))
    for step, cost in costs.items():
        print(f"cost of determinism, {step}: {cost:.1%}")
    library.close()
    ways.close()
    device.close()
    print(json.dumps({"products": results, "cost": costs}))


def measure(
    test: SelfTest, ways: Candidates, library: CublasLt, name: str, key: Key, num_rows: int
) -> dict[str, Any]:
    """One product: the proven choice beside whatever is fastest."""
    n, k, output = key
    started = time.perf_counter()
    best, record = test.choose(ways.offered(key, num_rows), num_rows, num_rows)
    tested_s = time.perf_counter() - started
    product = Output.FP16 if output is Output.GATED else output
    offers = library.offers(num_rows, (n, k), product, ANY_REDUCTION)
    found = [candidate_of(library, algorithm, product) for algorithm in offers]
    anything = test.by_time(
        [ways.gated(c) for c in found] if output is Output.GATED else found, num_rows
    )
    proven = best or Candidate("", "gemm_k16", test.reference)
    seconds, *others = test.times([proven, *anything[:5]], num_rows)
    limit = max(n * k * 2 / READ_BYTES_PER_S, 2 * num_rows * n * k / FLOPS)
    row = {
        "linear": name,
        "M": num_rows,
        "us": round(seconds * 1e6, 1),
        "share_of_limit": round(limit / seconds, 2),
        "gb_per_s": round(n * k * 2 / seconds / 1e9),
        "tflops": round(2 * num_rows * n * k / seconds / 1e12, 1),
        "anything_us": round(min([seconds, *others]) * 1e6, 1),
        "cost": round(seconds / min([seconds, *others]) - 1, 4),
        "chosen": proven.config if isinstance(proven.config, str) else proven.config["ID"],
        "equal": record["equal_to_gemm_k16"],
        "dropped": len(record["dropped"]),
        "test_s": round(tested_s, 3),
    }
    print(" ".join(f"{key}={value}" for key, value in row.items()), file=sys.stderr)
    return row


def measure_lasting(
    test: SelfTest, ways: Candidates, key: Key, num_rows: int
) -> list[dict[str, Any]]:
    """The fastest of a short run, each for a while; whether their bits are right is not asked."""
    n, k, _ = key
    fastest = test.by_time(ways.offered(key, num_rows), num_rows)[:MOST_LASTING]
    rows = []
    for way, seconds in zip(fastest, test.lasting_times(fastest, num_rows), strict=True):
        tflops = round(2 * num_rows * n * k / seconds / 1e12, 1)
        rows.append({"us": round(seconds * 1e6, 1), "tflops": tflops, "config": way.config})
        print("  lasting", " ".join(f"{key}={value}" for key, value in rows[-1].items()),
              file=sys.stderr)  # fmt: skip
    return rows


def candidate_of(library: CublasLt, algorithm: Any, output: Output) -> Candidate:
    run = partial(library.run, algorithm, output=output)
    return Candidate(algorithm.code, algorithm.config, run)


def step_name(num_rows: int) -> str:
    return f"{'prefill' if num_rows >= PREFILL_ROWS else 'decode'} step of {num_rows}"


def step_cost(results: list[dict[str, Any]], num_rows: int) -> float:
    """How much longer the products of such a step take, as a share."""
    weight = dict.fromkeys(SHAPES, LAYERS) | {"output": int(num_rows < PREFILL_ROWS)}
    mine = [(weight[r["linear"]], r) for r in results if r["M"] == num_rows]
    proven = sum(count * r["us"] for count, r in mine)
    return round(proven / sum(count * r["anything_us"] for count, r in mine) - 1, 4)


def random_weights(device: Device, n: int, k: int) -> list[DeviceArray]:
    from cuda.bindings import driver

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
