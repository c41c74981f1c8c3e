"""A random model of true shape against transformers (fp32, TF32 off) on the same GPU.

    python benchmarks/make_model.py phi3 /dev/shm/phi3.gguf
    python benchmarks/cuda_oracle.py phi3 /dev/shm/phi3.gguf [--name phi3] [--memory]

Teacher-forced logits of whole prompts, greedy completions, prompts up to the context and beyond
it, and with --memory the memory in use over 1,000 decode steps. Prints every figure beside its
limit, stores them (see results_file.py), and exits 1 when one is beyond. Needs torch and
transformers.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import torch
from numpy.typing import NDArray
from oracle.transformers_model import build
from results_file import RESULTS, write_results
from true_shapes import SHAPES, Shape

from orcd_batch import LlamaInferenceAdapter, SamplingParams
from orcd_batch.checkpoint import GGUFFile
from orcd_batch.engine.request import Completion
from orcd_batch.engine_factory import choose_engine

# Limits of issue 3, in logits.
MEAN_LIMIT, P999_LIMIT, WORST_LIMIT, MARGIN_LIMIT = 0.02, 0.1, 0.25, 0.3
_BINS, _BIN_WIDTH = 20_000, 1e-4
_MAX_MODEL_LEN = 8192
_GREEDY_TOKENS = 32
_DECODE_STEPS = 1000
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True, slots=True)
class Check:
    """One figure; `ok` says whether it is within its limit."""

    name: str
    value: Any
    limit: str
    ok: bool


class Oracle:
    """transformers' model of the same file, its facts taken from `true_shapes`, not the file."""

    def __init__(self, path: Path, shape: Shape, device: str) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        rope = _LLAMA3_ROPE if shape.rope_freqs else {"rope_type": "default"}
        with GGUFFile.open(path) as gguf:
            types = {"F16": np.float16, "F32": np.float32}
            tensors = {
                name: gguf.raw(name).view(types[tensor.ggml_type]).reshape(tensor.shape)
                for name, tensor in gguf.tensors.items()
            }
            self._model = build(asdict(shape), tensors, rope, device)
            del tensors
        self._device = device

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """(T, V) fp32."""
        out: torch.Tensor = self._model(self._placed(ids), use_cache=False).logits[0]
        return out

    @torch.no_grad()
    def largest_residual(self, ids: Sequence[int]) -> float:
        """Of every layer's input at every position."""
        out = self._model(self._placed(ids), use_cache=False, output_hidden_states=True)
        return max(float(states.abs().max()) for states in out.hidden_states[:-1])

    def _placed(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self._device)


class Errors:
    """Absolute differences of logits, counted in bins of 1e-4."""

    def __init__(self) -> None:
        self.count, self.total, self.worst, self.finite = 0, 0.0, 0.0, True
        self._bins = torch.zeros(_BINS, dtype=torch.float64)

    def add(self, expected: torch.Tensor, found: NDArray[np.float32]) -> None:
        ours = torch.from_numpy(found).to(expected.device)
        self.finite &= bool(torch.isfinite(ours).all())
        difference = (ours - expected).abs_().flatten().nan_to_num_(nan=torch.inf)
        self.count += difference.numel()
        self.total += float(difference.double().sum())
        self.worst = max(self.worst, float(difference.max()))
        index = difference.div_(_BIN_WIDTH).clamp_(max=_BINS - 1).long()
        self._bins += torch.bincount(index, minlength=_BINS).double().cpu()

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def p999(self) -> float:
        """The upper edge of the bin that holds the 99.9th percentile."""
        below = torch.cumsum(self._bins, 0) < 0.999 * self.count
        return float((int(below.sum()) + 1) * _BIN_WIDTH)


def teacher_forced(
    oracle: Oracle, model: LlamaInferenceAdapter, prompts: Sequence[Sequence[int]]
) -> list[Check]:
    errors, spread = Errors(), 0.0
    for prompt in prompts:
        expected = oracle.logits(prompt)
        spread = float(expected.std())
        errors.add(expected, model.prefill(prompt))
        del expected
    lengths = ", ".join(str(len(prompt)) for prompt in prompts)
    return [
        Check("teacher-forced: prompt lengths", lengths, "", True),
        Check("teacher-forced: logits compared", errors.count, "all finite", errors.finite),
        Check("teacher-forced: standard deviation of the logits", round(spread, 3), "", True),
        _most("teacher-forced: mean difference", errors.mean, MEAN_LIMIT),
        _most("teacher-forced: 99.9th percentile", errors.p999, P999_LIMIT),
        _most("teacher-forced: worst", errors.worst, WORST_LIMIT),
    ]


def greedy(
    oracle: Oracle, model: LlamaInferenceAdapter, prompts: Sequence[Sequence[int]]
) -> list[Check]:
    """Every greedy token of ours must be within MARGIN_LIMIT of the best in the oracle's logits
    of the same prefix: wherever the oracle's margin is larger, it is the oracle's token."""
    params = SamplingParams(max_tokens=_GREEDY_TOKENS, ignore_eos=True)
    num_tokens, num_different, worst, logprob_error = 0, 0, 0.0, 0.0
    failed = []
    for prompt, done in zip(prompts, model.generate(prompts, params), strict=True):
        failed += [done.error] if done.error else []
        ids = done.token_ids
        logits = oracle.logits([*prompt, *ids[:-1]])[len(prompt) - 1 :]
        chosen = torch.tensor(ids, device=logits.device)[:, None]
        gaps = logits.max(-1).values - logits.gather(1, chosen)[:, 0]
        logprobs = torch.log_softmax(logits.double(), -1).gather(1, chosen)[:, 0].cpu().numpy()
        num_tokens += len(ids)
        num_different += int((gaps > 0).sum())
        worst = max(worst, float(gaps.max()))
        logprob_error = max(logprob_error, float(np.abs(logprobs - done.logprobs).max()))
    expected = len(prompts) * _GREEDY_TOKENS
    return [
        Check("greedy: tokens", num_tokens, f"{expected}, no error", num_tokens == expected),
        Check("greedy: tokens not the oracle's own", num_different, "", not failed),
        _most("greedy: oracle's margin where they differ", worst, MARGIN_LIMIT),
        _most("greedy: log-probabilities, worst", logprob_error, WORST_LIMIT),
    ]


def context_limits(model: LlamaInferenceAdapter, limit: int) -> list[Check]:
    """A prompt near the context runs, one beyond it is an error naming the limit, and the row
    beside it is none the worse."""
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    near, beyond = limit - limit // 40, limit + limit // 4
    prompts = [[7] * near, list(range(5, 100)), [7] * beyond]
    long, short, refused = model.generate(prompts, params)
    (alone,) = model.generate(prompts[1:2], params)
    return [
        Check(f"a prompt of {near} tokens", _outcome(long), "8 tokens", _is_whole(long)),
        Check(
            f"a prompt of {beyond} tokens",
            _outcome(refused),
            f"an error naming {limit}",
            str(limit) in (refused.error or "").replace(",", ""),
        ),
        Check(
            "the row beside them",
            _outcome(short),
            "the bits it has alone",
            short.fingerprints == alone.fingerprints and _is_whole(short),
        ),
    ]


def memory_growth(model: LlamaInferenceAdapter) -> list[Check]:
    """Device memory before and after 1,000 decode steps of four sequences."""
    device = model._built.ops.device
    prompts = [[5 + i] * (16 + 100 * i) for i in range(4)]
    model.generate(prompts, SamplingParams(max_tokens=600, ignore_eos=True))
    used, free = device.memory_by_use(), device.memory_info().free
    steps = model._built.engine.num_steps
    model.generate(prompts, SamplingParams(max_tokens=_DECODE_STEPS + 1, ignore_eos=True))
    steps = model._built.engine.num_steps - steps
    growth = free - device.memory_info().free
    return [
        Check(f"memory: growth over {steps} steps, bytes", growth, "at most 0", growth <= 0),
        Check("memory: by use", used, "unchanged", device.memory_by_use() == used),
    ]


def _most(name: str, value: float, limit: float) -> Check:
    return Check(name, round(value, 5), f"at most {limit}", value <= limit)


def _outcome(done: Completion) -> str:
    return done.error or f"{len(done.token_ids)} tokens"


def _is_whole(done: Completion) -> bool:
    return done.error is None and len(done.token_ids) == 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("path", type=Path, help="made by make_model.py with the same --layers")
    parser.add_argument("--name", help="in the result's file name; default: the shape")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--engine", choices=("auto", "cuda", "numpy"), default="auto")
    parser.add_argument("--device", default="cuda", help="where transformers runs")
    parser.add_argument("--lengths", default="1,17,64,200,900", help="of the prompts")
    parser.add_argument("--residual-at-least", type=float, help="the residual stream must reach it")
    parser.add_argument("--memory", action="store_true", help="and context limits; CUDA only")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.layers is not None:
        shape = replace(shape, num_layers=options.layers)
    limit = min(shape.context_length, _MAX_MODEL_LEN)
    random = np.random.default_rng(0)
    lengths = [int(length) for length in options.lengths.split(",")]
    prompts = [random.integers(5, shape.vocab_size, length).tolist() for length in lengths]

    started = time.perf_counter()
    oracle = Oracle(options.path, shape, options.device)
    built = time.perf_counter()
    choice = choose_engine(options.engine)
    model = LlamaInferenceAdapter.load(
        options.path,
        choice.kind,
        max_num_seqs=16,
        max_num_batched_tokens=2048,
        max_model_len=limit,
        kv_cache_bytes=8 << 30 if choice.kind == "cuda" else None,
    )
    loaded = time.perf_counter()
    print(f"oracle {built - started:.1f} s, model {loaded - built:.1f} s", file=sys.stderr)
    with model:
        checks = teacher_forced(oracle, model, prompts)
        checks += greedy(oracle, model, [p for p in prompts if len(p) + _GREEDY_TOKENS <= limit])
        if options.residual_at_least is not None:
            residual, least = oracle.largest_residual(prompts[-1]), options.residual_at_least
            said = f"at least {least:,.0f}"
            checks.append(Check("largest residual", round(residual), said, residual >= least))
        if options.memory:
            checks += context_limits(model, limit) + memory_growth(model)
    seconds = round(time.perf_counter() - started, 1)
    for check in checks:
        verdict = "ok" if check.ok else "FAILS"
        print(f"{check.name:52} {check.value!s:>24}  {check.limit:24} {verdict}")
    all_ok = all(check.ok for check in checks)
    name = options.name or options.shape
    print(f"{name} on {choice.device} ({choice.kind}): {'ok' if all_ok else 'FAILS'}, {seconds} s")
    facts = {
        "oracle": f"transformers, torch {torch.__version__}, fp32 on {options.device}",
        "shape": {key: value for key, value in asdict(shape).items() if key != "pre"},
        "all_ok": all_ok,
        "seconds": seconds,
        "checks": [asdict(check) for check in checks],
    }
    write_results(options.results, f"oracle-{name}", choice, facts)
    sys.exit(0 if all_ok else 1)


if __name__ == "__main__":
    main()
