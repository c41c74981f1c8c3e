"""The numpy engine on SmolLM2's real weights against transformers reading the same file."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from oracle.answer import ANSWERS_DIR, Answer, load_answer
from oracle.checking import LOGIT_LIMIT, check_completion, log_normalizer, worst_logit_error
from oracle.smollm2_prompts import texts

from orcd_batch import LlamaInferenceAdapter, SamplingParams, Tokenizer


@pytest.fixture(scope="module")
def answer(real_model: Path) -> Answer:
    stored = load_answer("smollm2")
    digest = hashlib.sha256(real_model.read_bytes()).hexdigest()
    if digest != stored.model_digest:
        pytest.skip(f"{real_model} is not the file that the stored answers come from")
    return stored


@pytest.fixture(scope="module")
def model(answer: Answer, real_model: Path) -> Iterator[LlamaInferenceAdapter]:
    loaded = LlamaInferenceAdapter.load(real_model, engine="numpy")
    yield loaded
    loaded.close()


def test_greedy_tokens_of_16_prompts_are_those_of_transformers(
    answer: Answer, model: LlamaInferenceAdapter
) -> None:
    greedy = SamplingParams(max_tokens=answer.tokens.shape[1], ignore_eos=True)
    completions = model.generate([item.prompt for item in answer.sequences], greedy)
    assert answer.tokens.shape == (16, 48)
    for sequence, completion in zip(answer.sequences, completions, strict=True):
        check_completion(sequence, completion)


@pytest.mark.parametrize("index", [2, 7, 12, 15])
def test_teacher_forced_logits_are_those_of_transformers(
    index: int, answer: Answer, model: LlamaInferenceAdapter
) -> None:
    sequence = answer.sequences[index]
    logits = model.prefill(sequence.teacher_forced_ids)
    assert worst_logit_error(sequence, logits) < LOGIT_LIMIT


def _log_probs(model: LlamaInferenceAdapter, ids: list[int]) -> np.ndarray:
    logits = np.asarray(model.prefill(ids))[:-1]
    chosen = logits[np.arange(len(logits)), ids[1:]]
    return np.asarray(chosen - log_normalizer(logits))


def test_log_probabilities_of_real_text_are_those_of_transformers(
    model: LlamaInferenceAdapter,
) -> None:
    with np.load(ANSWERS_DIR / "smollm2_text.npz") as stored:
        ids, expected = stored["ids"][:200].tolist(), stored["log_probs"][:199]
    np.testing.assert_allclose(_log_probs(model, ids), expected, atol=LOGIT_LIMIT, rtol=0)


@pytest.mark.slow
def test_perplexity_of_real_text_is_that_of_transformers(model: LlamaInferenceAdapter) -> None:
    with np.load(ANSWERS_DIR / "smollm2_text.npz") as stored:
        ids, window = stored["ids"].tolist(), int(stored["window"])
        expected = float(stored["perplexity"])
    windows = [ids[start : start + window] for start in range(0, len(ids), window)]
    log_probs = np.concatenate([_log_probs(model, part) for part in windows])
    assert np.exp(-log_probs.mean()) == pytest.approx(expected, rel=1e-4)


def test_the_prompts_are_tokenized_as_by_transformers(answer: Answer, real_model: Path) -> None:
    tokenizer = Tokenizer.from_gguf(real_model)
    for text, sequence in zip(texts(), answer.sequences, strict=True):
        assert tokenizer.encode(text, add_bos=False) == sequence.prompt
