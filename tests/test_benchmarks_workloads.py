"""The workloads are the ones that the published figures are for, and so are their limits."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from true_shapes import SHAPES
from workloads import WORKLOADS, limit_s

# Name: samples, tokens in, tokens out, and the limit in tokens per second for Phi-3-mini.
KNOWN = {
    "w1": (1, 512, 256, 601),
    "w2": (256, 65_536, 65_536, 20_900),
    "w3": (2000, 403_000, 351_318, 24_300),
    "w4": (1920, 983_040, 245_760, 93_200),
    "w5": (512, 524_288, 512, 104_700),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_has_its_size_and_its_limit(name: str) -> None:
    workload = WORKLOADS[name]()
    num_samples, num_in, num_out, limit = KNOWN[name]
    assert len(workload.works) == num_samples
    assert sum(len(work.prompt) for work in workload.works) == pytest.approx(num_in, rel=0.02)
    assert sum(work.num_new for work in workload.works) == num_out
    tokens_per_s = workload.num_counted / limit_s(workload, SHAPES["phi3"])
    assert tokens_per_s == pytest.approx(limit, rel=0.002)


def test_samples_of_one_prompt_stand_together() -> None:
    workload = WORKLOADS["w4"]()
    for first in range(0, len(workload.works), workload.samples):
        group = workload.works[first : first + workload.samples]
        assert all(work.prompt is group[0].prompt for work in group)
