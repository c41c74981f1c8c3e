"""The nightly check on a GPU: graphs, cold caches, and a kernel that sums in another order."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.nightly_check import NOTHING_VARIED, CheckFolder, copy_source
from support.paths import REPO_ROOT

OPTIONS = (*NOTHING_VARIED, "check.batch_sizes=[1]", "check.prefix_caching=true")
FIRST, LAST = "__fmaf_rn(x[i].x, x[i].x, sum)", "__fmaf_rn(x[i].w, x[i].w, sum)"


def alter_norm_order(source: Path) -> None:
    """Each thread of the RMS norm adds its four squares in another order."""
    common = source / "kernels" / "common.cuh"
    text = common.read_text()
    assert text.count(FIRST) == text.count(LAST) == 1, "the norm sums elsewhere now: alter it there"
    swapped = text.replace(FIRST, "LAST").replace(LAST, FIRST).replace("LAST", LAST)
    common.write_text(swapped)


@pytest.fixture(scope="module")
def proven(tmp_path_factory):
    folder = CheckFolder(tmp_path_factory.mktemp("nightly"), REPO_ROOT, "cuda")
    folder.write_inputs(
        num_layers=4, hidden_size=512, num_heads=8, num_kv_heads=4, intermediate_size=1024
    )
    return folder, folder.night(OPTIONS)


def test_a_night_on_the_gpu_passes_with_and_without_graphs(proven):
    _, (code, document, err) = proven
    assert code == 0, err
    equal = {v["name"] for v in document["variations"] if v["status"] == "equal"}
    assert {"reference", "batch-1", "no-prefix-caching", "no-graphs"} <= equal
    assert document["engine"] == "cuda"
    assert len(document["kernels_hash"]) == 64
    assert "driver" in document["versions"]


def test_a_kernel_with_another_reduction_order_fails_and_is_named(proven, tmp_path):
    folder, _ = proven
    source = copy_source(REPO_ROOT, tmp_path / "source")
    alter_norm_order(source)
    code, document, err = replace(folder, source=source).night(
        [*NOTHING_VARIED, "check.graphs=false"]
    )
    assert code == 1, err
    assert document["first_difference"]["comparison"] == "baseline"
    assert "orcd_batch's code in kernels/common.cuh" in document["cause"]
    assert "kernels_hash" in [change["field"] for change in document["changed"]]
