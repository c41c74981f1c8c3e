"""Composing a job with Hydra and running it, once or as a multirun; Hydra's errors as sentences."""

import difflib
import hashlib
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from orcd_batch.config import JobOptions, job_facts, nearest_option, resolve
from orcd_batch.errors import ConfigError, Interrupted, OrcdError
from orcd_batch.resources import resource_directory

# Hydra's own sub-commands print to stdout and are passed through untouched.
_HYDRA_FLAGS = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc")


def run(args: Sequence[str]) -> tuple[Any, int]:
    """Runs the job, or every job of a multirun, that the overrides describe.

    Returns the JSON document (a dict, or a list of them for a multirun; None for Hydra's own
    sub-commands) and the exit code. Raises ConfigError for anything wrong with the overrides.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come back to us instead of being printed
    ConfigStore.instance().store(name="orcd_schema", node=JobOptions)
    register_resolvers(args)
    jobs: list[_Job] = []
    hydra_verb = any(a.split("=")[0] in _HYDRA_FLAGS for a in args)
    try:
        _compose_and_run(args, jobs, sys.__stdout__ if hydra_verb else sys.stderr)
    except KeyboardInterrupt:  # ends a sweep; what its jobs gave is still told
        if not jobs or not isinstance(jobs[-1].error, Interrupted):
            raise
    if hydra_verb:
        return None, 0
    if jobs and jobs[0].alone:
        if jobs[0].error:
            raise jobs[0].error
        return jobs[0].document, 0
    codes = [job.error.exit_code for job in jobs if job.error]
    return [job.document for job in jobs], max(codes, default=0)


def _compose_and_run(args: Sequence[str], jobs: "list[_Job]", out: Any) -> None:
    """Hydra's part: composes each job's config and calls us with it; its errors as sentences."""
    bugs: list[Exception] = []

    def task(cfg: DictConfig) -> None:
        try:
            jobs.append(_run_one(args, cfg))
            if isinstance(jobs[-1].error, Interrupted):
                raise KeyboardInterrupt
        except Exception as error:
            bugs.append(error)
            raise

    app = hydra.main(
        version_base="1.3", config_path=str(resource_directory("conf")), config_name="config"
    )(task)
    flags = [a for a in args if a in ("-m", "--multirun")]  # argparse wants them before KEY=VALUE
    argv, stdout = sys.argv, sys.stdout
    sys.argv, sys.stdout = [argv[0], *flags, *(a for a in args if a not in flags)], out
    try:
        app()
    except Exception as error:
        if error in bugs:
            raise
        raise ConfigError(explain(error)) from error
    finally:
        sys.argv, sys.stdout = argv, stdout


@dataclass(frozen=True, slots=True)
class _Job:
    """What became of one job; `alone` is False in a multirun."""

    document: dict[str, Any]
    alone: bool
    error: OrcdError | None = None


def _run_one(args: Sequence[str], cfg: DictConfig) -> _Job:
    """One job. In a multirun an error is reported and the other jobs go on."""
    from orcd_batch.job import run_job

    alone = HydraConfig.get().mode != RunMode.MULTIRUN
    directory = Path(HydraConfig.get().runtime.output_dir)
    try:
        if not alone:
            _refuse_swept_columns(args, cfg)
        return _Job(run_job(resolve(cfg), directory), alone)
    except OrcdError as error:
        logging.getLogger(__name__).error("%s", error, exc_info=cfg.debug)
        if not alone:
            print(f"orcd-batch: {directory.name}: {error}", file=sys.stderr)
        return _Job({"error": str(error), "directory": str(directory)}, alone, error)


def register_resolvers(args: Sequence[str]) -> None:
    """`${job_id:}` and `${sweep_id:}` name work by what it computes, never by the time."""

    def job_id(*, _root_: Any) -> str:
        keys = ["model", "data", "sampling", "dataset", "engine"]
        plain = OmegaConf.to_container(OmegaConf.masked_copy(_root_, keys), resolve=True)
        return digest(job_facts(plain))

    def sweep_id() -> str:
        return digest(sorted(a for a in args if not a.startswith(("-", "hydra.", "overwrite="))))

    OmegaConf.register_new_resolver("job_id", job_id, replace=True)
    OmegaConf.register_new_resolver("sweep_id", sweep_id, replace=True)


def digest(value: object) -> str:
    """Twelve hex digits that name a plain value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _refuse_swept_columns(args: Sequence[str], cfg: DictConfig) -> None:
    """A sweep over an option that every row overrides would compute the same job many times."""
    overrides = [a for a in args if "=" in a and not a.startswith("-")]
    for override in OverridesParser.create().parse_overrides(overrides):
        field = override.key_or_group.removeprefix("sampling.")
        if override.is_sweep_override() and field in cfg.dataset.sampling_columns:
            raise ConfigError(
                f"sampling.{field} is swept, but dataset.sampling_columns takes it from the "
                f"column {field!r} of each row: drop one of the two."
            )


def explain(error: Exception) -> str:
    """One sentence for an error of Hydra or OmegaConf, with the nearest valid name."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, OverrideParseException):
        return _explain_grammar(error.override or "")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _explain_missing(error)
    if isinstance(cause, ConfigKeyError):
        return _explain_unknown(cause.full_key or str(cause.key), error)
    if isinstance(cause, ValidationError):
        if "not Optional" in str(cause):
            return f"{cause.full_key} cannot be null: give it a value, or leave it out."
        first = str(cause.msg or cause).splitlines()[0].rstrip(".")
        return f"{cause.full_key}: {first}."
    text = str(error)
    if match := re.match(r"You must specify '(\w+)'.*?Available options:\s*(.*)", text, re.S):
        return f"{match[1]} is not set: add {match[1]}=NAME, one of {', '.join(match[2].split())}."
    if match := re.match(r"Could not override '([^']+)'", text):
        return _explain_unknown(match[1], error)
    return " ".join(text.split())


def _explain_grammar(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override!r} is no verb and no KEY=VALUE: `orcd-batch --help` shows both."
    inner = value.strip("'\"").replace("\\", "\\\\").replace('"', '\\"')
    quoted = f'["{inner[1:-1]}"]' if re.fullmatch(r"\[.*\]", inner) else f'"{inner}"'
    return (
        f"Hydra's grammar cannot read {override!r}: quote the value for Hydra and the whole "
        f"override for the shell, as in {shlex.quote(f'{key}={quoted}')}."
    )


def _explain_missing(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    options = list(error.options or [])
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.4)
    hint = f"did you mean {group}={near[0]}? " if near else ""
    choices = f"Available: {', '.join(options)}." if options else "Check the name."
    return f"There is no {group or 'config'} named {name!r}: {hint}{choices}"


def _explain_unknown(key: str, error: Exception) -> str:
    near = nearest_option(key)
    hint = f"did you mean {near}?" if near else "`orcd-batch --help` lists the options."
    return f"There is no option {key}: {hint}"
