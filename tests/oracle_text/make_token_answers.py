"""Writes answers/*.json: what llama.cpp makes of texts.json with each vocabulary.

    pip install xllamacpp gguf
    PYTHONPATH=tests:. python tests/oracle_text/make_token_answers.py VOCAB_DIR SMOLLM2.gguf

VOCAB_DIR holds ggml-vocab-*.gguf. Rewrites texts.json too, from `make_texts`.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import gguf

from oracle_text.boundary_vocabulary import boundary_vocabulary
from oracle_text.llama_cpp import LlamaCpp
from orcd_batch.text.pre_tokenizers import PRE_TOKENIZERS

HERE = Path(__file__).parent
NUM_BOUNDARY_TEXTS = 70

ATOMS = [
    *["a", "e", "the", "Hello", " world", "I'm", "we'LL", "don't", "'s", "'S", "'ſ", "x'", "''"],
    *["1", "12", "123", "1234567890", "٣٤", "½", "Ⅷ", "²", "3.14", "1,000", "0x1F"],
    *[" ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\n\n", "\v", "\f", "\0", "\x01", "\x1c", "\x7f"],
    *["\x85", "\xa0", "\u1680", "\u2000", "\u200b", "\u2028", "\u202f", "\u3000", "\ufeff"],
    *["é", "e\u0301", "ñ", "ß", "İ", "Ж", "привет", "日本語", "中国", "ひらがな", "カタカナ"],
    *["한국어", "ภาษาไทย", "हिन्दी", "العربية", "עברית", "Ελληνικά", "ﬁ", "Ａ", "ǅ"],
    *["😀", "👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "🚀", "\U00010348", "𝔘𝔫𝔦", "\U000e0041", "\ue000", "\ufffd"],
    *["▁", "▁▁", "Ġ", "Ċ", "-", "--", "----", "===", "...", "!?", "$+<=>^~|`", "{}[]()", "_"],
    *["@#%&*", "\\n", "//", '"', "“”", "—", "。", "、", "！", "،", "‿", "CamelCase", "ALLCAPS"],
]
SPECIAL = [
    *["<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>", "<s>", "<unk>", "<|end|>", "<|user|>"],
    *["<|assistant|>", "<|eot_id|>", "<|begin_of_text|>", "<0x0A>", "[PAD151646]", "[PAD32011]"],
    *["<|placeholder1|>", "<reponame>", "<|end", "|>"],
]
SENTENCES = [
    "",
    "The quick brown fox jumps over the lazy dog.",
    "  Leading and trailing spaces  ",
    "\n\nNew lines\n\n\n   and indents\n\tand tabs\t\n",
    "def f(x):\n    return x**2  # square\n\n\nprint(f(10))\n",
    "It's what they'd say: we've DON'T'VE 'tis ''twas 'll",
    "1 22 333 4444 55555 666666 3.14159 1e-5 0xFF ½ ² Ⅷ ٣٤",
    "Größe, naïve façade, Łódź, İstanbul, ĲĿŁ, ﬁancé",
    "我能吞下玻璃而不伤身体。私はガラスを食べられます。나는 유리를 먹을 수 있어요.",
    "😀👩‍👩‍👧‍👦🇩🇪👍🏽 emoji with joiners ❤️ and ☠ more",
    "https://example.com/a/b?c=d&e=f#g user@example.org C:\\Windows\\System32",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|user|>\n  Hi <|end|> \n<|assistant|>\n\n there",
    "<s> a <unk> b </s> c <|endoftext|> d",
    " " * 70 + "x" + " " * 33 + "\n" * 20 + "\t" * 9,
    "a" * 200 + "-" * 99 + "=" * 65 + "!" * 40 + "1" * 50,
    "▁under▁score▁ and ▁▁▁ runs",
]


def make_texts() -> list[str]:
    """The sentences, then concatenations of atoms, then random code points; always the same."""
    source = random.Random(20240726)
    texts = list(SENTENCES)
    for count in range(190):
        atoms = ATOMS + SPECIAL if count % 2 else ATOMS
        texts.append("".join(source.choices(atoms, k=source.choice([1, 2, 3, 5, 8]))))
    for _ in range(30):
        spaces = [" ", "  ", "\n", "\t", "a", "b", "1", ".", "é", "\u3000", "-"]
        texts.append("".join(source.choices(spaces, k=12)))
    for _ in range(30):
        ranges = [(0x20, 0x250), (0x250, 0xD800), (0xE000, 0x30000)]
        texts.append("".join(chr(source.randrange(*source.choice(ranges))) for _ in range(5)))
    return texts


def write_gguf(path: Path, metadata: dict[str, object]) -> None:
    """A vocabulary-only file that llama.cpp accepts."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(8)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def answer(name: str, path: Path, texts: list[str]) -> None:
    """Ids per text with special tokens as plain text, and recognised where that differs."""
    oracle = LlamaCpp(path)
    answers = []
    for text in texts:
        plain, special = oracle.encode(text, False), oracle.encode(text, True)
        answers.append([plain, None if special == plain else special])
    (HERE / "answers" / f"{name}.json").write_text(json.dumps(answers, separators=(",", ":")))


def main() -> None:
    vocab_dir, smollm2 = Path(sys.argv[1]), Path(sys.argv[2])
    texts = make_texts()
    (HERE / "texts.json").write_text(json.dumps(texts, indent=0) + "\n")
    for path in sorted(vocab_dir.glob("ggml-vocab-*.gguf")):
        answer(path.stem.removeprefix("ggml-vocab-"), path, texts)
    answer("smollm2", smollm2, texts)
    some = texts[:NUM_BOUNDARY_TEXTS]
    families = {pre: name for name, pre in reversed(PRE_TOKENIZERS.items())}
    cuts = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "boundary.gguf"
        for name in families.values():
            write_gguf(path, boundary_vocabulary(name, some))
            oracle = LlamaCpp(path)
            cuts[name] = [oracle.encode(text, False) for text in some]
    path = HERE / "answers" / "pre_tokenizers.json"
    path.write_text(json.dumps(cuts, separators=(",", ":")))


if __name__ == "__main__":
    main()
