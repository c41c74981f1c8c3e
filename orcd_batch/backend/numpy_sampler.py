"""Choosing a token from one row of logits. This page is the specification: the CUDA kernel
reproduces the chosen token, the margin and the fingerprint bit for bit from the same logits.

"fp32" below is IEEE single precision, one rounding per written operation, never contracted.
exp and log are `elementary.expf_fixed` and `logf_fixed`. V <= 2**18. For token i = 0 … V-1:

 1. Penalty: l_i = raw logit. When repetition_penalty p != 1 and i is in seen_ids:
    l_i = l_i > 0 ? l_i / p : l_i * p. Then l_i = min(max(l_i, -FLT_MAX), FLT_MAX).
 2. temperature == 0: the token is the lowest i with the largest l_i. Done; no random numbers.
 3. z_i = ((l_i - max l) / temperature) + 0.0, three fp32 operations; z_i <= 0, maybe -inf; the
    addition turns -0 into +0, so equal z have equal bits.
 4. The candidates are ordered by z descending, then i ascending. The filters that are on apply
    one after another, each to what the one before left; each leaves at least the first candidate:
    top-k (0 < top_k < V): the first top_k.
    top-p (top_p < 1): weights w_i = uint64(exp(z_i) * 2**34), truncated (the product is exact);
        total = sum of w over the candidates; target = uint64(ceil(fp64(top_p) * fp64(total))),
        one fp64 product (top_p is fp32, total < 2**53 is exact). Candidate i stays when the sum
        of w over the candidates before it is < target: the smallest prefix that reaches target.
    min-p (min_p > 0): candidates with exp(z_i) >= min_p (fp32 compare).
 5. Noise, for each remaining i: x = word 0 of philox4x32 with key (seed low, seed high) and
    counter (stream low, stream high, position, i). m = x < 2**31 ? x : ~x (32 bits);
    h = (fp32(m) + 0.5) * 2**-32, conversion rounding to nearest even. The exponential variate is
        x < 2**31:  y = 1 - h;  E = (h - (1 - y)) - log(y)          that is -log1p(-h)
        otherwise:  E = 0 - log(h)
    so E is the -log of a uniform variate with full relative precision at both ends (2**-33 is the
    smallest; a small E wins). g = 0 - log(E); score_i = z_i + g.
 6. The token is the lowest i with the largest score (Gumbel-max).

Of the raw logits, whatever the parameters:
    margin = best - second best (fp32 subtraction); 0 when two are equally best (or V is 1).
    fingerprint = (V * 0x9E3779B97F4A7C15 + sum of a_i * bits_i) mod 2**64, reinterpreted as
        int64; bits_i: the fp32 pattern as uint32; a_i = splitmix64(i) | 1, where splitmix64(i) is
        s = (i + 1) * 0x9E3779B97F4A7C15;  s = (s ^ s >> 30) * 0xBF58476D1CE4E5B9;
        s = (s ^ s >> 27) * 0x94D049BB133111EB;  s ^ s >> 31    (all mod 2**64).
        A multilinear hash with odd factors: one changed logit always changes it.
    logprob = (raw[token] - max raw) - log(sum of exp(raw - max raw)): to about 1e-6, in an order
        fixed by V (not bit for bit across devices).
    finite = no infinity or NaN among the raw logits; otherwise the row's other results are 0.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from orcd_batch.backend.elementary import Floats, expf_fixed, logf_fixed
from orcd_batch.backend.ops import SampleBatch
from orcd_batch.backend.philox import philox_word

MAX_VOCAB_SIZE = 1 << 18
WEIGHT_BITS = 34
_CHUNK = 8192
_GOLDEN = 0x9E3779B97F4A7C15
_LOW = 0xFFFFFFFF
_FLT_MAX = np.float32(np.finfo(np.float32).max)
_HALF, _ONE = np.float32(0.5), np.float32(1.0)
_TWO_POW_MINUS_32 = np.float32(2.0**-32)
# No variate is larger: the smallest E is 2**-33, and -log(2**-33) is 22.8739.
MAX_GUMBEL = np.float32(22.875)
# Candidates from here on are tried first: one of them is nearly always chosen.
_NEAR = np.float32(-6.0)
_TOP_BIT = np.uint64(1 << 31)
Ids = NDArray[np.int64]
RowResult = tuple[int, float, float, int, bool]


def sample_row(raw: Floats, batch: SampleBatch, row: int) -> RowResult:
    """Samples `batch`'s row from its raw logits (V,).

    Returns token id, logprob, margin, fingerprint (int64) and whether all logits are finite.
    """
    fingerprint = logits_fingerprint(raw)
    if not np.isfinite(raw).all():
        return 0, 0.0, 0.0, 0, False
    best = int(raw.argmax())
    token = choose_token(raw, batch, row, best)
    with np.errstate(over="ignore"):
        shifted = raw - raw[best]
    logprob = float(shifted[token]) - math.log(np.exp(shifted).sum(dtype=np.float64))
    return token, logprob, _margin(raw, best), fingerprint, True


def choose_token(raw: Floats, batch: SampleBatch, row: int, best: int) -> int:
    """Steps 1 to 6 for one row of finite logits; best is the lowest id with the largest logit."""
    logits = raw
    penalty = batch.repetition_penalty[row]
    if penalty != 1.0:
        seen = batch.seen_ids[batch.seen_start[row] : batch.seen_start[row + 1]]
        logits = penalize(raw, seen, penalty)
        best = int(logits.argmax())
    temperature = batch.temperature[row]
    if temperature == 0.0:
        return best
    with np.errstate(over="ignore"):
        z = (logits - logits[best]) / temperature
    z += np.float32(0.0)
    ids = filter_candidates(
        z, int(batch.top_k[row]), float(batch.top_p[row]), np.float32(batch.min_p[row])
    )
    return gumbel_max(
        z, ids, int(batch.seed[row]), int(batch.stream[row]), int(batch.position[row])
    )


def penalize(raw: Floats, seen: NDArray[np.int32], penalty: np.float32) -> Floats:
    """Step 1: a copy of raw (V,) with the seen ids pushed down (penalty > 1) or up (< 1)."""
    logits = raw.copy()
    values = logits[seen]
    with np.errstate(over="ignore"):
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    return np.clip(logits, -_FLT_MAX, _FLT_MAX, out=logits)


def filter_candidates(z: Floats, top_k: int, top_p: float, min_p: np.float32) -> Ids | None:
    """Step 4: the ids that survive top-k, top-p and min-p, ascending; None when all do."""
    vocab_size = len(z)
    if not 0 < top_k < vocab_size:
        top_k = vocab_size
    if top_k == vocab_size and top_p >= 1.0:
        return None if min_p <= 0.0 else np.flatnonzero(_at_least(expf_fixed(z), min_p))
    ids = _descending_ids(z, top_k)
    probabilities = expf_fixed(z[ids])
    if top_p < 1.0:
        num_kept = _top_p_prefix(probabilities, top_p)
        ids, probabilities = ids[:num_kept], probabilities[:num_kept]
    if min_p > 0.0:
        ids = ids[_at_least(probabilities, min_p)]
    return np.sort(ids)


def _at_least(probabilities: Floats, min_p: np.float32) -> NDArray[np.bool_]:
    return probabilities >= min(min_p, _ONE)


def _descending_ids(z: Floats, count: int) -> Ids:
    """The first `count` ids by z descending, then id ascending, through unique 64-bit keys."""
    bits = z.view(np.uint32)
    # z is +0 or negative, so a larger pattern is a smaller value, except that +0 comes first.
    keys = bits.astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= _all_ids(len(z))
    if count < len(z):
        keys = np.partition(keys, count - 1)[:count]
    keys.sort()
    return (keys & np.uint64(_LOW)).astype(np.int64)


def _top_p_prefix(probabilities: Floats, top_p: float) -> int:
    """How many of the probabilities (relative to the largest, in descending order) top-p keeps."""
    weights = (probabilities * np.float32(2.0**WEIGHT_BITS)).astype(np.uint64)
    sums = np.cumsum(weights)
    target = math.ceil(top_p * float(sums[-1]))
    return max(1, int(np.count_nonzero(sums - weights < np.uint64(max(target, 0)))))


def gumbel_max(z: Floats, ids: Ids | None, seed: int, stream: int, position: int) -> int:
    """Steps 5 and 6: the id with the largest z + Gumbel noise among ids (None: all).

    Noise is computed only where it could still win: those near the top first, then those whose
    z + the largest possible noise reaches the best score so far.
    """
    key = (seed & _LOW, seed >> 32)
    counter = (stream & _LOW, stream >> 32, position)
    words = _all_ids(len(z)) if ids is None else ids.astype(np.uint64)
    values = z if ids is None else z[ids]
    near = values >= _NEAR
    best = _best(values[near], words[near], counter, key)
    far = ~near & (values + MAX_GUMBEL >= best[0])
    return -max(best, _best(values[far], words[far], counter, key))[1]


def _best(
    values: Floats, words: NDArray[np.uint64], counter: tuple[int, int, int], key: tuple[int, int]
) -> tuple[float, int]:
    """(largest score, minus the lowest id that has it); words: the ids, ascending."""
    best = (-math.inf, 0)
    for start in range(0, len(words), _CHUNK):
        part = slice(start, start + _CHUNK)
        scores = values[part] + gumbel(philox_word(counter, words[part], key))
        index = int(scores.argmax())
        best = max(best, (float(scores[index]), -int(words[start + index])))
    return best


def gumbel(words: NDArray[np.uint64]) -> Floats:
    """Step 5's g for random 32-bit words: standard Gumbel variates, fp32."""
    is_low = words < _TOP_BIT
    h = np.where(is_low, words, np.uint64(_LOW) - words).astype(np.float32)
    h += _HALF
    h *= _TWO_POW_MINUS_32
    y = _ONE - h
    correction = h - (_ONE - y)
    log_y = logf_fixed(np.where(is_low, y, h))
    exponential = np.where(is_low, correction, np.float32(0.0)) - log_y
    return np.float32(0.0) - logf_fixed(exponential)


def _margin(raw: Floats, best: int) -> float:
    if len(raw) < 2:
        return 0.0
    rest = max(raw[:best].max(initial=-np.inf), raw[best + 1 :].max(initial=-np.inf))
    with np.errstate(over="ignore"):
        return float(raw[best] - np.float32(rest))


def logits_fingerprint(raw: Floats) -> int:
    """The fingerprint of a contiguous fp32 row (V,), as a signed 64-bit integer."""
    factors = _fingerprint_factors(len(raw))
    total = int(np.dot(factors, raw.view(np.uint32).astype(np.uint64)))
    value = (total + len(raw) * _GOLDEN) & 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


@lru_cache(maxsize=4)
def _fingerprint_factors(vocab_size: int) -> NDArray[np.uint64]:
    s = (_all_ids(vocab_size) + np.uint64(1)) * np.uint64(_GOLDEN)
    s = (s ^ (s >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    s = (s ^ (s >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (s ^ (s >> np.uint64(31))) | np.uint64(1)


@lru_cache(maxsize=4)
def _all_ids(vocab_size: int) -> NDArray[np.uint64]:
    ids = np.arange(vocab_size, dtype=np.uint64)
    ids.flags.writeable = False
    return ids
