r"""Where `gpt2` vocabularies cut text before merging: the regular expressions behind each `pre`.

A pattern that differs from the one its model published does so because llama.cpp's pieces are the
reference: letters of any case count as one class there, and `~` is no symbol (`\p{S}`). One
difference is left: characters that came with Unicode 16 belong to their classes here, and to none
in llama.cpp, whose tables are older; no id of the Qwen2, Llama 3 or SmolLM2 vocabulary shows it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """patterns: applied in turn; matches, and what lies between them, become pieces.

    ignore_merges: a piece that is a token as a whole is not merged. add_bos: what a file without
    `add_bos_token` means.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_CONTRACTION = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER = r"(?:(?=\p{L})[^a-z])"
_LOWER = r"(?:(?=\p{L})[^A-Z])"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CJK = r"[[一-龥ࠀ-一가-퟿]&&[^\s]]+"
_SYMBOL = r"[\p{S}&&[^~]]"


def _words(
    numbers: str,
    *,
    contractions: str = f"{_CONTRACTION}|",
    marks: str = "",
    not_symbols: str = "",
    after_symbols: str = r"[\r\n]*",
    spaces: str = _SPACES,
) -> str:
    """The pattern family that began with GPT-4: words, numbers, symbols, spaces."""
    return (
        rf"{contractions}[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}{marks}]+|{numbers}"
        rf"| ?[^\s\p{{L}}{marks}\p{{N}}{not_symbols}]+{after_symbols}|{spaces}"
    )


def _cased(ending: str, numbers: str) -> str:
    """Words split where lower case turns to upper case, with an optional ending."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{lead}{_UPPER}*{_LOWER}+{ending}|{lead}{_UPPER}+{_LOWER}*{ending}|{numbers}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


def _deepseek_3(spaces: str = rf"[\r\n]*|{_SPACES}") -> tuple[str, ...]:
    return (
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
        rf"|[^\r\n\p{{L}}\p{{P}}{_SYMBOL}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}{_SYMBOL}]+{spaces}",
    )


_FAMILIES: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2 phi-2 gigachat a.x-4.0 mellum mpt olmo jais exaone4 trillion granite-docling": (
        PreTokenizer((_GPT2,))
    ),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": (
        PreTokenizer((r"\p{N}", _GPT2))
    ),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2": (
        PreTokenizer((_words(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
    ),
    "dbrx smaug-bpe glm4 chatglm-bpe": PreTokenizer((_words(r"\p{N}{1,3}"),)),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": (
        PreTokenizer((_words(r"\p{N}"),))
    ),
    "qwen35": PreTokenizer((_words(r"\p{N}", marks=r"\p{M}"),)),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", _words(r"\p{N}+")), ignore_merges=True),
    "ufakzeka": PreTokenizer((_words(r"\p{N}", contractions=""),)),
    "laguna": PreTokenizer((r"[^\n]+|\n+", _words(r"\p{N}"))),
    "seed-coder": PreTokenizer((_words(r"\p{N}", not_symbols=r"\r\n", after_symbols=""),)),
    "bailingmoe bailingmoe2 llada-moe": (
        PreTokenizer((_words(r"\p{N}", spaces=r"\s*[\r\n]|\s+(?!\S)|\s+"),))
    ),
    "tekken": PreTokenizer((_cased("", r"\p{N}"),), ignore_merges=True, add_bos=True),
    "gpt-4o llama4 kanana2 minimax-m2": (
        PreTokenizer((_cased(f"(?:{_CONTRACTION})?", r"\p{N}{1,3}"),))
    ),
    "falcon": PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "bloom gpt3-finnish poro-chat": PreTokenizer((_BLOOM,)),
    "viking": PreTokenizer((_BLOOM, r"\p{N}")),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": PreTokenizer(_deepseek_3()),
    "spark2_5": PreTokenizer((*_deepseek_3(r"|[\r\n]|\s+(?!\S)|\s+"), r"\p{N}")),
}

PRE_TOKENIZERS = {name: pre for names, pre in _FAMILIES.items() for name in names.split()}
"""Every `tokenizer.ggml.pre` that is supported."""
