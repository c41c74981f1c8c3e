"""A sweep's directory: which jobs are finished, which are not, and what differs between them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

from orcd_batch.data.manifest import flattened, read_manifest
from orcd_batch.errors import InputError
from orcd_batch.reproducibility.run_output import OUTPUT_NAME

SWEEP_FILE = "multirun.yaml"

# Where results go and how errors are shown: no parameter of the results.
_NO_PARAMETERS = ("output", "overwrite", "debug")


@dataclass(frozen=True, slots=True)
class FinishedJob:
    """A finished job. job_id: its directory, relative to the sweep's. output: its Parquet file.

    parameters: the config fields that differ between the sweep's jobs, by dotted name.
    """

    job_id: str
    output: str
    parameters: dict[str, Any]
    manifest: dict[str, Any]


@dataclass(frozen=True, slots=True)
class UnfinishedJob:
    """A job without an output. job_id: None where it was never started. overrides: as typed."""

    job_id: str | None
    overrides: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sweep:
    """Finished jobs in the order of their parameters, and the others.

    parameters: the dotted names that make the combined file's columns, swept ones first.
    """

    directory: Path
    parameters: tuple[str, ...]
    jobs: list[FinishedJob]
    unfinished: list[UnfinishedJob]


def is_sweep(path: str | Path) -> bool:
    """Whether a path is the directory of a Hydra multirun."""
    return (Path(path) / SWEEP_FILE).is_file()


def find_sweep(directory: str | Path) -> Sweep:
    """Reads a multirun's directory: `<directory>/<job id>/completions.parquet`.

    Raises InputError when it is not one, or when an output there cannot be read.
    """
    root = Path(directory)
    if not is_sweep(root):
        raise InputError(
            f"{root} holds no {SWEEP_FILE}: name the directory of a multirun, such as "
            "outputs/sweep-<id>."
        )
    swept = _swept(root)
    finished: list[tuple[str, str, dict[str, Any]]] = []
    unfinished: list[UnfinishedJob] = []
    started: set[tuple[str, ...]] = set()
    for job in _job_directories(root):
        job_id, overrides = str(job.relative_to(root)), _overrides(job)
        started.add(_chosen(overrides, swept))
        output = _output(job)
        if output is not None:
            finished.append((job_id, output, read_manifest(output)))
        else:
            unfinished.append(UnfinishedJob(job_id, _chosen(overrides, swept)))
    expected = {_sorted(choice) for choice in product(*swept.values())} if swept else set()
    unfinished += [UnfinishedJob(None, choice) for choice in sorted(expected - started)]
    parameters = _parameters([manifest for _, _, manifest in finished], list(swept))
    jobs = [
        FinishedJob(job_id, output, _values(manifest, parameters), manifest)
        for job_id, output, manifest in finished
    ]
    jobs.sort(key=lambda job: ([_sort_key(job.parameters[p]) for p in parameters], job.job_id))
    return Sweep(root, parameters, jobs, unfinished)


def config_fields(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of the config that a manifest carries, without where results go."""
    config = manifest.get("config")
    leaves = flattened(config) if isinstance(config, Mapping) else ()
    return {name: value for name, value in leaves if name not in _NO_PARAMETERS}


def _parameters(manifests: Sequence[Mapping[str, Any]], swept: list[str]) -> tuple[str, ...]:
    """Swept fields, whether or not the finished jobs differ in them yet, then all that differ."""
    fields = [config_fields(manifest) for manifest in manifests]
    names = dict.fromkeys(name for job in fields for name in job)
    differing = [n for n in names if len({repr(job.get(n)) for job in fields}) > 1]
    return tuple(dict.fromkeys([*(n for n in swept if n in names), *differing]))


def _values(manifest: Mapping[str, Any], parameters: Sequence[str]) -> dict[str, Any]:
    fields = config_fields(manifest)
    return {name: fields.get(name) for name in parameters}


def _sort_key(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then everything else by its text."""
    if isinstance(value, int | float):
        return 0, float(value), str(value)
    return 1, 0.0, str(value)


def _job_directories(root: Path) -> Iterator[Path]:
    found = {file.parents[1] for file in root.rglob(".hydra/overrides.yaml")}
    found |= {file.parent for file in root.rglob(OUTPUT_NAME)}
    yield from sorted(found - {root})


def _output(job: Path) -> str | None:
    """The job's finished output: in its directory, or where its config sent it."""
    if (job / OUTPUT_NAME).is_file():
        return str(job / OUTPUT_NAME)
    config = _load(job / ".hydra" / "config.yaml")
    named = config.get("output") if isinstance(config, Mapping) else None
    return named if isinstance(named, str) and Path(named).is_file() else None


def _overrides(job: Path) -> tuple[str, ...]:
    found = _load(job / ".hydra" / "overrides.yaml")
    return tuple(str(item) for item in found) if isinstance(found, Sequence) else ()


def _swept(root: Path) -> dict[str, list[str]]:
    """What the multirun varies: key -> each of its overrides as a job sees it ("key=value")."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    document = _load(root / SWEEP_FILE)
    typed = document
    for name in ("hydra", "overrides", "task"):
        typed = typed.get(name) if isinstance(typed, Mapping) else None
    try:
        parsed = OverridesParser.create().parse_overrides([str(item) for item in typed or ()])
    except OverrideParseException as error:
        raise InputError(f"{root / SWEEP_FILE} holds an override Hydra cannot read.") from error
    return {
        item.key_or_group: [
            f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()
        ]
        for item in parsed
        if item.is_sweep_override()
    }


def _chosen(overrides: Sequence[str], swept: Mapping[str, list[str]]) -> tuple[str, ...]:
    """Those of a job's overrides that the sweep varies."""
    keys = set(swept)
    return _sorted([item for item in overrides if item.split("=")[0].lstrip("+") in keys])


def _sorted(overrides: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(overrides))


def _load(path: Path) -> Any:
    """A YAML file as plain values; None where there is none."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    yaml_error = import_module("yaml").YAMLError  # omegaconf's parser, which has no types
    if not path.is_file():
        return None
    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OmegaConfBaseException, yaml_error, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
