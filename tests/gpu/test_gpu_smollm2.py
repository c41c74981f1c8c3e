"""SmolLM2's real weights on the GPU against what transformers computed for them in fp32."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from oracle.answer import ANSWERS_DIR, Answer, load_answer
from oracle.checking import log_normalizer

from orcd_batch import LlamaInferenceAdapter, SamplingParams

ENGINE = "cuda"
# In logits; rounding the weights to fp16 alone costs 0.04 at worst.
MEAN_LIMIT, P999_LIMIT, WORST_LIMIT = 0.02, 0.1, 0.25
# A token may differ where the oracle's best two logits are closer than this.
MARGIN_LIMIT = 0.3
PERPLEXITY_LIMIT = 0.005


@pytest.fixture(scope="module")
def answer(real_model: Path) -> Answer:
    stored = load_answer("smollm2")
    digest = hashlib.sha256(real_model.read_bytes()).hexdigest()
    if digest != stored.model_digest:
        pytest.skip(f"{real_model} is not the file that the stored answers come from")
    return stored


@pytest.fixture(scope="module")
def model(answer: Answer, real_model: Path) -> Iterator[LlamaInferenceAdapter]:
    loaded = LlamaInferenceAdapter.load(real_model, engine=ENGINE, max_num_seqs=64)
    yield loaded
    loaded.close()


def test_greedy_completions_are_the_oracles_wherever_its_margin_is_clear(
    answer: Answer, model: LlamaInferenceAdapter
) -> None:
    greedy = SamplingParams(max_tokens=answer.tokens.shape[1], ignore_eos=True)
    completions = model.generate([item.prompt for item in answer.sequences], greedy)
    num_compared = 0
    for sequence, completion in zip(answer.sequences, completions, strict=True):
        assert completion.error is None
        assert len(completion.token_ids) == len(sequence.tokens)
        wrong = sequence.first_wrong_token(completion.token_ids, MARGIN_LIMIT)
        assert wrong is None, f"token {wrong}, margin {sequence.margins[wrong]:.3f}"
        same = np.asarray(completion.token_ids) == sequence.tokens
        count = len(same) if same.all() else int(same.argmin())
        num_compared += count
        error = np.abs(np.array(completion.logprobs)[:count] - sequence.logprobs[:count])
        assert error.max(initial=0) <= WORST_LIMIT
    print(f"{num_compared} of {answer.tokens.size} greedy tokens before a first difference")
    assert num_compared >= answer.tokens.size // 2


def test_teacher_forced_logits_are_near_the_oracles(
    answer: Answer, model: LlamaInferenceAdapter
) -> None:
    errors = []
    for sequence in answer.sequences:
        logits = model.prefill(sequence.teacher_forced_ids)[sequence.first_row :]
        assert np.isfinite(logits).all()
        errors.append(np.abs(logits[:, sequence.columns] - sequence.logits).ravel())
        errors.append(np.abs(log_normalizer(logits) - sequence.log_normalizer))
    everything = np.concatenate(errors)
    mean, p999 = float(everything.mean()), float(np.quantile(everything, 0.999))
    worst = float(everything.max())
    print(f"{everything.size} logits: mean {mean:.4f}, 99.9 % {p999:.4f}, worst {worst:.4f}")
    assert mean <= MEAN_LIMIT
    assert p999 <= P999_LIMIT
    assert worst <= WORST_LIMIT


def test_the_perplexity_of_real_text_is_the_oracles(model: LlamaInferenceAdapter) -> None:
    with np.load(ANSWERS_DIR / "smollm2_text.npz") as stored:
        ids, window = stored["ids"].tolist(), int(stored["window"])
        expected = float(stored["perplexity"])
    log_probs = []
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        logits = model.prefill(part)[:-1]
        chosen = logits[np.arange(len(logits)), part[1:]]
        log_probs.append(chosen - log_normalizer(logits))
    perplexity = float(np.exp(-np.concatenate(log_probs).mean()))
    print(f"{len(ids)} tokens: perplexity {perplexity:.4f}, the oracle's {expected:.4f}")
    assert perplexity == pytest.approx(expected, rel=PERPLEXITY_LIMIT)
