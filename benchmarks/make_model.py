"""Writes a GGUF of a model's true shape and layout with seeded random fp16 weights.

    python benchmarks/make_model.py phi3 /dev/shm/phi3.gguf [--vocab ggml-vocab-phi-3.gguf]

The same shape, seed and vocabulary give the same bytes, whatever the number of threads.
"""

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any
from zlib import crc32

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.vocabulary import CHATML_TEMPLATE, gpt2_vocabulary, llama_vocabulary
from true_shapes import SHAPES, Shape, TensorPlan, metadata, tensor_plans

from orcd_batch.checkpoint import GGUFFile

_CHUNK_VALUES = 1 << 20
_NORMAL = 1
_PHI3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\\n'"
    " + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_KINDS = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
    list: GGUFValueType.ARRAY,
}


def make_model(
    path: Path,
    shape: Shape,
    *,
    vocab: Path | None = None,
    seed: int = 0,
    residual_scale: float = 1.0,
    num_threads: int | None = None,
) -> int:
    """Writes the file and returns its size in bytes.

    vocab: a vocabulary-only GGUF whose tokenizer keys and chat template are taken; without it, a
    small synthetic one is padded to the shape's number of tokens. Raises ValueError when the
    vocabulary is larger than the shape's.
    """
    plans = tensor_plans(shape, residual_scale)
    writer = GGUFWriter(None, shape.architecture)
    writer.kv_data[0].clear()
    keys = metadata(shape, f"Random {shape.model_option}") | _vocabulary(shape, vocab)
    for key, value in keys.items():
        writer.add_key_value(key, value, _KINDS[type(value)])
    for plan in plans:
        kind = GGMLQuantizationType.F16 if plan.is_matrix else GGMLQuantizationType.F32
        writer.add_tensor_info(plan.name, plan.shape, np.float32, plan.num_bytes, kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    alignment = writer.data_alignment
    writer.close()
    offset = -(-path.stat().st_size // alignment) * alignment
    size = offset + sum(-(-plan.num_bytes // alignment) * alignment for plan in plans)
    with path.open("r+b") as file:
        file.truncate(size)
    data = np.memmap(path, np.uint8, "r+")
    with ThreadPoolExecutor(num_threads) as pool:
        done = []
        for plan in plans:
            target = data[offset : offset + plan.num_bytes]
            done += [pool.submit(*task) for task in _tasks(plan, seed, target)]
            offset += -(-plan.num_bytes // alignment) * alignment
        for task in done:
            task.result()
    return size


def _tasks(plan: TensorPlan, seed: int, target: NDArray[np.uint8]) -> list[tuple[Any, ...]]:
    """Calls that fill the tensor's bytes, each on its own."""
    if not plan.is_matrix:
        return [(_fill_vector, plan, seed, target.view(np.float32))]
    table = _normal_fp16(plan.std)
    values = target.view(np.uint16)
    starts = range(0, len(values), _CHUNK_VALUES)
    return [
        (_fill, table, (seed, crc32(plan.name.encode()), i), values[start : start + _CHUNK_VALUES])
        for i, start in enumerate(starts)
    ]


def _fill(
    table: NDArray[np.uint16], seed: tuple[int, int, int], target: NDArray[np.uint16]
) -> None:
    """Fills with values drawn from the table (65,536 fp16 patterns)."""
    random = np.random.SFC64(np.random.SeedSequence(seed)).random_raw(-(-len(target) // 4))
    np.take(table, random.view(np.uint16)[: len(target)], out=target, mode="clip")


def _fill_vector(plan: TensorPlan, seed: int, target: NDArray[np.float32]) -> None:
    if plan.values is not None:
        target[:] = plan.values
        return
    random = np.random.Generator(np.random.SFC64([seed, crc32(plan.name.encode())]))
    target[:] = plan.mean + plan.std * random.standard_normal(len(target))


@cache
def _normal_quantiles() -> NDArray[np.float64]:
    """65,536 equally likely values of the standard normal distribution, within 4.2 deviations."""
    normal = NormalDist()
    upper = [normal.inv_cdf((i + 0.5) / 65536) for i in range(32768, 65536)]
    return np.array([-value for value in reversed(upper)] + upper)


@cache
def _normal_fp16(std: float) -> NDArray[np.uint16]:
    """The quantiles times std, as fp16 bit patterns."""
    return (std * _normal_quantiles()).astype(np.float16).view(np.uint16)


def _vocabulary(shape: Shape, vocab: Path | None) -> dict[str, Any]:
    """The tokenizer's keys, with exactly the shape's number of tokens unless a file has fewer."""
    if vocab is not None:
        with GGUFFile.open(vocab) as gguf:
            found = {k: v for k, v in gguf.metadata.items() if k.startswith("tokenizer.")}
            name = gguf.metadata.get("general.name")
        keys = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in found.items()}
        keys["general.name"] = f"Random {name}"
    elif shape.tokenizer == "llama":
        keys = {**llama_vocabulary(), "tokenizer.chat_template": _PHI3_TEMPLATE}
    else:
        keys = {**gpt2_vocabulary(shape.pre), "tokenizer.chat_template": CHATML_TEMPLATE}
    tokens: list[str] = keys["tokenizer.ggml.tokens"]
    missing = shape.vocab_size - len(tokens)
    if missing < 0:
        raise ValueError(f"{len(tokens)} tokens are too many for {shape.vocab_size}")
    tokens += [f"padding{i}" for i in range(missing)]
    keys["tokenizer.ggml.token_type"] += [_NORMAL] * missing
    if "tokenizer.ggml.scores" in keys:
        keys["tokenizer.ggml.scores"] += [-1e5] * missing
    return keys


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--vocab", type=Path, help="a vocabulary-only GGUF")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="other than the true number")
    parser.add_argument("--residual-scale", type=float, default=1.0)
    parser.add_argument("--threads", type=int, help="default: one per core and four more")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.layers is not None:
        shape = replace(shape, num_layers=options.layers)
    started = time.perf_counter()
    size = make_model(
        options.path,
        shape,
        vocab=options.vocab,
        seed=options.seed,
        residual_scale=options.residual_scale,
        num_threads=options.threads,
    )
    seconds = time.perf_counter() - started
    print(f"{options.path}: {size:,} bytes in {seconds:.1f} s ({size / seconds / 1e9:.2f} GB/s)")


if __name__ == "__main__":
    main()
