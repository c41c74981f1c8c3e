"""Facts from metadata: what is read, what follows when a key is missing, what is refused."""

from pathlib import Path

import pytest
from support.gguf_factory import write_model
from support.paths import require_real_model, require_vocab

from orcd_batch.checkpoint import GGUFFile, ModelConfig, read_model_config
from orcd_batch.errors import CheckpointError, ConfigError


def config_of(
    tmp_path: Path, architecture: str = "llama", *, window: int | None = None, **options: object
) -> ModelConfig:
    path = tmp_path / "model.gguf"
    options = {"num_layers": 1, "intermediate_size": 64} | options
    write_model(path, architecture, **options)  # type: ignore[arg-type]
    with GGUFFile.open(path) as gguf:
        return read_model_config(gguf, window)


def test_the_real_model_has_the_facts_of_its_card() -> None:
    with GGUFFile.open(require_real_model()) as gguf:
        config = read_model_config(gguf)
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.context_length) == (49152, 8192)
    assert config.rope_theta == 1e5
    assert config.rms_norm_eps == pytest.approx(1e-5, rel=1e-6)
    assert (config.rope_pairing, config.tied_output, config.qkv_bias) == ("neighbours", True, False)
    assert config.qkv_size == 576 + 2 * 192


@pytest.mark.parametrize(
    ("name", "architecture", "heads", "vocab_size"),
    [("phi-3", "phi3", (32, 32, 96), 32064), ("qwen2", "qwen2", (32, 32, 128), 151936)],
)
def test_a_vocabulary_only_file_has_a_configuration(
    name: str, architecture: str, heads: tuple[int, int, int], vocab_size: int
) -> None:
    with GGUFFile.open(require_vocab(name)) as gguf:
        config = read_model_config(gguf)
    assert config.architecture == architecture
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == heads
    assert config.vocab_size == vocab_size


@pytest.mark.parametrize(
    ("architecture", "pairing"), [("llama", "neighbours"), ("qwen2", "halves"), ("phi3", "halves")]
)
def test_each_architecture_pairs_its_rotary_rows_its_own_way(
    tmp_path: Path, architecture: str, pairing: str
) -> None:
    assert config_of(tmp_path, architecture).rope_pairing == pairing


def test_a_missing_kv_head_count_means_as_many_as_query_heads(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, num_heads=4, num_kv_heads=4, omit=["llama.attention.head_count_kv"]
    )
    assert config.num_kv_heads == 4


def test_key_length_overrides_the_head_dim(tmp_path: Path) -> None:
    config = config_of(tmp_path, hidden_size=128, num_heads=4, head_dim=64)
    assert config.head_dim == 64


def test_a_missing_rope_base_is_ten_thousand(tmp_path: Path) -> None:
    assert config_of(tmp_path, omit=["llama.rope.freq_base"]).rope_theta == 10000.0


def test_the_sliding_window_is_the_files_unless_overridden(tmp_path: Path) -> None:
    assert config_of(tmp_path, "phi3").sliding_window == 0
    assert config_of(tmp_path, "phi3", sliding_window=47).sliding_window == 47
    assert config_of(tmp_path, "phi3", sliding_window=47, window=0).sliding_window == 0
    assert config_of(tmp_path, "phi3", sliding_window=47, window=9).sliding_window == 9
    with pytest.raises(ConfigError, match="-1"):
        config_of(tmp_path, window=-1)


@pytest.mark.parametrize(
    ("metadata", "factor"),
    [
        ({}, 1.0),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scale_linear": 2.5}, 2.5),
        ({"rope.scaling.factor": 2.0, "rope.scale_linear": 2.0}, 2.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, 1.0),
        ({"rope.scaling.factor": 0.0}, 1.0),
        ({"rope.scaling.original_context_length": 4096, "rope.scaling.finetuned": True}, 1.0),
    ],
)
def test_linear_rope_scaling_is_read_as_llama_cpp_reads_it(
    tmp_path: Path, metadata: dict[str, object], factor: float
) -> None:
    extra = {f"llama.{key}": value for key, value in metadata.items()}
    assert config_of(tmp_path, extra_metadata=extra).rope_scaling_factor == factor


def test_flags_follow_from_the_tensors(tmp_path: Path) -> None:
    config = config_of(tmp_path, tied=True, qkv_bias=True, rope_freqs=[1.0] * 16)
    assert (config.tied_output, config.qkv_bias, config.has_rope_freqs) == (True, True, True)
    config = config_of(tmp_path, qkv_bias=False)
    assert (config.tied_output, config.qkv_bias, config.has_rope_freqs) == (False, False, False)


def test_an_embedding_padded_beyond_the_token_list_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, num_layers=1)
    with GGUFFile.open(path) as gguf:
        rows = read_model_config(gguf).vocab_size
        tokens = gguf.metadata["tokenizer.ggml.tokens"]
        assert isinstance(tokens, list)
        assert len(tokens) == rows
    fewer = {"tokenizer.ggml.tokens": tokens[:-3]}
    assert config_of(tmp_path, extra_metadata=fewer).vocab_size == rows
    with pytest.raises(CheckpointError, match=f"{rows} rows for a vocabulary of {rows + 1}"):
        config_of(tmp_path, extra_metadata={"tokenizer.ggml.tokens": [*tokens, "more"]})


REFUSED: list[tuple[dict[str, object], str]] = [
    ({"general.architecture": "gemma2"}, "'gemma2', and the supported ones are llama, phi3, qwen2"),
    ({"general.architecture": 7}, "general.architecture is 7"),
    ({"general.architecture": None}, "general.architecture is None"),
    ({"general.type": "adapter"}, "'adapter'"),
    ({"split.count": 3}, "one of 3 parts"),
    ({"llama.embedding_length": None}, "lacks the metadata key 'llama.embedding_length'"),
    ({"llama.block_count": 0}, "'llama.block_count' to 0"),
    ({"llama.block_count": 2**40}, "between 1 and 2147483647"),
    ({"llama.block_count": "one"}, "must be one integer"),
    ({"llama.block_count": True}, "must be one integer"),
    ({"llama.attention.head_count": [4, 4]}, "an array of 2 values, which must be one integer"),
    ({"llama.attention.head_count": 3}, "not a multiple of head_count 3"),
    ({"llama.attention.head_count_kv": 3}, "not a multiple of head_count_kv 3"),
    ({"llama.attention.key_length": 33, "llama.rope.dimension_count": 33}, "33 is odd"),
    ({"llama.attention.value_length": 16}, "keys have 32 values a head and its values 16"),
    ({"llama.rope.dimension_count": 16}, "rotates 16 of the 32"),
    ({"llama.rope.freq_base": float("nan")}, "must be finite"),
    ({"llama.rope.freq_base": 0.0}, "at least 1"),
    ({"llama.rope.freq_base": "big"}, "must be one number"),
    ({"llama.attention.layer_norm_rms_epsilon": float("inf")}, "must be finite"),
    ({"llama.attention.layer_norm_rms_epsilon": None}, "lacks the metadata key"),
    ({"llama.rope.scaling.type": "yarn"}, "'yarn', and only none and linear"),
    ({"llama.rope.scaling.type": "longrope"}, "'longrope'"),
    ({"llama.rope.scaling.type": 4}, "must be a string"),
    ({"llama.rope.scaling.factor": 2.0, "llama.rope.scale_linear": 3.0}, "rope.scale_linear 3"),
    ({"llama.rope.scaling.factor": -2.0}, "at least 0"),
    ({"llama.rope.scaling.attn_factor": 1.19}, r"'rope\.scaling\.attn_factor' to 1\.19"),
    ({"llama.expert_count": 8}, "'expert_count' to 8"),
    ({"llama.attention.causal": False}, "'attention.causal' to False"),
    ({"llama.final_logit_softcapping": 30.0}, "'final_logit_softcapping'"),
    ({"llama.some_new_feature": [1, 2]}, "'some_new_feature' to an array of 2 values"),
    ({"llama.context_length": 2**25}, "context_length 33554432 is beyond"),
    ({"llama.vocab_size": 12}, "vocab_size is 12"),
    ({"tokenizer.ggml.tokens": 5}, "tokenizer.ggml.tokens is not a list"),
]


@pytest.mark.parametrize(("metadata", "sentence"), REFUSED)
def test_what_cannot_be_run_is_refused_by_name(
    tmp_path: Path, metadata: dict[str, object], sentence: str
) -> None:
    with pytest.raises(CheckpointError, match=sentence) as caught:
        config_of(tmp_path, extra_metadata=metadata)
    assert str(tmp_path) in str(caught.value)
    assert str(caught.value).endswith(".")


def test_features_that_are_switched_off_are_no_reason_to_refuse(tmp_path: Path) -> None:
    off = {"expert_count": 0, "rope.scaling.attn_factor": 1.0, "attention.causal": True}
    config = config_of(tmp_path, extra_metadata={f"llama.{k}": v for k, v in off.items()})
    assert config.architecture == "llama"
