"""From a model file and engine options to a running engine: the place that picks a backend."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

from orcd_batch.backend.op_times import as_lines
from orcd_batch.backend.ops import BLOCK_SIZE
from orcd_batch.checkpoint import GGUFFile, ModelConfig, weight_map
from orcd_batch.config import EngineOptions
from orcd_batch.engine.engine import Engine, check_limits
from orcd_batch.errors import ConfigError, DeviceError, OrcdError
from orcd_batch.memory import available_memory_bytes
from orcd_batch.model import Progress, load_weights, weight_bytes
from orcd_batch.reproducibility.environment import cpu_name

log = logging.getLogger(__name__)

EngineKind = Literal["numpy", "cuda"]

# Tokens of one step where the options leave it open: sequences, and room for prompts beside them.
_NUMPY_SEQS, _NUMPY_TOKENS = 64, 512
_CUDA_SEQS, _CUDA_TOKENS = 2048, 8192
# Attention's work space grows with sequences times context: fewer by default where it is long.
_CUDA_SEQS_TIMES_CONTEXT = 1 << 26
# Cache blocks: what running sequences can hold at most, and as much for prompts kept for others.
_CACHE_SHARES = 2


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """Which engine runs, on which device (its name), and why, as half a sentence.

    versions: of the libraries that only this engine uses.
    """

    kind: EngineKind
    device: str
    reason: str
    versions: Mapping[str, str | None] = field(default_factory=dict)


class Source(Protocol):
    """An open model file and its facts."""

    @property
    def gguf(self) -> GGUFFile: ...

    @property
    def config(self) -> ModelConfig: ...


@dataclass(frozen=True, slots=True)
class OpenModel:
    """The plainest `Source`."""

    gguf: GGUFFile
    config: ModelConfig


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """A loaded engine; a context manager that closes it.

    weight_bytes, kv_cache_bytes: in the memory of the engine's device.
    """

    engine: Engine
    config: ModelConfig
    ops: Any
    choice: EngineChoice
    weight_bytes: int
    kv_cache_bytes: int

    @property
    def kind(self) -> EngineKind:
        return self.choice.kind

    def describe(self) -> dict[str, Any]:
        """Plain values for the manifest: limits, memory, and what the backend tells of itself."""
        engine = self.engine
        return {
            "kind": self.choice.kind,
            "device": self.choice.device,
            "reason": self.choice.reason,
            "max_num_seqs": engine.max_num_seqs,
            "max_num_batched_tokens": engine.max_num_batched_tokens,
            "max_model_len": engine.max_model_len,
            "backend": self.ops.manifest(),
        }

    def _log_op_times(self) -> None:
        """Under debug, the time of every op goes to the log."""
        table = self.ops.op_times()
        if table:
            log.info("time per op:\n%s", "\n".join(as_lines(table)))

    def memory(self) -> dict[str, int]:
        """Bytes by use, and the cache blocks that free memory allowed."""
        return {
            "weight_bytes": self.weight_bytes,
            "kv_cache_bytes": self.kv_cache_bytes,
            "num_blocks": self.engine.block_manager.num_blocks,
        }

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self._log_op_times()
            self.close()
        else:
            _close_after(error, self.close)


def choose_engine(kind: str) -> EngineChoice:
    """The engine for `kind`: "auto" is CUDA where there is a usable GPU, else numpy.

    Raises DeviceError, with the reason, for "cuda" without a usable GPU.
    """
    if kind == "numpy":
        return EngineChoice("numpy", cpu_name(), "asked for")
    from orcd_batch.backend.cuda.device import Device
    from orcd_batch.backend.cuda.versions import library_versions

    try:
        device = Device()
    except DeviceError as error:
        if kind == "cuda":
            raise
        return EngineChoice("numpy", cpu_name(), str(error).rstrip("."))
    reason = "asked for" if kind == "cuda" else "a GPU is there"
    choice = EngineChoice("cuda", device.name, reason, library_versions(device))
    device.close()
    return choice


def build_engine(
    source: Source,
    options: EngineOptions,
    choice: EngineChoice,
    progress: Progress | None = None,
    *,
    debug: bool = False,
) -> BuiltEngine:
    """Loads the model's weights and makes the engine ready to take requests.

    progress: called with each part loaded. debug: every op is timed. Raises ConfigError for
    options that contradict the model, CheckpointError for weights that cannot be used, DeviceError
    when memory is short.
    """
    config = source.config
    max_model_len = options.max_model_len or config.context_length
    if max_model_len > config.context_length:
        raise ConfigError(
            f"engine.max_model_len={max_model_len} is beyond the model's context of "
            f"{config.context_length} tokens; lower it or leave it out."
        )
    build = _build_cuda if choice.kind == "cuda" else _build_numpy
    return build(source, options, choice, max_model_len, progress, debug)


def _build_numpy(
    source: Source,
    options: EngineOptions,
    choice: EngineChoice,
    max_model_len: int,
    progress: Progress | None,
    debug: bool,
) -> BuiltEngine:
    from orcd_batch.backend.numpy_ops import NumpyOps

    config, sources = source.config, weight_map(source.gguf, source.config)
    max_num_seqs, max_num_batched_tokens = _limits(options, _NUMPY_SEQS, _NUMPY_TOKENS)
    num_weight_bytes = weight_bytes(sources, config, 4)
    block_bytes = 8 * config.num_layers * config.num_kv_heads * BLOCK_SIZE * config.head_dim
    num_blocks = _numpy_blocks(options, max_num_seqs, max_model_len, num_weight_bytes, block_bytes)

    def fill(ops: NumpyOps) -> Engine:
        weights = load_weights(source.gguf, sources, config, ops, progress, max_model_len)
        return Engine(
            config,
            weights,
            ops,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            prefix_caching=options.prefix_caching,
        )

    ops = NumpyOps(options.num_threads, time_ops=debug)
    engine = _closing_on_failure(ops, fill)
    return BuiltEngine(engine, config, ops, choice, num_weight_bytes, num_blocks * block_bytes)


def _build_cuda(
    source: Source,
    options: EngineOptions,
    choice: EngineChoice,
    max_model_len: int,
    progress: Progress | None,
    debug: bool,
) -> BuiltEngine:
    from orcd_batch.backend.cuda.ops import CudaOps
    from orcd_batch.backend.cuda.plan import ModelShape

    config, sources = source.config, weight_map(source.gguf, source.config)
    num_seqs = max(min(_CUDA_SEQS, _CUDA_SEQS_TIMES_CONTEXT // max_model_len), 1)
    max_num_seqs, max_num_batched_tokens = _limits(options, num_seqs, _CUDA_TOKENS)
    sizes = {name: getattr(config, name) for name in ModelShape.__slots__[:-1]}
    shape = ModelShape(**sizes, max_model_len=max_model_len)
    num_weight_bytes = weight_bytes(sources, config, 2)
    max_num_blocks = _CACHE_SHARES * max_num_seqs * _blocks(max_model_len)
    if options.kv_cache_bytes is not None:
        _check_cache(options.kv_cache_bytes, shape.kv_block_bytes, max_model_len)
        max_num_blocks = min(max_num_blocks, options.kv_cache_bytes // shape.kv_block_bytes)

    def fill(ops: CudaOps) -> Engine:
        plan = ops.plan(
            shape,
            weight_bytes=num_weight_bytes,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            utilization=options.gpu_memory_utilization,
            max_num_blocks=max_num_blocks,
        )
        weights = load_weights(source.gguf, sources, config, ops, progress, max_model_len)
        engine = Engine(
            config,
            weights,
            ops,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_blocks=plan.num_blocks,
            max_model_len=max_model_len,
            prefix_caching=options.prefix_caching,
            run_ahead=True,
        )
        ops.prepare(shape, max_num_batched_tokens, max_num_seqs)
        return engine

    ops = CudaOps(graphs=options.graphs, time_ops=debug)
    engine = _closing_on_failure(ops, fill)
    num_cache_bytes = engine.block_manager.num_blocks * shape.kv_block_bytes
    return BuiltEngine(engine, config, ops, choice, num_weight_bytes, num_cache_bytes)


def _closing_on_failure(ops: Any, fill: Callable[[Any], Engine]) -> Engine:
    try:
        return fill(ops)
    except BaseException as error:
        _close_after(error, ops.close)
        raise


def _close_after(error: BaseException, close: Callable[[], None]) -> None:
    """Closes without hiding the error that came first: after a GPU's fault closing fails too."""
    try:
        close()
    except OrcdError as later:
        log.debug("closing after %r failed as well: %s", error, later)


def _limits(options: EngineOptions, num_seqs: int, num_tokens: int) -> tuple[int, int]:
    """(max_num_seqs, max_num_batched_tokens), the engine's own defaults filled in."""
    max_num_seqs = options.max_num_seqs or min(num_seqs, options.max_num_batched_tokens or num_seqs)
    max_num_batched_tokens = options.max_num_batched_tokens or max(num_tokens, max_num_seqs)
    check_limits(max_num_seqs, max_num_batched_tokens)
    return max_num_seqs, max_num_batched_tokens


def _blocks(num_positions: int) -> int:
    return -(-num_positions // BLOCK_SIZE)


def _check_cache(kv_cache_bytes: int, block_bytes: int, max_model_len: int) -> None:
    """A cache must hold one whole context, or its size would decide which rows can run."""
    needed = _blocks(max_model_len) * block_bytes
    if kv_cache_bytes < needed:
        raise ConfigError(
            f"engine.kv_cache_bytes={kv_cache_bytes} is less than the {needed} bytes that one "
            f"context of {max_model_len} tokens needs; raise it, or lower engine.max_model_len."
        )


def _numpy_blocks(
    options: EngineOptions,
    max_num_seqs: int,
    max_model_len: int,
    num_weight_bytes: int,
    block_bytes: int,
) -> int:
    """Cache blocks that fit: a quarter of the free memory, or what the options say."""
    available = available_memory_bytes()
    one_context = _blocks(max_model_len) * block_bytes
    wanted = options.kv_cache_bytes
    if wanted is None:
        wanted = max(min(available // 4, available - num_weight_bytes), one_context)
    _check_cache(wanted, block_bytes, max_model_len)
    max_num_blocks = _CACHE_SHARES * max_num_seqs * _blocks(max_model_len)
    num_blocks = min(wanted // block_bytes, max_num_blocks)
    needed = num_weight_bytes + num_blocks * block_bytes
    if needed > available:
        raise DeviceError(
            f"Not enough memory: weights ({num_weight_bytes:,} bytes) and KV cache "
            f"({num_blocks * block_bytes:,} bytes, at least {one_context:,}) need "
            f"{needed:,} bytes and {available:,} are free; use a smaller model, or lower "
            "engine.max_model_len or engine.kv_cache_bytes."
        )
    return num_blocks
