"""What a GPU's KV caches hold as one uint16 array (layers, keys and values, blocks, Hkv, 64, D)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orcd_batch.backend.ops import KVCache


def fill(ops: Any, caches: Sequence[KVCache], contents: NDArray[np.uint16]) -> None:
    """Puts the contents in place, after whatever was queued."""
    from cuda.bindings import driver

    from orcd_batch.backend.cuda.driver import call

    ops.device.synchronize()  # zeros come first
    for layer, cache in enumerate(caches):
        for side, array in enumerate((cache.keys, cache.values)):
            data = np.ascontiguousarray(contents[layer, side])
            call(driver.cuMemcpyHtoD(array.ptr, data.ctypes.data, data.nbytes))
    ops.device.synchronize()


def contents(ops: Any, caches: Sequence[KVCache]) -> NDArray[np.uint16]:
    """All of it, once everything queued has run."""
    sides = [(cache.keys, cache.values) for cache in caches]
    return np.stack(
        [np.stack([ops.staging.fetch(array).view(np.uint16) for array in pair]) for pair in sides]
    )
