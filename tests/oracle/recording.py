"""Runs a transformers model greedily and records an `Answer`."""

import json
import platform

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import PreTrainedModel

from oracle.answer import Answer


@torch.inference_mode()
def logits_of(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """(T, V) fp32 logits of every position, from one pass without a cache."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].float()


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """The argmax continuation; end-of-text tokens do not end it."""
    tokens: list[int] = []
    step = model(torch.tensor([prompt]), use_cache=True)
    while True:
        tokens.append(int(step.logits[0, -1].argmax()))
        if len(tokens) == num_tokens:
            return tokens
        step = model(
            torch.tensor([tokens[-1:]]), past_key_values=step.past_key_values, use_cache=True
        )


def record(
    model: PreTrainedModel,
    prompts: list[list[int]],
    num_tokens: int,
    columns: NDArray[np.int32],
    *,
    generated_rows_only: bool,
    model_digest: str,
    feature_off: PreTrainedModel | None = None,
) -> Answer:
    """Greedy tokens of every prompt, and the teacher-forced logits of `columns`.

    Tokens come from decoding with a cache; logits, margins and a check of every token come from
    one pass over the whole sequence without a cache.
    """
    tokens, margins, logprobs, logits, normalizers, first_rows, off = [], [], [], [], [], [], []
    for prompt in prompts:
        completion = greedy(model, prompt, num_tokens)
        rows = logits_of(model, prompt + completion[:-1])
        first = len(prompt) - 1
        best = rows[first:].topk(2).values
        margin = (best[:, 0] - best[:, 1]).numpy()
        chosen = rows[first:].argmax(-1).tolist()
        for index, (a, b) in enumerate(zip(completion, chosen, strict=True)):
            assert a == b or margin[index] < 1e-3, f"cache and no cache disagree at {index}"
        start = first if generated_rows_only else 0
        tokens.append(completion)
        margins.append(margin)
        chosen_logprobs = torch.log_softmax(rows[first:].double(), -1).amax(-1)
        logprobs.append(chosen_logprobs.float().numpy())
        first_rows.append(start)
        logits.append(rows[start:, torch.from_numpy(columns).long()].numpy())
        normalizers.append(torch.logsumexp(rows[start:].double(), -1).float().numpy())
        if feature_off is not None:
            off.append(logits_of(feature_off, prompt)[-1, torch.from_numpy(columns).long()].numpy())
    return Answer(
        prompt_ids=np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts]),
        prompt_lengths=np.array([len(prompt) for prompt in prompts], np.int32),
        tokens=np.array(tokens, np.int32),
        margins=np.array(margins, np.float32),
        logprobs=np.array(logprobs, np.float32),
        first_rows=np.array(first_rows, np.int32),
        columns=columns,
        logits=np.concatenate(logits),
        log_normalizer=np.concatenate(normalizers),
        feature_off_logits=np.array(off, np.float32),
        model_digest=model_digest,
        made_with=json.dumps(made_with()),
    )


def made_with() -> dict[str, str]:
    """Versions that the answers come from."""
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
