"""What a matrix product leaves behind; the kernels that compute one differ in nothing else."""

from enum import IntEnum
from typing import Any

import numpy as np

from orcd_batch.backend.cuda.array import FP16, FP32


class Output(IntEnum):
    """OUTPUT of kernels/product.cuh: fp32, fp16 (beyond it infinite), or added to fp32.

    GATED, which no kernel knows by its number: fp16 as before, and of its halves the gated
    activation (kernels/gated.cuh).
    """

    FP32 = 0
    FP16 = 1
    ADD = 2
    GATED = 3

    @property
    def dtype(self) -> np.dtype[Any]:
        return FP16 if self in (Output.FP16, Output.GATED) else FP32

    def num_columns(self, n: int) -> int:
        """Columns of what a product with a weight of n rows leaves."""
        return n // 2 if self is Output.GATED else n


def buffer_name(n: int, output: Output) -> str:
    """The work buffer of a product's result."""
    return f"linear_{n}_{output.name.lower()}"


# N, K and what the product leaves.
Key = tuple[int, int, Output]
