"""From a GGUF file to facts and tensors: open, validate, describe."""

from orcd_batch.checkpoint.gguf_file import GGUFFile, TensorInfo
from orcd_batch.checkpoint.model_config import ModelConfig, read_model_config
from orcd_batch.checkpoint.weight_map import LayerSources, WeightMap, WeightSource, weight_map

__all__ = [
    "GGUFFile",
    "LayerSources",
    "ModelConfig",
    "TensorInfo",
    "WeightMap",
    "WeightSource",
    "read_model_config",
    "weight_map",
]
