"""A decode step as one kernel has the bits of its ops launched one by one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver
from support.cache_contents import contents, fill
from support.gguf_factory import write_model

from orcd_batch import SamplingParams
from orcd_batch.backend.cuda import few_rows_step, step_slots
from orcd_batch.backend.cuda.driver import call
from orcd_batch.backend.cuda.few_rows_step import FewRowsStep
from orcd_batch.backend.cuda.ops import CudaOps
from orcd_batch.backend.cuda.step_program import Recording
from orcd_batch.backend.cuda.step_slots import StepSlots
from orcd_batch.backend.ops import BLOCK_SIZE, KVCache
from orcd_batch.checkpoint import GGUFFile, read_model_config
from orcd_batch.config import EngineOptions
from orcd_batch.engine.request import Completion, Request
from orcd_batch.engine_factory import OpenModel, build_engine, choose_engine

MODELS: dict[str, dict[str, Any]] = {
    "phi3": {"hidden_size": 384, "num_heads": 4, "num_kv_heads": 4},
    "window": {"hidden_size": 384, "num_heads": 4, "num_kv_heads": 4, "sliding_window": 100},
    "llama": {"hidden_size": 256, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64},
    # Several rounds of chains, over all of a block's warps and then over fewer.
    "wide": {"hidden_size": 1536, "num_heads": 16, "num_kv_heads": 16, "intermediate_size": 8960},
}
Bits = dict[int, tuple[list[int], list[int], list[float]]]


@pytest.fixture(scope="module", params=MODELS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("model") / f"{request.param}.gguf"
    facts = {"intermediate_size": 512, "tensor_type": "F16", **MODELS[request.param]}
    architecture = "llama" if request.param == "llama" else "phi3"
    write_model(target, architecture, num_layers=3, context_length=1024, tokenizer="llama", **facts)
    return target


def requests(count: int, longest: int) -> list[Request]:
    rng = np.random.default_rng(count)
    lengths = [longest, *(int(n) for n in rng.integers(1, longest, count - 1))]
    return [
        Request(
            index,
            tuple(int(token) for token in rng.integers(5, 300, length)),
            SamplingParams(max_tokens=70, temperature=0.7 * (index % 2), seed=9, ignore_eos=True),
            stream=index,
        )
        for index, length in enumerate(lengths)
    ]


def run(path: Path, todo: list[Request], *, whole: bool) -> tuple[Bits, dict[str, bool]]:
    """What the engine generates, and what it found of whole steps, if they may run."""
    options = EngineOptions(kind="cuda", max_num_seqs=len(todo), max_num_batched_tokens=1024)
    with GGUFFile.open(path) as gguf:
        source = OpenModel(gguf, read_model_config(gguf))
        built = build_engine(source, options, choose_engine("cuda"))
    with built, pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows_step, "USE_FEW_ROWS_STEP", whole)
        done: list[Completion] = []
        for request in todo:
            built.engine.add(request)
        while built.engine.has_unfinished:
            done += built.engine.step()
        assert not [completion.error for completion in done if completion.error]
        found = {int(str(c.key)): (c.token_ids, c.fingerprints, c.logprobs) for c in done}
        return found, built.ops.manifest()["few_rows_step"]


@pytest.fixture(scope="module")
def expected(path: Path) -> dict[int, Bits]:
    return {count: run(path, requests(count, 700 // count), whole=False)[0] for count in (1, 2)}


@pytest.mark.parametrize("count", [1, 2])
def test_a_step_as_one_kernel_has_the_same_bits(
    path: Path, expected: dict[int, Bits], count: int
) -> None:
    found, verdicts = run(path, requests(count, 700 // count), whole=True)
    assert verdicts, "no step ran as one kernel"
    assert all(verdicts.values()), verdicts
    assert found == expected[count]


def spoiling(layer: int, value: int, slots: str) -> Callable[..., None]:
    """FewRowsStep._launch, after which a layer's slots hold other bytes, as if the kernel had left
    them so."""
    launch = FewRowsStep._launch

    def spoiled(self: FewRowsStep, recording: Recording, batch: Any) -> None:
        launch(self, recording, batch)
        places = self._ops.staging.fetch(batch.slot_mapping)
        cache = self._ops.caches[layer]
        kept = {"keys": [cache.keys], "values": [cache.values], "both": [cache.keys, cache.values]}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_slots, "POISON", value)
            for array in kept[slots]:
                StepSlots(self._device, [KVCache(array, array)], places[-1:]).poison()

    return spoiled


@pytest.mark.parametrize(
    ("layer", "value", "slots"), [(0, 0xFF, "both"), (2, 0xFF, "values"), (1, 0x00, "keys")]
)
def test_a_kernel_that_leaves_other_keys_or_values_in_the_cache_is_not_used(
    path: Path,
    expected: dict[int, Bits],
    layer: int,
    value: int,
    slots: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FewRowsStep, "_launch", spoiling(layer, value, slots))
    found, verdicts = run(path, requests(2, 350), whole=True)
    assert verdicts, "no step ran as one kernel"
    assert not any(verdicts.values()), "one that leaves something else was found equal"
    assert found == expected[2]


def test_a_kernel_that_writes_no_cache_is_not_used(
    path: Path, expected: dict[int, Bits], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = FewRowsStep._launch

    def elsewhere(self: FewRowsStep, recording: Recording, batch: Any) -> None:
        # The last block, which nothing of so small a job is given.
        last = self._ops.caches[0].keys.shape[0] * BLOCK_SIZE - 1
        slots, place = self._ops.staging.fetch(batch.slot_mapping), batch.slot_mapping.ptr
        other = np.full_like(slots, last)
        call(driver.cuMemcpyHtoD(place, other.ctypes.data, other.nbytes))
        launch(self, recording, batch)
        self._device.synchronize()
        call(driver.cuMemcpyHtoD(place, slots.ctypes.data, slots.nbytes))

    monkeypatch.setattr(FewRowsStep, "_launch", elsewhere)
    found, verdicts = run(path, requests(1, 700), whole=True)
    assert verdicts, "no step ran as one kernel"
    assert not any(verdicts.values()), "the cache held what the launches had left"
    assert found == expected[1]


def test_just_the_slots_of_a_step_are_read_and_poisoned() -> None:
    ops = CudaOps()
    try:
        caches = ops.allocate_kv_cache(2, 5, 3, 64)
        shape = (2, 2, 5, 3, BLOCK_SIZE, 64)
        before = np.random.default_rng(0).integers(0, 1 << 16, shape).astype(np.uint16)
        fill(ops, caches, before)
        slots = StepSlots(ops.device, caches, np.array([3 * BLOCK_SIZE + 7, -1, 63], np.int32))
        picked = [before[:, :, 3, :, 7], before[:, :, 0, :, 63]]
        assert slots.read() == np.stack(picked, axis=2).tobytes()
        slots.poison()
        before[:, :, 3, :, 7] = before[:, :, 0, :, 63] = 0xFFFF
        np.testing.assert_array_equal(contents(ops, caches), before)
    finally:
        ops.close()
