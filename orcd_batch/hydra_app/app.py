"""Composing a job with Hydra and running it, once or as a multirun."""

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from orcd_batch.config import JobOptions, job_facts
from orcd_batch.errors import ConfigError, OrcdError
from orcd_batch.hydra_app.errors import explain
from orcd_batch.hydra_app.jobs import Jobs
from orcd_batch.hydra_plugins import register as register_plugins
from orcd_batch.resources import resource_directory, with_jobs_found

# Hydra's own sub-commands print to stdout and are passed through untouched.
_HYDRA_FLAGS = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc")

# Arguments that change no result: the same sweep goes on with others. Of the engine's, two do.
_NO_FACTS = (
    *("-m", "--multirun", "hydra.", "hydra/launcher=", "overwrite=", "debug=", "scale_out"),
    *("engine.", "dataset.on_error="),
)
_ENGINE_FACTS = ("engine.kind=", "engine.max_model_len=")


def run(args: Sequence[str]) -> tuple[Any, int]:
    """Runs the job, or every job of a multirun, that the overrides describe.

    Returns the JSON document (a dict, or a list of them for a multirun; None for Hydra's own
    sub-commands) and the exit code. Raises ConfigError for anything wrong with the overrides.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come back to us instead of being printed
    ConfigStore.instance().store(name="orcd_schema", node=JobOptions)
    register_resolvers(args)
    register_plugins()
    jobs = Jobs(args)
    hydra_verb = any(a.split("=")[0] in _HYDRA_FLAGS for a in args)
    try:
        _compose_and_run(args, jobs, sys.__stdout__ if hydra_verb else sys.stderr)
    except KeyboardInterrupt:  # ends a sweep; what its jobs gave is still told
        if jobs.interrupt is None:
            raise
    if hydra_verb:
        return None, 0
    outcomes = jobs.outcomes
    if outcomes and jobs.is_alone:
        if outcomes[0].error:
            raise outcomes[0].error
        return outcomes[0].document, outcomes[0].code
    return [job.document for job in outcomes], max((job.code for job in outcomes), default=0)


def _compose_and_run(args: Sequence[str], jobs: Jobs, out: Any) -> None:
    """Hydra's part: composes each job's config and calls us with it; its errors as sentences."""
    args = with_jobs_found(args)
    app = hydra.main(
        version_base="1.3", config_path=str(resource_directory("conf")), config_name="config"
    )(jobs)
    flags = [a for a in args if a in ("-m", "--multirun")]  # argparse wants them before KEY=VALUE
    argv, stdout = sys.argv, sys.stdout
    sys.argv, sys.stdout = [argv[0], *flags, *(a for a in args if a not in flags)], out
    try:
        app()
    except OrcdError:
        raise
    except Exception as error:
        if error is jobs.bug:
            raise
        raise ConfigError(explain(error)) from error
    finally:
        sys.argv, sys.stdout = argv, stdout


def register_resolvers(args: Sequence[str]) -> None:
    """`${job_id:}` and `${sweep_id:}` name work by what it computes, never by the time."""

    def job_id(*, _root_: Any) -> str:
        keys = ["model", "data", "sampling", "dataset", "engine"]
        plain = OmegaConf.to_container(OmegaConf.masked_copy(_root_, keys), resolve=True)
        return digest(job_facts(plain))

    def sweep_id() -> str:
        return digest(sorted(a for a in args if _names_a_sweep(a)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # omegaconf 2.4 renames the function that 2.3 offers
        OmegaConf.register_new_resolver("job_id", job_id, replace=True)
        OmegaConf.register_new_resolver("sweep_id", sweep_id, replace=True)


def _names_a_sweep(arg: str) -> bool:
    """Whether the argument is part of what a sweep computes, not of how it is run."""
    option = arg.lstrip("+")
    return option.startswith(_ENGINE_FACTS) or not option.startswith(_NO_FACTS)


def digest(value: object) -> str:
    """Twelve hex digits that name a plain value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
