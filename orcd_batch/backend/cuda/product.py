"""What a matrix product leaves behind; the kernels that compute one differ in nothing else."""

from enum import IntEnum
from typing import Any

import numpy as np

from orcd_batch.backend.cuda.array import FP16, FP32


class Output(IntEnum):
    """OUTPUT of kernels/product.cuh: fp32, fp16 (beyond it infinite), or added to fp32."""

    FP32 = 0
    FP16 = 1
    ADD = 2

    @property
    def dtype(self) -> np.dtype[Any]:
        return FP16 if self is Output.FP16 else FP32
