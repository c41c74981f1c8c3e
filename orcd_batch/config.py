"""The schema of a job's options, and the checks that span several of them.

Hydra composes conf/ into these dataclasses, so an unknown or ill-typed option is refused before
anything runs. They are not frozen because Hydra writes overrides into them; `resolve` turns the
composed config into plain values once, and nothing below the edge sees a DictConfig.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_args

from omegaconf import MISSING, DictConfig, OmegaConf

from orcd_batch.errors import ConfigError

ENGINE_KINDS = ("auto", "cuda", "numpy")
ON_ERROR = ("record", "raise")
SCALE_OUT_KINDS = ("none", "ray")


@dataclass(slots=True)
class ModelOptions:
    """Which model, and how a prompt becomes text for it.

    path: a local GGUF or hf://owner/repo/file.gguf@revision. hub: where to get it, for messages.
    architectures: what `general.architecture` may say. chat: wrap a string prompt as one user
    message. chat_date: the date (YYYY-MM-DD) that chat templates see. sliding_window: null is as
    the file says, 0 is off.
    """

    name: str = MISSING
    path: str = MISSING
    hub: str | None = None
    architectures: list[str] = field(default_factory=list)
    chat: bool = True
    chat_date: str = "2026-01-01"
    sliding_window: int | None = None


@dataclass(slots=True)
class SamplingOptions:
    """How tokens are chosen; each may be overridden per row with dataset.sampling_columns."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_tokens: int = 256
    stop: list[str] = field(default_factory=list)
    n: int = 1
    ignore_eos: bool = False


@dataclass(slots=True)
class DatasetOptions:
    """How to read `data`. id_column: null takes `id` when there is one, else the row's index.

    on_error: `record` keeps going and writes an error row, `raise` stops the job.
    limit: only the first so many input rows.
    """

    prompt_column: str | None = "prompt"
    messages_column: str | None = "messages"
    token_ids_column: str | None = "token_ids"
    id_column: str | None = None
    sampling_columns: list[str] = field(default_factory=list)
    drop_columns: list[str] = field(default_factory=list)
    output_prefix: str = ""
    limit: int | None = None
    on_error: str = "record"


@dataclass(slots=True)
class EngineOptions:
    """Where and how to run; of these, `kind` alone can change a bit of a completion.

    max_num_seqs: sequences running at once. max_num_batched_tokens: tokens of one step.
    kv_cache_bytes: null sizes the cache from free memory. max_model_len: prompt and completion
    together, where a completion must end; null is the file's.
    num_threads: CPU threads of the numpy engine, 0 is one per core. graphs: the GPU engine replays
    decode steps as CUDA graphs.
    """

    kind: str = "auto"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_bytes: int | None = None
    max_model_len: int | None = None
    prefix_caching: bool = True
    num_threads: int = 0
    graphs: bool = True


@dataclass(slots=True)
class ScaleOutOptions:
    """One job over many workers, without any effect on its results; see docs/scale_out.md.

    kind: `ray` deals the rows to workers, each a process with its own engine. address: of a running
    Ray cluster; null starts Ray here, for this job. replicas: how many workers; null is one per
    GPU, or on the numpy engine one per cpus_per_replica. gpus_per_replica: null is 1 with the CUDA
    engine. cpus_per_replica: null is 1, or engine.num_threads on the numpy engine. retries: how
    often in a row a worker is started again that has not finished a row. start_timeout_s: a worker
    that needs longer to get ready is started again.
    """

    kind: str = "none"
    address: str | None = None
    replicas: int | None = None
    gpus_per_replica: float | None = None
    cpus_per_replica: float | None = None
    retries: int = 5
    start_timeout_s: float = 600.0


@dataclass(slots=True)
class CheckOptions:
    """A check: the job run many times in different ways, all compared; see docs/nightly.md.

    directory: where the check's own things lie. history: a Parquet file that gets one row a check.
    baseline: a directory of golden results; made by the first check that passes. null: without.
    junit: the report for CI systems; null puts it beside the results. report: an HTML page.
    runs: how often the job is run as configured. orders: how many shuffled orders of the rows.
    single_rows: how many rows are run alone. stop_after, kill_after: rows after which a run gets
    SIGTERM or SIGKILL and is then continued. prefix_caching, graphs: also without. gpus: also on
    every other GPU of the same kind, and on all of them together. replicas: also dealt to so many
    workers by Ray, on GPUs or CPUs. timeout_s: a run that takes longer has failed.
    """

    directory: str = "outputs/check"
    history: str | None = None
    baseline: str | None = None
    junit: str | None = None
    report: bool = True
    runs: int = 2
    batch_sizes: list[int] = field(default_factory=list)
    chunk_sizes: list[int] = field(default_factory=list)
    orders: int = 0
    single_rows: int = 0
    stop_after: list[int] = field(default_factory=list)
    kill_after: list[int] = field(default_factory=list)
    thread_counts: list[int] = field(default_factory=list)
    prefix_caching: bool = False
    graphs: bool = False
    gpus: bool = False
    replicas: list[int] = field(default_factory=list)
    timeout_s: float | None = None


@dataclass(slots=True)
class JobOptions:
    """One whole job, as composed by Hydra. check: the job is not run once but checked."""

    model: ModelOptions = field(default_factory=ModelOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    scale_out: ScaleOutOptions = field(default_factory=ScaleOutOptions)
    data: Any = MISSING
    output: str | None = None
    overwrite: bool = False
    debug: bool = False
    check: CheckOptions | None = None


def option_names(schema: type = JobOptions, prefix: str = "") -> Iterator[str]:
    """Every option as a dotted name, in the order of the schema."""
    for f in fields(schema):
        name = prefix + f.name
        yield name
        for kind in (f.type, *get_args(f.type)):
            if isinstance(kind, type) and is_dataclass(kind):
                yield from option_names(kind, name + ".")


def nearest_option(name: str) -> str | None:
    """The valid option a mistyped one most likely means, or None."""
    by_leaf = {known.rsplit(".", 1)[-1]: known for known in option_names()}
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], by_leaf, n=1, cutoff=0.7)
    return by_leaf[close[0]] if close else None


def _composed_names(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in node:
        assert isinstance(key, str), f"the composed config has the key {key!r}"
        yield prefix + key
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_missing():
            yield from _composed_names(child, f"{prefix}{key}.")


def resolve(cfg: DictConfig) -> JobOptions:
    """The composed config as checked plain values.

    Raises ConfigError with one sentence for a missing, unknown or contradictory option.
    """
    known = set(option_names())
    for name in _composed_names(cfg):
        if name not in known:
            near = nearest_option(name)
            hint = f"did you mean {near}?" if near else "`orcd-batch --help` lists the options."
            raise ConfigError(f"There is no option {name}: {hint}")
    for name in ("data", "model.path"):
        if OmegaConf.select(cfg, name) is None:
            raise ConfigError(f"{name} is not set: add {name}=FILE to the command.")
    options = OmegaConf.to_object(cfg)
    assert isinstance(options, JobOptions), f"composed config is {type(options)}"
    options.data = _paths(options.data)
    _check_dataset(options.dataset)
    check_engine(options.engine)
    _check_scale_out(options.scale_out)
    if options.check is not None:
        _check_check(options.check)
    window = options.model.sliding_window
    _require(window is None or window >= 0, "model.sliding_window", window, "0 (off) or more")
    return options


def job_facts(plain: Any) -> dict[str, Any]:
    """The options that say what a job computes, out of a plain config: its name, not its speed."""
    return {
        "model": {k: plain["model"][k] for k in ("path", "chat", "chat_date", "sliding_window")},
        "data": plain["data"],
        "sampling": plain["sampling"],
        "dataset": {k: v for k, v in plain["dataset"].items() if k != "on_error"},
        "engine": {k: plain["engine"][k] for k in ("kind", "max_model_len")},
    }


def _paths(data: Any) -> list[str]:
    paths = [data] if isinstance(data, str) else data
    if not isinstance(paths, list) or not paths or not all(isinstance(p, str) for p in paths):
        raise ConfigError(
            f"data={data!r} must be a path or a list of paths, such as data=prompts.parquet "
            "or 'data=[a.parquet,b.parquet]'."
        )
    return [str(p) for p in paths]


def _require(good: bool, name: str, value: object, allowed: str) -> None:
    if not good:
        raise ConfigError(f"{name}={value} is out of range: it must be {allowed}.")


def _check_dataset(d: DatasetOptions) -> None:
    _require(d.on_error in ON_ERROR, "dataset.on_error", d.on_error, " or ".join(ON_ERROR))
    _require(d.limit is None or d.limit >= 0, "dataset.limit", d.limit, "0 or more, or null")
    allowed = [f.name for f in fields(SamplingOptions) if f.name != "ignore_eos"]
    for name in d.sampling_columns:
        _require(name in allowed, "dataset.sampling_columns", name, "among " + ", ".join(allowed))


def _check_scale_out(s: ScaleOutOptions) -> None:
    _require(s.kind in SCALE_OUT_KINDS, "scale_out.kind", s.kind, " or ".join(SCALE_OUT_KINDS))
    _require(s.replicas is None or s.replicas >= 1, "scale_out.replicas", s.replicas, "at least 1")
    for name in ("gpus_per_replica", "cpus_per_replica"):
        value = getattr(s, name)
        _require(value is None or value >= 0, f"scale_out.{name}", value, "0 or more, or null")
    _require(s.gpus_per_replica != 0 or s.cpus_per_replica != 0, "scale_out.cpus_per_replica", 0,
             "above 0 for a worker without a GPU")  # fmt: skip
    _require(s.retries >= 0, "scale_out.retries", s.retries, "0 or more")
    _require(s.start_timeout_s > 0, "scale_out.start_timeout_s", s.start_timeout_s, "above 0")


def _check_check(c: CheckOptions) -> None:
    _require(c.runs >= 1, "check.runs", c.runs, "at least 1")
    for name in ("orders", "single_rows"):
        _require(getattr(c, name) >= 0, f"check.{name}", getattr(c, name), "0 or more")
    for name in (f.name for f in fields(c) if isinstance(getattr(c, f.name), list)):
        values = getattr(c, name)
        _require(min(values, default=1) >= 1, f"check.{name}", values, "numbers from 1 up")
    _require(c.timeout_s is None or c.timeout_s > 0, "check.timeout_s", c.timeout_s, "above 0")


def check_engine(e: EngineOptions) -> None:
    """Raises ConfigError for an engine option out of its range."""
    _require(e.kind in ENGINE_KINDS, "engine.kind", e.kind, " or ".join(ENGINE_KINDS))
    for name in ("max_num_seqs", "max_num_batched_tokens", "kv_cache_bytes", "max_model_len"):
        value = getattr(e, name)
        _require(value is None or value >= 1, f"engine.{name}", value, "at least 1, or null")
    _require(
        0 < e.gpu_memory_utilization <= 1,
        "engine.gpu_memory_utilization",
        e.gpu_memory_utilization,
        "above 0 and at most 1",
    )
    _require(e.num_threads >= 0, "engine.num_threads", e.num_threads, "0 (one per core) or more")
