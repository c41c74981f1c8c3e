"""The Python API on small random models."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_factory import write_model

import orcd_batch
from orcd_batch import LlamaInferenceAdapter, SamplingParams, Tokenizer
from orcd_batch.config import EngineOptions
from orcd_batch.engine_factory import choose_engine
from orcd_batch.errors import (
    CheckpointError,
    ClosedError,
    ConfigError,
    ContextFullError,
    DeviceError,
    OrcdError,
    RowError,
)

PROMPTS = [[5, 6, 7], [9] * 70, [1], [200, 3, 4, 5, 6]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("adapter") / "model.gguf"
    write_model(found, context_length=100)
    return found


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[LlamaInferenceAdapter]:
    with LlamaInferenceAdapter.load(path, engine="numpy", max_num_seqs=3) as loaded:
        yield loaded


def test_the_facts_are_the_files(model: LlamaInferenceAdapter) -> None:
    assert (model.hidden_dim, model.num_layers) == (128, 2)
    assert 100 < model.vocab_size <= 400
    weights = 2 * model.vocab_size * 128 + 128
    weights += 2 * (2 * 128 + (128 + 2 * 64) * 128 + 128 * 128 + 3 * 192 * 128)
    cache = 2 * 3 * 2 * 64 * (2 * 2 * 2 * 32)  # twice what three contexts of 128 take
    assert model.vram_usage == 4 * (weights + cache)


def test_prefill_gives_the_logits_that_decode_gives_one_by_one(
    model: LlamaInferenceAdapter,
) -> None:
    ids = [3, 50, 120, 7, 7, 9]
    whole = model.prefill(ids)
    assert whole.shape == (6, model.vocab_size)
    assert whole.dtype == np.float32
    model.prefill(ids[:1])
    for position in range(1, 6):
        assert np.array_equal(model.decode(ids[position]), whole[position])


def test_generate_is_greedy_decoding_by_hand(model: LlamaInferenceAdapter) -> None:
    completions = model.generate(PROMPTS, SamplingParams(max_tokens=6, ignore_eos=True))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert completion.prompt_token_ids == tuple(prompt)
        logits = model.prefill(prompt)[-1]
        for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
            assert token == int(logits.argmax())
            exact = logits.astype(np.float64)
            exact -= np.log(np.exp(exact).sum())
            assert logprob == pytest.approx(exact[token], abs=1e-5)
            logits = model.decode(token)


def test_a_context_survives_generate_without_a_trace(model: LlamaInferenceAdapter) -> None:
    ids = [4] * 75
    model.prefill(ids)
    expected = model.decode(8)
    model.prefill(ids)
    model.generate(PROMPTS, SamplingParams(max_tokens=3))
    assert np.array_equal(model.decode(8), expected)


def test_samples_come_in_order_and_params_may_differ_by_prompt(
    model: LlamaInferenceAdapter,
) -> None:
    params = [SamplingParams(temperature=2.0, n=n, max_tokens=4, seed=1) for n in (2, 1, 3, 1)]
    completions = model.generate(PROMPTS, params)
    keys = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2), (3, 0)]
    assert [completion.key for completion in completions] == keys
    assert completions[0].token_ids != completions[1].token_ids


def test_a_bad_prompt_is_an_error_completion_among_good_ones(
    model: LlamaInferenceAdapter,
) -> None:
    good, empty, long, alien = model.generate([[5], [], [1] * 100, [10**6]])
    assert good.error is None
    assert [c.finish_reason for c in (empty, long, alien)] == ["error"] * 3
    assert "context of 100" in (long.error or "")


def test_a_stop_string_ends_a_completion(path: Path, model: LlamaInferenceAdapter) -> None:
    tokenizer = Tokenizer.from_gguf(path)
    free = model.generate([[5]], SamplingParams(max_tokens=30, temperature=1.5, ignore_eos=True))[0]
    text = tokenizer.decode(free.token_ids)
    stop = next(text[i] for i in range(len(text) // 2, len(text)) if text[i].isascii())
    params = SamplingParams(max_tokens=30, temperature=1.5, ignore_eos=True, stop=(stop,))
    (stopped,) = model.generate([[5]], params)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert stop in tokenizer.decode(stopped.token_ids)
    assert stop not in tokenizer.decode(stopped.token_ids[:-1])


def test_a_full_context_says_so_and_stays_usable(model: LlamaInferenceAdapter) -> None:
    model.prefill([1] * 99)
    last = model.decode(2)
    with pytest.raises(ContextFullError, match="context of 100"):
        model.decode(3)
    assert np.array_equal(model.prefill([1] * 99 + [2])[-1], last)
    with pytest.raises(ContextFullError, match="101 more"):
        model.prefill([1] * 101)


@pytest.mark.parametrize("ids", [[], [-1], [10**6]])
def test_prefill_refuses_what_is_no_prompt(model: LlamaInferenceAdapter, ids: list[int]) -> None:
    with pytest.raises(RowError):
        model.prefill(ids)
    with pytest.raises(RowError, match="prefill first"):
        model.decode(1)


def test_numbers_of_prompts_and_params_must_agree(model: LlamaInferenceAdapter) -> None:
    with pytest.raises(ConfigError, match="4 prompts and 1 SamplingParams"):
        model.generate(PROMPTS, [SamplingParams()])


def test_a_closed_model_raises_and_closing_twice_is_harmless(path: Path) -> None:
    model = LlamaInferenceAdapter.load(path, engine="numpy", max_num_seqs=1)
    model.prefill([1])
    model.close()
    model.close()
    for use in (
        lambda: model.prefill([1]),
        lambda: model.decode(1),
        lambda: model.generate([[1]]),
    ):
        with pytest.raises(ClosedError, match="closed"):
            use()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_model_len": 101}, ConfigError, "context of 100"),
        ({"colour": "blue"}, ConfigError, "no such option.*colour"),
        ({"kv_cache_bytes": 10}, ConfigError, "one context of 100 tokens"),
        ({"kv_cache_bytes": 10**18, "max_num_seqs": 10**15}, DeviceError, "are free"),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 7}, ConfigError, "less than"),
        ({"sliding_window": -5}, OrcdError, "window"),
        ({"max_num_seqs": 0}, ConfigError, "at least 1"),
        ({"num_threads": -5}, ConfigError, "one per core"),
    ],
)
def test_options_that_cannot_work_are_refused_with_the_reason(
    path: Path, options: dict[str, int], error: type[OrcdError], message: str
) -> None:
    with pytest.raises(error, match=message):
        LlamaInferenceAdapter.load(path, engine="numpy", **options)


def test_an_engine_that_does_not_exist_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="auto or cuda or numpy"):
        LlamaInferenceAdapter.load(path, engine="tpu")


@pytest.mark.parametrize(
    "wrong", [{"seed": 1.5}, {"max_tokens": None}, {"temperature": "hot"}, {"n": True}]
)
def test_sampling_parameters_of_the_wrong_type_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}=.*must be a"):
        SamplingParams(**wrong)


def test_weights_outside_fp16_are_refused_by_tensor_name(tmp_path: Path) -> None:
    write_model(tmp_path / "huge.gguf", weight_scale=1e7)
    with pytest.raises(CheckpointError, match=r"Tensor 'token_embd\.weight'.*fp16's range"):
        LlamaInferenceAdapter.load(tmp_path / "huge.gguf", engine="numpy")


def test_loading_reports_every_part_in_order(path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    LlamaInferenceAdapter.load(
        path, engine="numpy", max_num_seqs=1, progress=lambda *part: seen.append(part)
    ).close()
    assert seen == [
        ("token_embd", 1, 4),
        ("blk.0", 2, 4),
        ("blk.1", 3, 4),
        ("output", 4, 4),
    ]


def test_the_tokenizer_of_a_file_encodes_and_decodes(path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(path)
    assert tokenizer.decode(tokenizer.encode("Hello, wörld", add_bos=True)) == "Hello, wörld"


def test_auto_gives_a_reason_and_numpy_names_the_processor() -> None:
    choice = choose_engine("auto")
    assert choice.kind in ("numpy", "cuda")
    assert choice.reason
    assert choose_engine("numpy").device


def test_cuda_without_a_device_is_refused_in_one_sentence() -> None:
    if choose_engine("auto").kind == "cuda":
        pytest.skip("this machine has a GPU")
    with pytest.raises(DeviceError, match="engine=numpy"):
        choose_engine("cuda")


def test_the_package_exports_its_face_and_nothing_else() -> None:
    assert set(orcd_batch.__all__) <= set(dir(orcd_batch))
    assert isinstance(orcd_batch.__version__, str)
    with pytest.raises(AttributeError, match="Nothing"):
        orcd_batch.Nothing  # noqa: B018
    assert EngineOptions().max_num_seqs is None
