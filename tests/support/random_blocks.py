"""Random weights in any GGML tensor type, and the fp32 values that the file then holds.

Types that `gguf.quants` can encode are encoded from normal random numbers. The others (K-quants
and most IQ types) are drawn as raw blocks, with the fp16 scales set so that the decoded values
have mean about 0 and the wanted standard deviation.
"""

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from numpy.typing import NDArray

# Byte offsets of a block's fp16 scale and, where there is one, of its fp16 scale of minima.
_SCALE_OFFSETS: dict[str, tuple[int, ...]] = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ1_S": (0,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


def draw(
    rng: np.random.Generator, shape: tuple[int, ...], std: float, tensor_type: str
) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    """(stored, values): what the file holds, row by row, and the same numbers in fp32.

    shape is outermost first. Raises ValueError where the row length is not a whole number of
    blocks or the type can be neither encoded nor drawn.
    """
    if tensor_type not in GGMLQuantizationType.__members__:
        raise ValueError(f"{tensor_type!r} is not a GGML tensor type")
    qtype = GGMLQuantizationType[tensor_type]
    block_size, _ = GGML_QUANT_SIZES[qtype]
    if shape[-1] % block_size:
        raise ValueError(
            f"a row of {shape[-1]} values is no multiple of {tensor_type}'s block of {block_size}"
        )
    if tensor_type in _SCALE_OFFSETS:
        stored = _draw_blocks(rng, shape, std, qtype)
        return stored, quants.dequantize(stored, qtype).reshape(shape)
    normal = (rng.standard_normal(shape, dtype=np.float32) * np.float32(std)).astype(np.float32)
    return encode(normal, tensor_type)


def encode(
    values: NDArray[np.float32], tensor_type: str
) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    """(stored, values after rounding) for a type that `gguf.quants` can encode."""
    qtype = GGMLQuantizationType[tensor_type]
    try:
        stored = quants.quantize(values, qtype)
    except NotImplementedError as error:
        raise ValueError(f"gguf.quants cannot encode {tensor_type}") from error
    return stored, np.asarray(quants.dequantize(stored, qtype), np.float32).reshape(values.shape)


def _draw_blocks(
    rng: np.random.Generator, shape: tuple[int, ...], std: float, qtype: GGMLQuantizationType
) -> NDArray[np.uint8]:
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    num_blocks = int(np.prod(shape)) // block_size
    blocks = rng.integers(0, 256, (num_blocks, type_size), dtype=np.uint8)
    offsets = _SCALE_OFFSETS[qtype.name]
    scales = [1.0, 0.0][: len(offsets)]
    if len(offsets) == 2:
        mean = float(_decode(blocks, offsets, [1.0, 0.0], qtype).mean())
        mean_of_minima = -float(_decode(blocks, offsets, [0.0, 1.0], qtype).mean())
        scales[1] = mean / mean_of_minima
    factor = std / float(_decode(blocks, offsets, scales, qtype).std())
    _set_scales(blocks, offsets, [scale * factor for scale in scales])
    row_bytes = shape[-1] // block_size * type_size
    return blocks.reshape(*shape[:-1], row_bytes)


def _decode(
    blocks: NDArray[np.uint8],
    offsets: tuple[int, ...],
    scales: list[float],
    qtype: GGMLQuantizationType,
) -> NDArray[np.float32]:
    _set_scales(blocks, offsets, scales)
    return np.asarray(quants.dequantize(blocks, qtype), np.float32)


def _set_scales(blocks: NDArray[np.uint8], offsets: tuple[int, ...], scales: list[float]) -> None:
    for offset, scale in zip(offsets, scales, strict=True):
        blocks[:, offset : offset + 2] = np.array([scale], "<f2").view(np.uint8)
