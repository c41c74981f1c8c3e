"""The memory plan: what a model and its largest step need, decided before anything is taken."""

from dataclasses import dataclass

from orcd_batch.backend.cuda.device import MemoryInfo, not_enough_memory
from orcd_batch.backend.ops import BLOCK_SIZE
from orcd_batch.errors import DeviceError

FP16_BYTES = 2
FP32_BYTES = 4

# Left alone for the driver, cuBLAS and kernel code that loads later.
RESERVE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that work buffers and KV blocks depend on."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def kv_block_bytes(self) -> int:
        """One KV block over all layers, keys and values, fp16."""
        values = self.num_layers * 2 * self.num_kv_heads * BLOCK_SIZE * self.head_dim
        return values * FP16_BYTES

    @property
    def linear_shapes(self) -> tuple[tuple[int, int], ...]:
        """(N, K) of every linear: attn_qkv, attn_output, ffn_gate_up, ffn_down, output."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        return (
            (self.qkv_size, hidden),
            (hidden, self.num_heads * self.head_dim),
            (2 * ffn, hidden),
            (hidden, ffn),
            (self.vocab_size, hidden),
        )


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by use. num_blocks KV blocks fill what the utilization leaves."""

    weights: int
    work_space: int
    kv_cache: int
    num_blocks: int


def plan_memory(
    shape: ModelShape,
    memory: MemoryInfo,
    *,
    weight_bytes: int,
    work_space_bytes: int,
    utilization: float,
    max_num_blocks: int,
) -> MemoryPlan:
    """Shares out the free memory: weights, then work space, then KV blocks.

    memory: as it is before any of them is taken. utilization: the share of the free memory to
    use, in (0, 1]. max_num_blocks: no more than these. Raises DeviceError, with the bytes
    needed and available, when not even one sequence of max_model_len fits.
    """
    budget = int(memory.free * utilization) - RESERVE_BYTES
    for use, needed in (
        ("weights", weight_bytes),
        ("work_space", weight_bytes + work_space_bytes),
    ):
        if needed > budget:
            raise DeviceError(not_enough_memory(use, needed, MemoryInfo(budget, memory.total)))
    left = budget - weight_bytes - work_space_bytes
    fewest = -(-shape.max_model_len // BLOCK_SIZE)
    if left < fewest * shape.kv_block_bytes:
        needed = weight_bytes + work_space_bytes + fewest * shape.kv_block_bytes
        message = not_enough_memory("kv_cache", needed, MemoryInfo(budget, memory.total))
        raise DeviceError(f"{message} The KV cache must hold {shape.max_model_len:,} tokens.")
    num_blocks = min(left // shape.kv_block_bytes, max_num_blocks)
    return MemoryPlan(weight_bytes, work_space_bytes, num_blocks * shape.kv_block_bytes, num_blocks)
