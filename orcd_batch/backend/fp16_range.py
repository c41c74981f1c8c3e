"""What a weight may hold: one rule and one sentence for every backend (SPEC section 4)."""

import numpy as np
from numpy.typing import NDArray

from orcd_batch.errors import CheckpointError

FP16_MAX = 65504.0


def outside_fp16(name: str, value: float | np.float32) -> CheckpointError:
    """The refusal of a tensor that holds `value`."""
    return CheckpointError(
        f"Tensor {name!r} holds the value {value}, outside fp16's range of ±{FP16_MAX:g}; "
        "this program computes with fp16 weights and refuses it."
    )


def check_fp16_range(values: NDArray[np.float32], name: str) -> None:
    """Raises CheckpointError, naming the tensor, for a value that is not finite or beyond fp16."""
    largest = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))
    if not largest <= FP16_MAX:
        raise outside_fp16(name, values[~(np.abs(values) <= FP16_MAX)][0])
