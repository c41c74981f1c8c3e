"""Writes `answers/smollm2.npz` and `answers/smollm2_text.npz`.

Run as `python tests/oracle/make_smollm2_answers.py MODEL.gguf`: transformers reads the GGUF
(and its tokenizer) itself and computes in fp32.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from oracle import smollm2_prompts
from oracle.answer import ANSWERS_DIR
from oracle.recording import logits_of, made_with, record

NUM_TOKENS = 48
NUM_COLUMNS = 64
# Each window of the text is computed on its own; its first token is not predicted.
TEXT_WINDOW = 1024
TEXT_FILE = Path(__file__).parent / "real_text.txt"


def text_log_probs(model: PreTrainedModel, ids: list[int]) -> np.ndarray:
    """Natural-log probability of every token of ids but the first of each window, in order."""
    parts = []
    for start in range(0, len(ids), TEXT_WINDOW):
        window = ids[start : start + TEXT_WINDOW]
        log_probs = torch.log_softmax(logits_of(model, window)[:-1].double(), -1)
        parts.append(log_probs.gather(1, torch.tensor(window[1:])[:, None])[:, 0].numpy())
    return np.concatenate(parts).astype(np.float32)


def main(path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model_digest = hashlib.sha256(path.read_bytes()).hexdigest()
    prompts = [
        tokenizer(text, add_special_tokens=False).input_ids for text in smollm2_prompts.texts()
    ]
    columns = np.random.default_rng(5).choice(model.config.vocab_size, NUM_COLUMNS, replace=False)
    answer = record(
        model,
        prompts,
        NUM_TOKENS,
        np.sort(columns).astype(np.int32),
        generated_rows_only=True,
        model_digest=model_digest,
    )
    answer.save("smollm2")
    for tokens, margins in zip(answer.tokens, answer.margins, strict=True):
        print(f"{(margins <= 0.02).sum()} close of {len(margins)}: {tokenizer.decode(tokens)!r}")

    ids = tokenizer(TEXT_FILE.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    log_probs = text_log_probs(model, ids)
    np.savez_compressed(
        ANSWERS_DIR / "smollm2_text.npz",
        ids=np.array(ids, np.int32),
        window=TEXT_WINDOW,
        log_probs=log_probs,
        perplexity=np.exp(-log_probs.astype(np.float64).mean()),
        model_digest=model_digest,
        made_with=json.dumps(made_with()),
    )
    print(f"{len(ids)} tokens of text, perplexity {np.exp(-log_probs.mean(dtype=np.float64)):.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
