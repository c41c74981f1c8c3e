"""Writes examples/prompts.parquet, the demo's input: `python examples/make_prompts.py`."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

PROMPTS = {
    "capital": "What is the capital of France? Answer in one sentence.",
    "haiku": "Write a haiku about the sea.",
    "sum": "What is 17 + 25? Give only the number.",
    "photosynthesis": "Explain photosynthesis to a ten-year-old in two sentences.",
    "recipe": "List three ingredients of a tomato soup.",
    "translate": "Translate to French: Good morning, how are you?",
    "python": "Write a Python function that reverses a string.",
    "planets": "Name the planets of the solar system in order from the sun.",
    "synonym": "Give three synonyms of the word 'happy'.",
    "email": "Write a short, polite email that moves a meeting from Monday to Tuesday.",
    "history": "In which year did the Second World War end?",
    "gravity": "Why do objects fall to the ground?",
    "story": "Begin a story with the words: The lighthouse had been dark for years.",
    "sort": "Sort these numbers from small to large: 9, 2, 7, 4.",
    "headline": "Write a newspaper headline about a cat that became mayor.",
    "unicode": "Grüße! Was heißt »Danke« auf Englisch? 🙂",
}


def main() -> None:
    table = pa.table({"id": list(PROMPTS), "prompt": list(PROMPTS.values())})
    pq.write_table(table, Path(__file__).with_name("prompts.parquet"))


if __name__ == "__main__":
    main()
