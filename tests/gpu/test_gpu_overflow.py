"""Values beyond fp16: right, or an error row, never a wrong row; neighbours are unharmed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.gguf_factory import write_model

from orcd_batch import LlamaInferenceAdapter, SamplingParams
from orcd_batch.checkpoint import GGUFFile

ENGINE = "cuda"
HIDDEN = 128
IDS = [(7 * i) % 200 + 10 for i in range(150)]
# Which tensors are scaled, by the end of their name.
PARTS = {
    "values": ("attn_v.weight",),
    "gate and up": ("ffn_gate.weight", "ffn_up.weight"),
    "norm of the FFN": ("ffn_norm.weight",),
    "last norm": ("output_norm.weight",),
    "residual stream": ("token_embd.weight", "attn_output.weight", "ffn_down.weight"),
}


def change(
    path: Path, parts: tuple[str, ...], edit: Callable[[NDArray[np.float32]], object]
) -> None:
    """Applies `edit` to the fp32 tensors whose names end so, in the file."""
    with GGUFFile.open(path) as gguf:
        tensors = [t for name, t in gguf.tensors.items() if name.endswith(parts)]
    assert tensors
    for tensor in tensors:
        edit(np.memmap(path, np.float32, "r+", tensor.offset, tensor.shape))


def load(path: Path, engine: str) -> LlamaInferenceAdapter:
    return LlamaInferenceAdapter.load(path, engine=engine, max_num_seqs=8, max_model_len=256)


@pytest.mark.parametrize("part", PARTS)
def test_logits_are_right_or_not_finite_at_every_scale(part: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, num_layers=2, hidden_size=HIDDEN, num_kv_heads=4, weight_scale=1.0)
    num_finite, num_rows = 0, 0
    for step in (1, 10, 10, 10, 10, 4):
        change(path, PARTS[part], lambda values, step=step: np.multiply(values, step, out=values))
        with load(path, ENGINE) as ours, load(path, "numpy") as twin:
            found, expected = ours.prefill(IDS), twin.prefill(IDS)
            finite = np.isfinite(found).all(axis=1)
            difference = np.abs(found[finite] - expected[finite])
            assert difference.max(initial=0) <= 0.05 * expected.std()
            (done,) = ours.generate([IDS], SamplingParams(max_tokens=2, ignore_eos=True))
            assert (done.error is None) == bool(finite[-1])
        num_finite += int(finite.sum())
        num_rows += len(finite)
    assert num_finite > 0
    if part == "residual stream":
        assert num_finite == num_rows
    else:
        assert num_finite < num_rows


def test_a_row_that_overflows_leaves_its_neighbours_their_bits(tmp_path: Path) -> None:
    path, bad_token = tmp_path / "model.gguf", 9
    write_model(path, num_layers=2, hidden_size=HIDDEN, num_kv_heads=4, weight_scale=1.0)

    def one_hot(embedding: NDArray[np.float32]) -> None:
        embedding[bad_token] = 0
        embedding[bad_token, 3] = 1

    def large(weight: NDArray[np.float32]) -> None:
        weight[:, 3] = 15_000  # times sqrt(HIDDEN) for the bad token, beyond 65,504

    change(path, ("token_embd.weight",), one_hot)
    change(path, ("blk.0.attn_v.weight",), large)
    good = [IDS[:70], IDS[5:40], IDS[20:21]]
    bad = [[*IDS[:70], bad_token, *IDS[:3]], [bad_token]]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    with load(path, ENGINE) as model:
        alone = [model.generate([prompt], params)[0] for prompt in good]
        for _ in range(3):
            together = model.generate([bad[0], good[0], bad[1], *good[1:], *bad], params)
            errors = [done for done in together if done.error]
            assert [done.prompt_token_ids for done in errors] == [
                tuple(prompt) for prompt in (bad[0], bad[1], *bad)
            ]
            assert "not finite" in (errors[0].error or "")
            for done, expected in zip(
                [done for done in together if not done.error], alone, strict=True
            ):
                assert done.token_ids == expected.token_ids
                assert done.fingerprints == expected.fingerprints
