"""Hashes that state what was computed, the environment it ran in, and comparisons between runs."""

from orcd_batch.reproducibility.hashes import RunHash, numerics_hash, stream_digest, token_hash

__all__ = ["RunHash", "numerics_hash", "stream_digest", "token_hash"]
