"""A short job that launches every kernel, small enough for compute-sanitizer's racecheck."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_factory import write_model

from orcd_batch import SamplingParams
from orcd_batch.backend.cuda import attention
from orcd_batch.backend.cuda.gated_linear import gated_linear, gated_tiles, swiglu
from orcd_batch.backend.cuda.gemm_k16 import gemm_k16
from orcd_batch.backend.cuda.ops import CudaOps
from orcd_batch.backend.cuda.product import Output
from orcd_batch.backend.cuda.program import Kernels, LoadedKernel, kernel_dir
from orcd_batch.checkpoint import GGUFFile, read_model_config
from orcd_batch.config import EngineOptions
from orcd_batch.engine.request import Request
from orcd_batch.engine_factory import OpenModel, build_engine, choose_engine

# Head dims 96 and 64; with biases and grouped heads, without, and with a sliding window. Only the
# first has a vocabulary of whole tiles, which a step as one kernel needs.
MODELS: dict[str, dict[str, Any]] = {
    "phi3": {
        "hidden_size": 192,
        "num_heads": 2,
        "num_kv_heads": 2,
        "tensor_type": "Q4_0",
        "tokenizer": "llama",
    },
    "qwen2": {"hidden_size": 256, "num_heads": 4, "num_kv_heads": 1, "tensor_type": "Q4_K"},
    "llama": {"hidden_size": 128, "num_heads": 1, "num_kv_heads": 1, "sliding_window": 70},
}
PARAMS = (
    SamplingParams(max_tokens=4, ignore_eos=True),
    SamplingParams(max_tokens=4, temperature=0.9, top_p=0.9, seed=3, ignore_eos=True),
    SamplingParams(max_tokens=4, temperature=1.2, top_k=20, repetition_penalty=1.1, seed=4),
)
# Asked for where no product was ever chosen before: the self-test's reference.
SELF_TEST_KERNELS = {"gemm_k16"}
# One query alone, a chunk and a bit, and a split of attention shared by two samples and more.
LENGTHS = (3, 70, 270, 270)
Bits = dict[object, tuple[list[int], list[int]]]


@dataclass(slots=True)
class Launched:
    """Kernels that the tests of this file have launched in this process, and what ran."""

    kernels: set[str] = field(default_factory=set)
    models: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def launched() -> Iterator[Launched]:
    found, names = Launched(), dict[int, str]()
    get, launch = Kernels.get, Kernels.launch

    def remembering(self: Kernels, name: str, *arguments: Any, **named: Any) -> Any:
        kernel = get(self, name, *arguments, **named)
        names[id(kernel)] = name
        return kernel

    def noting(self: Kernels, kernel: LoadedKernel, *arguments: Any, **named: Any) -> None:
        found.kernels.add(names[id(kernel)])
        launch(self, kernel, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernels, "get", remembering)
        patch.setattr(Kernels, "launch", noting)
        yield found


def requests() -> list[Request]:
    tokens = np.random.default_rng(0).integers(5, 200, max(LENGTHS)).tolist()
    return [
        Request(index, tuple(tokens[:length]), PARAMS[index % len(PARAMS)], stream=index)
        for index, length in enumerate(LENGTHS)
    ]


def run(path: Path, **options: Any) -> Bits:
    found: Bits = {}
    with GGUFFile.open(path) as gguf:
        model = OpenModel(gguf, read_model_config(gguf))
        limits = EngineOptions(kind="cuda", max_num_batched_tokens=128, **options)
        with build_engine(model, limits, choose_engine("cuda")) as built:
            for request in requests():
                built.engine.add(request)
            while built.engine.has_unfinished:
                for done in built.engine.step():
                    assert done.error is None
                    found[done.key] = (done.token_ids, done.fingerprints)
    return found


@pytest.mark.parametrize("architecture", MODELS)
def test_a_short_job_has_its_bits_whatever_kernels_compute_it(
    architecture: str,
    tmp_path: Path,
    launched: Launched,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "tiny.gguf"
    write_model(
        path,
        architecture,
        num_layers=1,
        intermediate_size=256,
        context_length=512,
        **MODELS[architecture],
    )
    together = run(path, max_num_seqs=16, kv_cache_bytes=4_000_000)
    assert len(together) == len(LENGTHS)
    monkeypatch.setattr(attention, "USE_WGMMA", False)
    assert run(path, max_num_seqs=1, kv_cache_bytes=4_000_000) == together
    launched.models.add(architecture)


@pytest.mark.parametrize("num_rows", [5, 130])
def test_both_ways_to_gate_have_the_same_bits(launched: Launched, num_rows: int) -> None:
    """Which of them a job takes is decided by time."""
    ops = CudaOps()
    rng = np.random.default_rng(num_rows)
    shapes = ((num_rows, 192), (2 * 136, 192))
    x, weight = ops.staging.place("operands", [rng.random(s).astype(np.float16) for s in shapes])
    gate_up = ops.workspace.take("gate_up", (num_rows, 2 * 136), weight.dtype)
    expected = ops.workspace.take("expected", (num_rows, 136), weight.dtype)
    gemm_k16(ops.kernels, x, weight, gate_up, Output.FP16)
    swiglu(ops.kernels, gate_up, expected)
    for tile in gated_tiles(ops.device, weight.shape, num_rows):
        y = ops.workspace.take("gated", expected.shape, weight.dtype)
        gated_linear(ops.kernels, tile, x, weight, y)
        np.testing.assert_array_equal(ops.to_host(y), ops.to_host(expected))
    ops.close()
    launched.models.add("gated")


def test_no_kernel_was_left_out(launched: Launched) -> None:
    if launched.models != {*MODELS, "gated"}:
        pytest.skip("the tests above did not all run in this process")
    kernels = {path.stem for path in kernel_dir().glob("*.cu")} - SELF_TEST_KERNELS
    assert kernels - launched.kernels == set()
