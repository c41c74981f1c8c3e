"""The promise itself, on small real models: the same bits whatever runs beside a sequence."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_factory import write_model
from support.numpy_model import load_numpy_model

from orcd_batch import LlamaInferenceAdapter, SamplingParams
from orcd_batch.backend.numpy_ops import NumpyOps
from orcd_batch.backend.numpy_sampler import logits_fingerprint
from orcd_batch.engine import Engine, Request
from orcd_batch.model import Weights

MODELS: dict[str, dict[str, Any]] = {
    "grouped": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 64, "intermediate_size": 1024},
    "window": {
        "architecture": "phi3",
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 96,
        "sliding_window": 40,
        "hidden_size": 192,
    },
    "wide": {
        "architecture": "qwen2",
        "hidden_size": 128,
        "intermediate_size": 2048,
        "num_layers": 1,
        "tied": True,
    },
}
Outcome = dict[object, tuple[Any, ...]]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("bitwise") / f"{request.param}.gguf"
    write_model(path, **MODELS[request.param])
    return load_numpy_model(path)


def requests() -> list[Request]:
    generator = random.Random(7)
    common = [generator.randrange(250) for _ in range(130)]
    found = []
    for row in range(9):
        own = [generator.randrange(250) for _ in range(generator.choice([1, 9, 64, 100]))]
        prompt = tuple((common if row % 3 else []) + own)
        params = SamplingParams(
            temperature=(0.0, 1.0, 0.8)[row % 3],
            top_k=(0, 20)[row % 2],
            top_p=(1.0, 0.9)[row % 2],
            repetition_penalty=(1.0, 1.2)[row % 2],
            seed=row,
            max_tokens=generator.choice([1, 5, 12]),
            ignore_eos=True,
        )
        samples = 3 if row in (3, 4) else 1
        found += [Request((row, s), prompt, params, stream=100 * row + s) for s in range(samples)]
    return found


def outcome(model: tuple[Any, Weights], num_threads: int, order: int, **limits: Any) -> Outcome:
    config, weights = model
    ops = NumpyOps(num_threads)
    engine = Engine(config, weights, ops, max_model_len=512, **limits)
    rows = requests()
    random.Random(order).shuffle(rows)
    for row in rows:
        engine.add(row)
    found: Outcome = {}
    while engine.has_unfinished:
        for done in engine.step():
            assert done.error is None
            lists = (done.token_ids, done.fingerprints, done.logprobs, done.margins)
            found[done.key] = tuple(map(tuple, lists))
    engine.close()
    return found


SETTINGS: dict[str, dict[str, Any]] = {
    "one after another": {
        "max_num_seqs": 1,
        "max_num_batched_tokens": 512,
        "num_blocks": 20,
        "prefix_caching": False,
    },
    "tiny chunks": {"max_num_seqs": 3, "max_num_batched_tokens": 5, "num_blocks": 20},
    "all at once": {"max_num_seqs": 32, "max_num_batched_tokens": 4096, "num_blocks": 100},
    "three threads": {
        "num_threads": 3,
        "max_num_seqs": 5,
        "max_num_batched_tokens": 77,
        "num_blocks": 30,
        "prefix_caching": False,
    },
}


@pytest.fixture(scope="module")
def reference(model: Any) -> Outcome:
    return outcome(model, 2, 0, max_num_seqs=4, max_num_batched_tokens=96, num_blocks=40)


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_and_fingerprints_are_the_same_under_other_limits(
    model: Any, reference: Outcome, name: str
) -> None:
    limits = {"num_threads": 1, **SETTINGS[name]}
    assert outcome(model, order=len(name), **limits) == reference


def test_samples_of_one_prompt_differ(reference: Outcome) -> None:
    assert len({reference[4, sample][0] for sample in range(3)}) > 1


@pytest.fixture
def adapter(tmp_path: Path) -> Iterator[LlamaInferenceAdapter]:
    write_model(tmp_path / "m.gguf", num_heads=6, num_kv_heads=2, head_dim=64)
    with LlamaInferenceAdapter.load(tmp_path / "m.gguf", engine="numpy", max_num_seqs=4) as loaded:
        yield loaded


def test_prefill_and_decode_give_the_same_bits(adapter: LlamaInferenceAdapter) -> None:
    ids = list(np.random.default_rng(0).integers(0, 250, 140))
    whole = adapter.prefill(ids)
    start = adapter.prefill(ids[:60])
    assert np.array_equal(start, whole[:60])
    for position in range(60, 140):
        assert np.array_equal(adapter.decode(ids[position]), whole[position])


def test_rows_left_out_of_the_last_layer_change_no_bit_of_the_others(
    adapter: LlamaInferenceAdapter,
) -> None:
    ids = np.random.default_rng(1).integers(0, 250, 100).tolist()
    (done,) = adapter.generate([ids], SamplingParams(max_tokens=3, ignore_eos=True))
    whole = adapter.prefill([*ids, *done.token_ids[:-1]])
    assert done.fingerprints == [logits_fingerprint(row) for row in whole[len(ids) - 1 :]]
