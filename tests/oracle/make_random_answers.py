"""Writes `answers/` for the small random models: `python tests/oracle/make_random_answers.py`.

Where transformers' own GGUF reader knows everything in the file, its model must agree with the one
built by hand; where it does not (rope_freqs, linear scaling, the window), it must disagree.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.gguf_factory import write_model

from oracle import random_models
from oracle.random_models import CASES, Case
from oracle.recording import logits_of, record
from oracle.transformers_model import build

NUM_COLUMNS = 16
# What the GGUF reader of transformers drops without a word.
READER_IGNORES = {"rope_freqs", "rope_scaling_factor", "sliding_window"}


def rope_parameters(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("rope_freqs") is not None:
        return {
            "rope_type": "llama3",
            "original_max_position_embeddings": random_models.LLAMA3_ORIGINAL_CONTEXT,
            **random_models.LLAMA3_SCALING,
        }
    if options.get("rope_scaling_factor") is not None:
        return {"rope_type": "linear", "factor": options["rope_scaling_factor"]}
    return {"rope_type": "default"}


def models_of(case: Case, folder: Path) -> tuple[PreTrainedModel, PreTrainedModel, str]:
    """By hand from the arrays; by transformers from the file; the digest of the arrays."""
    options = dict(case.options)
    tensors = write_model(folder / "model.gguf", **options)
    by_hand = build(options, tensors, rope_parameters(options))
    by_reader = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file="model.gguf",
        dtype=torch.float32,
        attn_implementation="eager",
        pad_token_id=0,
    ).eval()
    return by_hand, by_reader, random_models.digest(tensors)


def feature_off(case: Case, folder: Path) -> PreTrainedModel | None:
    if not case.off:
        return None
    options = {**case.options, **case.off}
    return build(options, write_model(folder / "off.gguf", **options), rope_parameters(options))


def largest_difference(a: PreTrainedModel, b: PreTrainedModel) -> float:
    prompt = random_models.prompts()[-1]
    return float((logits_of(a, prompt) - logits_of(b, prompt)).abs().max())


def make(case: Case, folder: Path) -> str:
    by_hand, by_reader, digest = models_of(case, folder)
    reader_error = largest_difference(by_hand, by_reader)
    if READER_IGNORES & case.off.keys():
        assert reader_error > 0.1, f"{case.name}: the feature changes nothing ({reader_error})"
    else:
        assert reader_error < 1e-4, f"{case.name}: the two oracles differ by {reader_error}"
    off = feature_off(case, folder)
    if off is not None:
        effect = largest_difference(by_hand, off)
        assert effect > 0.1, f"{case.name}: the feature changes nothing ({effect})"

    vocab_size = by_hand.config.vocab_size
    columns = np.random.default_rng(5).choice(vocab_size, NUM_COLUMNS, replace=False)
    answer = record(
        by_hand,
        random_models.prompts(),
        random_models.NUM_TOKENS,
        np.sort(columns).astype(np.int32),
        generated_rows_only=False,
        model_digest=digest,
        feature_off=off,
    )
    path = answer.save(case.name)
    return (
        f"{case.name}: {path.stat().st_size} bytes, by hand vs reader {reader_error:.2g}, "
        f"logits std {answer.logits.std():.2f}, "
        f"margins ≤ 0.02: {float((answer.margins <= 0.02).mean()):.1%}, "
        f"distinct tokens {[len(set(row)) for row in answer.tokens.tolist()]}"
    )


def main() -> None:
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            print(make(case, Path(folder)))


if __name__ == "__main__":
    main()
