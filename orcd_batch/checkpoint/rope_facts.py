"""How a file wants its rotary embedding: plain or linearly scaled; anything else is refused."""

from orcd_batch.checkpoint.architecture_facts import ArchitectureFacts, contradiction, unsupported
from orcd_batch.checkpoint.gguf_file import GGUFFile
from orcd_batch.checkpoint.header_reader import quoted


def check_rotary_size(gguf: GGUFFile, facts: ArchitectureFacts, head_dim: int) -> None:
    """Raises CheckpointError unless the whole head is rotated."""
    rotary_size = facts.integer("rope.dimension_count", head_dim)
    if rotary_size != head_dim:
        raise unsupported(
            gguf, f"it rotates {rotary_size} of the {head_dim} values of a head (partial rotary)"
        )


def rope_scaling_factor(gguf: GGUFFile, facts: ArchitectureFacts) -> float:
    """The factor that positions are divided by; 1.0 without scaling.

    As in llama.cpp, a factor without a type is linear, 0 is off, and `rope.scale_linear` is the
    older name of `rope.scaling.factor`. Raises CheckpointError for any other kind of scaling.
    """
    kind = facts.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise unsupported(
            gguf, f"its RoPE scaling type is {quoted(kind)}, and only none and linear are supported"
        )
    factor = facts.number("rope.scaling.factor", 0.0)
    older = facts.number("rope.scale_linear", factor)
    if facts.get("rope.scaling.factor") is not None and older != factor:
        raise contradiction(gguf, f"rope.scaling.factor is {factor} and rope.scale_linear {older}")
    return 1.0 if kind == "none" else older or 1.0
