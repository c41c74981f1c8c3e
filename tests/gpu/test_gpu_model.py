"""Whole small models on the GPU: near the numpy engine, and the same bits however they are run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_factory import write_model

from orcd_batch import SamplingParams
from orcd_batch.checkpoint import GGUFFile, ModelConfig, read_model_config
from orcd_batch.config import EngineOptions
from orcd_batch.engine.batch_arrays import make_batch
from orcd_batch.engine.context import Context
from orcd_batch.engine.request import Completion, Request
from orcd_batch.engine.scheduler import Chunk
from orcd_batch.engine.sequence import Sequence as EngineSequence
from orcd_batch.engine_factory import BuiltEngine, build_engine, choose_engine
from orcd_batch.model import forward

MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "tensor_type": "Q4_K",
        "hidden_size": 256,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 64,
        "rope_freqs": np.linspace(1, 4, 32, dtype=np.float32),
    },
    "qwen2": {
        "tensor_type": "F16",
        "hidden_size": 896,
        "num_heads": 14,
        "num_kv_heads": 2,
        "tied": True,
    },
    "phi3": {
        "tensor_type": "Q4_0",
        "hidden_size": 384,
        "num_heads": 4,
        "num_kv_heads": 4,
        "sliding_window": 100,
    },
}
PARAMS = [
    SamplingParams(max_tokens=40, ignore_eos=True),
    SamplingParams(max_tokens=30, temperature=0.9, top_p=0.9, seed=3, ignore_eos=True),
    SamplingParams(max_tokens=20, temperature=1.2, top_k=20, repetition_penalty=1.1, seed=4),
]
Bits = dict[int, tuple[list[int], list[int], list[float]]]


@dataclass(frozen=True)
class Source:
    gguf: GGUFFile
    config: ModelConfig


@pytest.fixture(scope="module", params=MODELS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("model") / f"{request.param}.gguf"
    facts = MODELS[request.param]
    write_model(
        target, request.param, num_layers=3, intermediate_size=512, context_length=1024, **facts
    )
    return target


def build(path: Path, kind: str = "cuda", **options: Any) -> BuiltEngine:
    with GGUFFile.open(path) as gguf:
        source = Source(gguf, read_model_config(gguf))
        return build_engine(source, EngineOptions(kind=kind, **options), choose_engine(kind))


def requests() -> list[Request]:
    rng = np.random.default_rng(0)
    shared = rng.integers(5, 200, 130)
    prompts = [rng.integers(5, 200, n) for n in (1, 2, 63, 64, 65, 200, 500, 17, 129)]
    prompts += [np.concatenate([shared, rng.integers(5, 200, n)]) for n in (1, 5, 70)]
    return [
        Request(index, tuple(int(i) for i in prompt), PARAMS[index % 3], stream=1000 + index)
        for index, prompt in enumerate(prompts)
    ]


def run(engine: Any, todo: Sequence[Request]) -> Bits:
    done: list[Completion] = []
    for request in todo:
        engine.add(request)
    while engine.has_unfinished:
        done += engine.step()
    assert not [completion.error for completion in done if completion.error]
    return {int(str(c.key)): (c.token_ids, c.fingerprints, c.logprobs) for c in done}


@pytest.fixture(scope="module")
def expected(path: Path) -> Bits:
    with build(path, max_num_seqs=64, max_num_batched_tokens=4096) as built:
        return run(built.engine, requests())


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1, "max_num_batched_tokens": 4096},
        {"max_num_seqs": 2, "max_num_batched_tokens": 64},
        {"max_num_seqs": 7, "max_num_batched_tokens": 512},
        {"max_num_seqs": 256, "max_num_batched_tokens": 333},
        {"max_num_seqs": 64, "max_num_batched_tokens": 4096, "prefix_caching": False},
        {"max_num_seqs": 64, "max_num_batched_tokens": 4096, "graphs": False},
        {"max_num_seqs": 3, "max_num_batched_tokens": 64, "graphs": False},
    ],
    ids=str,
)
def test_no_option_changes_a_bit(path: Path, expected: Bits, options: dict[str, Any]) -> None:
    with build(path, **options) as built:
        todo = requests()
        assert run(built.engine, todo[::-1]) == expected
        assert run(built.engine, todo[5:6]) == {5: expected[5]}


@pytest.mark.parametrize(
    ("module", "switch"), [("program", "OVERLAP"), ("attention", "USE_WGMMA")], ids=str
)
def test_no_way_of_launching_changes_a_bit(
    path: Path, expected: Bits, monkeypatch: pytest.MonkeyPatch, module: str, switch: str
) -> None:
    layout = import_module(f"orcd_batch.backend.cuda.{module}")
    monkeypatch.setattr(layout, switch, not getattr(layout, switch))
    with build(path, max_num_seqs=64, max_num_batched_tokens=4096) as built:
        for _ in range(3):
            assert run(built.engine, requests()) == expected


def test_a_stop_token_noticed_late_ends_a_sample_where_it_stands(
    path: Path, expected: Bits
) -> None:
    stop = {key: tokens[len(tokens) // 2] for key, (tokens, *_) in expected.items()}
    params = {key: replace(PARAMS[key % 3], ignore_eos=False) for key in stop}
    todo = [
        replace(request, params=params[index], stop_token_ids=frozenset({stop[index]}))
        for index, request in enumerate(requests())
    ]
    with build(path, max_num_seqs=5, max_num_batched_tokens=128) as built:
        found = run(built.engine, todo)
        manager = built.engine.block_manager
        assert manager.num_available == manager.num_blocks
    for key, lists in expected.items():
        length = lists[0].index(stop[key]) + 1
        assert found[key] == tuple(values[:length] for values in lists)


def test_decode_steps_are_replayed_and_their_graphs_are_few(path: Path) -> None:
    with build(path, max_num_seqs=64, max_num_batched_tokens=4096) as built:
        run(built.engine, requests())
        graphs = built.ops.steps.recordings.num_graphs
        assert 1 <= graphs <= 10
        run(built.engine, requests())
        assert built.ops.steps.recordings.num_graphs <= graphs + 2


def test_ten_runs_are_one(path: Path, expected: Bits) -> None:
    with build(path, max_num_seqs=16, max_num_batched_tokens=512) as built:
        for _ in range(10):
            assert run(built.engine, requests()) == expected


def test_a_context_taken_away_in_the_middle_is_computed_again_to_the_same_bits(path: Path) -> None:
    ids = list(requests()[6].prompt_token_ids)
    with build(path, max_num_seqs=8, max_num_batched_tokens=128) as built:
        context = Context(built.engine)
        whole = context.prefill(ids)
        context.prefill(ids[:300])
        for token in ids[300:320]:
            step = context.decode(token)
        np.testing.assert_array_equal(step, whole[319])
        context.release()
        np.testing.assert_array_equal(context.decode(ids[320]), whole[320])


def test_the_logits_are_near_the_numpy_engines(path: Path) -> None:
    ids = list(requests()[5].prompt_token_ids)
    logits = {}
    for kind in ("cuda", "numpy"):
        with build(path, kind, max_num_seqs=8, max_num_batched_tokens=256) as built:
            logits[kind] = Context(built.engine).prefill(ids)
    spread = float(logits["numpy"].std())
    difference = np.abs(logits["cuda"] - logits["numpy"])
    assert difference.max() < 0.05 * spread
    assert difference.mean() < 0.005 * spread


def test_memory_is_planned_and_does_not_grow(path: Path) -> None:
    with build(path, max_num_seqs=8, max_num_batched_tokens=256, kv_cache_bytes=1 << 25) as built:
        device = built.ops.device
        used, free = device.memory_by_use(), device.memory_info().free
        run(built.engine, requests())
        run(built.engine, requests())
        assert device.memory_by_use() == used
        assert device.memory_info().free >= free - (64 << 20)


def test_a_whole_step_can_be_captured_and_replayed(path: Path) -> None:
    from orcd_batch.backend.cuda.graph import Graph

    with build(path, max_num_seqs=8, max_num_batched_tokens=256) as built:
        engine, ops = built.engine, built.ops
        sequences = [EngineSequence.of(request, 1024) for request in requests()[2:6]]
        for sequence in sequences:
            table = engine.block_manager.grow(sequence.block_table, len(sequence.token_ids))
            assert table is not None
            sequence.block_table = table
        batch = ops.place(make_batch([Chunk(sequence, 17, False) for sequence in sequences]))
        arguments = (ops, built.config, engine.weights, engine.caches, batch)
        logits = forward(*arguments)
        eager = ops.to_host(logits)
        graph = Graph(ops.device, lambda: forward(*arguments) and None)
        ops.device.fill(logits.ptr, logits.nbytes)
        graph.launch()
        np.testing.assert_array_equal(ops.to_host(logits), eager)
        graph.close()


def test_debug_reports_the_time_of_every_op(path: Path) -> None:
    from orcd_batch.backend.cuda.op_times import OpTimes

    with build(path, max_num_seqs=8, max_num_batched_tokens=256) as built:
        times = OpTimes(built.ops.device)
        times.watch(built.ops)
        run(built.engine, requests()[:3])
        summary = times.summary()
    layers = built.config.num_layers
    steps = built.engine.num_steps
    assert summary["attention"]["calls"] == layers * steps
    assert summary["linear"]["calls"] == summary["gated_linear"]["calls"] == layers * steps
    assert summary["linear_add"]["calls"] == 2 * layers * steps
    assert summary["logits"]["calls"] == steps
    assert all(op["seconds"] > 0 for op in summary.values())
