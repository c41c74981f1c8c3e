"""Batch LLM inference that can be trusted to the bit."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orcd_batch.adapter import LlamaInferenceAdapter, Tokenizer
    from orcd_batch.engine.request import SamplingParams

__all__ = ["LlamaInferenceAdapter", "SamplingParams", "Tokenizer", "__version__"]

_HOMES = {
    "LlamaInferenceAdapter": "orcd_batch.adapter",
    "SamplingParams": "orcd_batch.engine.request",
    "Tokenizer": "orcd_batch.adapter",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name == "__version__":
        from orcd_batch.reproducibility.environment import own_version

        return own_version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
