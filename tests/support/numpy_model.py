"""A model file loaded for the numpy ops, without an engine."""

from pathlib import Path

from orcd_batch.backend.numpy_ops import NumpyOps
from orcd_batch.checkpoint import GGUFFile, ModelConfig, read_model_config, weight_map
from orcd_batch.model import Weights, load_weights


def load_numpy_model(path: Path) -> tuple[ModelConfig, Weights]:
    """The file's config and weights."""
    with GGUFFile.open(path) as gguf:
        config = read_model_config(gguf)
        ops = NumpyOps(1)
        weights = load_weights(gguf, weight_map(gguf, config), config, ops)
        ops.close()
    return config, weights
