"""The model: its facts, weights in place, the rotary table, and the one forward pass."""

from orcd_batch.checkpoint.model_config import ModelConfig
from orcd_batch.model.forward import forward, hidden_states
from orcd_batch.model.rope import rope_table
from orcd_batch.model.weights import (
    LayerWeights,
    Progress,
    Weights,
    load_weights,
    weight_bytes,
)

__all__ = [
    "LayerWeights",
    "ModelConfig",
    "Progress",
    "Weights",
    "forward",
    "hidden_states",
    "load_weights",
    "rope_table",
    "weight_bytes",
]
