"""The real model's own vocabulary, id for id against llama.cpp."""

import json
from pathlib import Path

from oracle_text.make_token_answers import HERE

from orcd_batch import Tokenizer


def test_nasty_texts_get_the_ids_that_llama_cpp_gives_them(real_model: Path) -> None:
    tokenizer = Tokenizer.from_gguf(real_model)
    texts = json.loads((HERE / "texts.json").read_text())
    answers = json.loads((HERE / "answers/smollm2.json").read_text())
    for text, (plain, special) in zip(texts, answers, strict=True):
        for parse_special, expected in ((False, plain), (True, special or plain)):
            ids = tokenizer.encode(text, add_bos=False, parse_special=parse_special)
            assert ids == expected, (text, parse_special)
