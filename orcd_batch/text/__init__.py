"""Text to token ids and back, stop strings, and chat templates."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orcd_batch.text.chat_template import ChatTemplate
    from orcd_batch.text.detokenizer import TextStream
    from orcd_batch.text.stop_strings import StopStringCheck, cut_at_stop
    from orcd_batch.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "StopStringCheck", "TextStream", "Tokenizer", "cut_at_stop"]

_HOMES = {
    "ChatTemplate": "chat_template",
    "StopStringCheck": "stop_strings",
    "TextStream": "detokenizer",
    "Tokenizer": "tokenizer",
    "cut_at_stop": "stop_strings",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
