"""Our exp and log: accurate, exact where promised, and step for step as their page says."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orcd_batch.backend.elementary import (
    EXP_COEFFICIENTS,
    LN2_HI,
    LN2_LO,
    LOG2E,
    LOG_COEFFICIENTS,
    MAGIC,
    expf_fixed,
    logf_fixed,
)

f32 = np.float32


def ulps(got: np.ndarray, exact: np.ndarray) -> float:
    return float(np.max(np.abs(got - exact) / np.spacing(np.abs(exact).astype(f32))))


def test_exp_is_within_one_ulp() -> None:
    z = -np.geomspace(1e-9, 86, 200_001).astype(f32)
    assert ulps(expf_fixed(z), np.exp(z.astype(np.float64))) < 1.0


def test_log_is_within_one_ulp_even_beside_one() -> None:
    y = np.concatenate([np.geomspace(2.0**-33, 23, 200_001), 1 + np.linspace(-1e-4, 1e-4, 9_998)])
    y = y[y.astype(f32) != 1].astype(f32)
    assert ulps(logf_fixed(y), np.log(y.astype(np.float64))) < 1.0


def test_exp_and_log_are_exact_where_the_sampler_relies_on_it() -> None:
    z = np.array([0.0, -86.0001, -1e9, -np.inf], f32)
    assert expf_fixed(z).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert logf_fixed(np.array([1.0], f32)).tolist() == [0.0]


@given(st.floats(-86, 0, width=32))
def test_exp_follows_its_page_step_by_step(value: float) -> None:
    z = f32(value)
    n = f32(f32(f32(z * LOG2E) + MAGIC) - MAGIC)
    r = f32(f32(z - f32(n * LN2_HI)) - f32(n * LN2_LO))
    e0, e1, e2, e3, e4, e5 = EXP_COEFFICIENTS
    q = f32(e4 + f32(r * e5))
    for coefficient in (e3, e2, e1, e0):
        q = f32(coefficient + f32(r * q))
    p = f32(f32(1) + f32(r + f32(f32(r * r) * q)))
    scale = np.array((int(n) + 127) << 23, np.int32).view(f32)
    assert expf_fixed(np.array([z]))[0] == f32(p * scale)


@given(st.floats(float(f32(1e-30)), float(f32(1e30)), width=32))
def test_log_follows_its_page_step_by_step(value: float) -> None:
    y = f32(value)
    bits = int(np.array(y).view(np.int32))
    k = (bits - 0x3F3504F3) >> 23
    f = f32(np.array(bits - (k << 23), np.int32).view(f32) - f32(1))
    s = f32(f / f32(f32(2) + f))
    w = f32(s * s)
    l0, l1, l2, l3 = LOG_COEFFICIENTS
    t = f32(w * f32(l0 + f32(w * f32(l1 + f32(w * f32(l2 + f32(w * l3)))))))
    g = f32(f - f32(s * f32(f - t)))
    expected = f32(f32(f32(k) * LN2_HI) + f32(f32(f32(k) * LN2_LO) + g))
    assert logf_fixed(np.array([y]))[0] == expected
