"""Tokens known by their text, where files often carry no key or a wrong type for them.

The lists are those of llama.cpp's `llama_vocab::load` ("auto-detect special tokens by text").
"""

STOP_TEXTS = frozenset({"<|end|>", "<|im_end|>", "<|eot_id|>", "<|endoftext|>", "</s>"})
"""End-of-turn tokens that stop a sample in every vocabulary that has them."""

TURN_ENDS = STOP_TEXTS | {
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
}
"""Control tokens whatever type the file gives them."""

FILL_IN_THE_MIDDLE: dict[tuple[str, ...], frozenset[str]] = {
    ("fim_pre", "prefix"): frozenset(
        {
            "<|fim_prefix|>",
            "<fim-prefix>",
            "<fim_prefix>",
            "<｜fim▁begin｜>",
            "<PRE>",
            "▁<PRE>",
            "<|code_prefix|>",
            "<|prefix|>",
        }
    ),
    ("fim_suf", "suffix"): frozenset(
        {
            "<|fim_suffix|>",
            "<fim-suffix>",
            "<fim_suffix>",
            "<｜fim▁hole｜>",
            "<SUF>",
            "▁<SUF>",
            "<|code_suffix|>",
            "<|suffix|>",
        }
    ),
    ("fim_mid", "middle"): frozenset(
        {
            "<|fim_middle|>",
            "<fim-middle>",
            "<fim_middle>",
            "<｜fim▁end｜>",
            "<MID>",
            "▁<MID>",
            "<|code_middle|>",
            "<|middle|>",
        }
    ),
    ("fim_pad",): frozenset({"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"}),
    ("fim_rep",): frozenset(
        {"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"}
    ),
    ("fim_sep",): frozenset({"<|file_sep|>"}),
}
"""Control tokens unless the file names the token of that role under one of the keys."""

HARMONY = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})
"""Always matched in text and always shown."""

NEVER_STRIPPING = frozenset({"<unk>", "<s>", "<|endoftext|>"})
"""Special tokens of Phi-3 that leave the white space to their right alone."""
