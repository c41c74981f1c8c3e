"""llama.cpp and vLLM on the workloads of cuda_workloads.py, where they are installed.

    python benchmarks/peers.py [--model MODEL.gguf --shape phi3] [--workloads w1 w2] [--shrink 1]

Same prompts, lengths, greedy decoding, no early stop; loading is not counted. What is not installed
is said so. --shrink 32 keeps a 32nd of the samples (and no prompt or completion over 64 tokens): a
try on a machine without a GPU, no measurement. Results go to benchmarks/results/.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peer_engines import PEERS, Peer, missing, timed, version_of
from random_models import model_file, models_folder
from results_file import RESULTS, write_results
from true_shapes import SHAPES, Shape
from workloads import WORKLOADS, Work, Workload, limit_s

from orcd_batch.engine_factory import choose_engine

_SHRUNK_TOKENS = 64


def shrunk(workload: Workload, factor: int) -> Workload:
    if factor == 1:
        return workload
    works = workload.works[: max(1, len(workload.works) // factor)]
    short = [Work(w.prompt[:_SHRUNK_TOKENS], min(w.num_new, _SHRUNK_TOKENS)) for w in works]
    return replace(workload, works=short, max_running=min(workload.max_running, len(short)))


def measure(peer: Peer, model: Path, shape: Shape, workload: Workload) -> dict[str, Any]:
    """One row of the table; `error` says why there is none."""
    row: dict[str, Any] = {"engine": peer.name, "workload": workload.name, "what": workload.what}
    try:
        peer.load(model, shape, workload.works, workload.max_running)
    except NotImplementedError as error:
        return row | {"error": str(error)}
    try:
        seconds, tokens = timed(peer, workload.works)
    finally:
        peer.close()
    wanted = sum(work.num_new for work in workload.works)
    if tokens != wanted:
        return row | {"error": f"{tokens} tokens came back of {wanted}"}
    limit = limit_s(workload, shape)
    return row | {
        "seconds": round(seconds, 3),
        "tokens_per_s": round(workload.num_counted / seconds, 1),
        "limit_tokens_per_s": round(workload.num_counted / limit, 1),
        "share_of_limit": round(limit / seconds, 4),
    }


def told(row: dict[str, Any]) -> str:
    start = f"{row['engine']:30} {row['workload']}"
    if "error" in row:
        return f"{start} {row['error']}"
    return (
        f"{start} {row['tokens_per_s']:>10,.0f} tokens/s, {row['share_of_limit']:.0%} of an H200's "
        f"{row['limit_tokens_per_s']:,.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="default: random weights of the shape")
    parser.add_argument("--shape", choices=SHAPES, default="phi3")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    reasons = {peer.name: missing(peer) for peer in PEERS}
    present = [peer for peer in PEERS if reasons[peer.name] is None]
    rows = []
    with models_folder(None) as folder:
        model = options.model
        if model is None and present:
            model = model_file(options.shape, folder)
        for peer in present:
            for workload in options.workloads:
                chosen = shrunk(WORKLOADS[workload](), options.shrink)
                rows.append(measure(peer, model, SHAPES[options.shape], chosen))
                print(told(rows[-1]), flush=True)
    for reason in filter(None, reasons.values()):
        print(f"{reason}.")
    if rows:
        facts = {
            "shape": options.shape,
            "shrink": options.shrink,
            "versions": [version_of(peer) for peer in present],
            "rows": rows,
        }
        write_results(options.results, "peers", choose_engine("auto"), facts)
    print(json.dumps({"rows": len(rows), "missing": [r for r in reasons.values() if r]}))


if __name__ == "__main__":
    main()
