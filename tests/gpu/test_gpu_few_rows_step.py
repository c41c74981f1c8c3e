"""A decode step as one kernel has the bits of its ops launched one by one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_factory import write_model

from orcd_batch import SamplingParams
from orcd_batch.backend.cuda import few_rows_step
from orcd_batch.backend.cuda.few_rows_step import FewRowsStep
from orcd_batch.backend.cuda.step_program import Recording
from orcd_batch.backend.cuda.step_slots import StepSlots
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


@pytest.mark.parametrize("layer", [0, 2])
def test_a_kernel_that_leaves_other_keys_in_the_cache_is_not_used(
    path: Path, expected: dict[int, Bits], layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = FewRowsStep._launch

    def forgetful(self: FewRowsStep, recording: Recording, batch: Any) -> None:
        launch(self, recording, batch)
        places = self._ops.staging.fetch(batch.slot_mapping)
        StepSlots(self._device, recording.caches[layer : layer + 1], places).poison()

    monkeypatch.setattr(FewRowsStep, "_launch", forgetful)
    found, verdicts = run(path, requests(2, 350), whole=True)
    assert verdicts, "no step ran as one kernel"
    assert not any(verdicts.values()), "one that forgets what it is to keep was found equal"
    assert found == expected[2]
