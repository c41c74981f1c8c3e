"""Whole small models on the GPU: near the numpy engine, and the same bits however they are run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_factory import write_model

from orcd_batch import LlamaInferenceAdapter, SamplingParams

# Architecture, tensor type, heads, KV heads, head dim, sliding window.
MODELS = {
    "llama": ("Q8_0", 6, 2, 64, None),
    "qwen2": ("F16", 14, 2, 64, None),
    "phi3": ("Q4_K", 4, 4, 96, 100),
}
PARAMS = [
    SamplingParams(max_tokens=40, ignore_eos=True),
    SamplingParams(max_tokens=30, temperature=0.9, top_p=0.9, seed=3, ignore_eos=True),
    SamplingParams(max_tokens=20, temperature=1.2, top_k=20, repetition_penalty=1.1, seed=4),
]


@pytest.fixture(scope="module", params=MODELS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensor_type, num_heads, num_kv_heads, head_dim, window = MODELS[request.param]
    target = tmp_path_factory.mktemp("model") / f"{request.param}.gguf"
    write_model(
        target,
        request.param,
        num_layers=3,
        hidden_size=num_heads * head_dim if request.param == "phi3" else 256,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=None if request.param == "phi3" else head_dim,
        intermediate_size=512,
        context_length=1024,
        sliding_window=window,
        tensor_type={"default": "F16"} if tensor_type == "F16" else tensor_type_of(tensor_type),
    )
    return target


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    shared = [int(i) for i in rng.integers(5, 200, 130)]
    lengths = (1, 2, 63, 64, 65, 200, 500, 17, 129)
    return [[int(i) for i in rng.integers(5, 200, n)] for n in lengths] + [
        shared + [int(i) for i in rng.integers(5, 200, n)] for n in (1, 5, 70)
    ]


def completions(path: Path, order: list[int], **options: Any) -> dict[int, Any]:
    """Prompt index -> (token ids, fingerprints, logprobs), run in this order."""
    rows = prompts()
    params = [PARAMS[i % len(PARAMS)] for i in range(len(rows))]
    with LlamaInferenceAdapter.load(path, engine="cuda", **options) as model:
        done = model.generate([rows[i] for i in order], [params[i] for i in order])
    assert not [completion.error for completion in done if completion.error]
    return {i: (c.token_ids, c.fingerprints, c.logprobs) for i, c in zip(order, done, strict=True)}
