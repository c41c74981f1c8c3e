"""The numpy engine against transformers on small random models of every layout."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle.answer import Answer, load_answer
from oracle.checking import LOGIT_LIMIT, check_completion, worst_logit_error
from oracle.random_models import CASES, NUM_TOKENS, Case, digest
from support.gguf_factory import write_model

from orcd_batch import LlamaInferenceAdapter, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@contextmanager
def engine_for(path: Path, options: Mapping[str, Any]) -> Iterator[LlamaInferenceAdapter]:
    write_model(path, **options)
    model = LlamaInferenceAdapter.load(path, engine="numpy")
    try:
        yield model
    finally:
        model.close()


def answer_for(case: Case, folder: Path) -> Answer:
    answer = load_answer(case.name)
    assert digest(write_model(folder / "seen.gguf", **case.options)) == answer.model_digest, (
        "the random model is not the one the oracle saw; "
        "run tests/oracle/make_random_answers.py again"
    )
    return answer


@every_case
def test_the_logits_of_every_position_are_those_of_transformers(case: Case, tmp_path: Path) -> None:
    answer = answer_for(case, tmp_path)
    with engine_for(tmp_path / "model.gguf", case.options) as model:
        for sequence in answer.sequences:
            logits = model.prefill(sequence.teacher_forced_ids)
            assert worst_logit_error(sequence, logits) < LOGIT_LIMIT


@every_case
def test_greedy_tokens_of_a_batch_are_those_of_transformers(case: Case, tmp_path: Path) -> None:
    answer = answer_for(case, tmp_path)
    with engine_for(tmp_path / "model.gguf", case.options) as model:
        completions = model.generate([item.prompt for item in answer.sequences], GREEDY)
    for sequence, completion in zip(answer.sequences, completions, strict=True):
        check_completion(sequence, completion)


@every_case
def test_decoding_token_by_token_gives_the_same_logits(case: Case, tmp_path: Path) -> None:
    sequence = answer_for(case, tmp_path).sequences[1]
    with engine_for(tmp_path / "model.gguf", case.options) as model:
        rows = [np.array(model.prefill(sequence.prompt))]
        rows += [np.array(model.decode(int(token)))[None] for token in sequence.tokens[:-1]]
    assert worst_logit_error(sequence, np.concatenate(rows)) < LOGIT_LIMIT


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.off], ids=lambda case: ",".join(case.off)
)
def test_a_feature_changes_the_logits_as_in_transformers(case: Case, tmp_path: Path) -> None:
    answer = answer_for(case, tmp_path)
    last_rows = [item.logits[len(item.prompt) - 1] for item in answer.sequences]
    assert np.abs(answer.feature_off_logits - last_rows).max() > 0.1
    with engine_for(tmp_path / "off.gguf", {**case.options, **case.off}) as model:
        for sequence, expected in zip(answer.sequences, answer.feature_off_logits, strict=True):
            logits = model.prefill(sequence.prompt)[-1, sequence.columns]
            np.testing.assert_allclose(logits, expected, atol=LOGIT_LIMIT, rtol=0)


@pytest.mark.parametrize(
    ("name", "fused"),
    [("phi3_fused_96", False), ("llama_64", True), ("qwen2_bias_tied_64", True)],
)
def test_the_other_layout_of_the_same_weights_gives_the_same_logits(
    name: str, fused: bool, tmp_path: Path
) -> None:
    case = next(case for case in CASES if case.name == name)
    sequence = load_answer(name).sequences[1]
    with engine_for(tmp_path / "model.gguf", {**case.options, "fused": fused}) as model:
        logits = model.prefill(sequence.teacher_forced_ids)
    assert worst_logit_error(sequence, logits) < LOGIT_LIMIT


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_the_oracle_covers_the_head_dims_of_the_supported_models(head_dim: int) -> None:
    covered = {
        case.options.get("head_dim") or case.options["hidden_size"] // case.options["num_heads"]
        for case in CASES
    }
    assert head_dim in covered
