"""The engine: requests in, completions out, token ids only."""

from orcd_batch.engine.engine import Engine
from orcd_batch.engine.request import Completion, Request, SamplingParams, StopCheck

__all__ = ["Completion", "Engine", "Request", "SamplingParams", "StopCheck"]
