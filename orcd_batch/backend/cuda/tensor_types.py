"""How each GGML tensor type gets to fp16 on the GPU: by its own kernel, or through the host."""

import numpy as np
from numpy.typing import NDArray

from orcd_batch.errors import CheckpointError

# GGML type -> values and bytes of one block, for the types kernels/dequantize.cu decodes.
KERNEL_TYPES: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}


def row_bytes(ggml_type: str, num_values: int) -> int:
    """Bytes of one stored row of a type in KERNEL_TYPES."""
    block_values, block_bytes = KERNEL_TYPES[ggml_type]
    return num_values // block_values * block_bytes


def to_fp32(name: str, data: NDArray[np.uint8], ggml_type: str) -> NDArray[np.float32]:
    """The values of raw bytes, flat, by `gguf.quants`.

    Raises CheckpointError for a type that gguf cannot dequantize, naming the tensor.
    """
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    if ggml_type == "F32":
        return data.view(np.float32)
    if ggml_type == "F16":
        return data.view(np.float16).astype(np.float32)
    try:
        values = dequantize(data, GGMLQuantizationType[ggml_type])
    except (KeyError, NotImplementedError, ValueError) as error:
        raise CheckpointError(
            f"The tensor {name} has type {ggml_type}, which cannot be dequantized: {error}."
        ) from error
    return np.ascontiguousarray(values, np.float32).reshape(-1)
