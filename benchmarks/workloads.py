"""The five workloads that engines are measured on, and the time below which no fp16 engine can go.

Prompts are lists of token ids from 5 to 31,999; every sample runs to its full length.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from true_shapes import Shape

READ_BYTES_PER_S = 4.66e12
FLOPS = 780e12
_FP16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Work:
    """One sample: its prompt, and how many tokens are generated."""

    prompt: list[int]
    num_new: int


@dataclass(frozen=True, slots=True)
class Workload:
    """name: w1 to w5. samples: consecutive samples of one prompt. max_running: at once, for the
    limit. counts_prompts: the figure is prompt tokens per second, not output tokens. temperature: 0
    is greedy."""

    name: str
    what: str
    works: list[Work]
    samples: int = 1
    max_running: int = 512
    counts_prompts: bool = False
    temperature: float = 0.0

    @property
    def num_counted(self) -> int:
        if self.counts_prompts:
            return sum(len(work.prompt) for work in self.works)
        return sum(work.num_new for work in self.works)


def w1() -> Workload:
    return Workload("w1", "1 sequence, 512 in, 256 out", _works([512], [256], seed=1))


def w2() -> Workload:
    return Workload("w2", "256 × (256 in, 256 out)", _works([256] * 256, [256] * 256, seed=2))


def w3() -> Workload:
    """Chat-like: lognormal lengths, all inputs drawn before all outputs."""
    lengths = random.Random(3)

    def length(mu: float, sigma: float, most: int) -> int:
        return max(4, min(most, int(lengths.lognormvariate(mu, sigma))))

    num_in = [length(4.9, 1.0, 1024) for _ in range(2000)]
    num_out = [length(5.0, 0.7, 512) for _ in range(2000)]
    return Workload("w3", "2,000 mixed, chat-like", _works(num_in, num_out, seed=3))


def w4() -> Workload:
    base = _works([512] * 64, [128] * 64, seed=4)
    works = [work for work in base for _ in range(30)]
    what = "64 prompts × 30 samples at temperature 1, 512 in, 128 out"
    return Workload("w4", what, works, 30, len(works), temperature=1.0)


def w5() -> Workload:
    works = _works([1024] * 512, [1] * 512, seed=5)
    return Workload("w5", "512 × 1,024 in, 1 out: prompt tokens", works, counts_prompts=True)


WORKLOADS: dict[str, Callable[[], Workload]] = {f.__name__: f for f in (w1, w2, w3, w4, w5)}


def limit_s(workload: Workload, shape: Shape) -> float:
    """Seconds: prefill at the matmul ceiling; decode reading the weights once a step and each
    sequence's keys and values once a token (a prompt's once for all its samples), or at the
    matmul ceiling where that is slower."""
    heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden = shape.hidden_size
    layer = hidden * (2 * heads + 2 * kv + 3 * shape.intermediate_size)
    layers, head = shape.num_layers * layer, shape.vocab_size * hidden
    kv_bytes = shape.num_layers * 2 * kv * _FP16_BYTES
    works, firsts = workload.works, workload.works[:: workload.samples]
    prefill = sum(
        2 * layers * len(work.prompt)
        + 2 * head
        + 2 * shape.num_layers * heads * len(work.prompt) ** 2
        for work in firsts
    )
    num_decoded = sum(work.num_new - 1 for work in works)
    cached = sum(work.num_new * (work.num_new - 1) // 2 for work in works)
    cached += sum((work.num_new - 1) * len(work.prompt) for work in firsts)
    num_steps = max(max(work.num_new for work in works) - 1, num_decoded / workload.max_running)
    num_bytes = cached * kv_bytes + num_steps * (layers + head) * _FP16_BYTES
    flops = num_decoded * 2 * (layers + head)
    return prefill / FLOPS + max(num_bytes / READ_BYTES_PER_S, flops / FLOPS)


def _works(num_in: Iterable[int], num_out: Iterable[int], seed: int) -> list[Work]:
    ids = random.Random(seed)
    pairs = zip(num_in, num_out, strict=True)
    return [Work([ids.randrange(5, 32000) for _ in range(i)], o) for i, o in pairs]
