"""Hydra's and OmegaConf's errors as one sentence each, with the nearest valid name."""

import difflib
import re
import shlex

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from orcd_batch.config import nearest_option


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
    if isinstance(error, OSError):
        return (
            f"The job's directory or log cannot be made: {error.strerror}: {error.filename!r}; "
            "name another place with hydra.run.dir, or hydra.sweep.dir of a multirun."
        )
    text = str(error)
    if match := re.match(r"You must specify '(\w+)'.*?Available options:\s*(.*)", text, re.S):
        return f"{match[1]} is not set: add {match[1]}=NAME, one of {', '.join(match[2].split())}."
    if match := re.match(r"Could not override '([^']+)'", text):
        return _explain_unknown(match[1], error)
    if isinstance(error, AssertionError) and "NoneType" in text:  # `check` is null in a plain job
        return (
            "check.* options are for a check: add --config-dir jobs --config-name "
            "nightly_reproducibility (or acceptance)."
        )
    sentence = " ".join(text.split()).rstrip(".")
    return (
        f"The options cannot be put together: {sentence}; `orcd-batch --help` lists them, and "
        "debug=true shows where it failed."
    )


def _explain_grammar(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override!r} is no verb and no KEY=VALUE: `orcd-batch --help` shows both."
    if open_bracket := _unclosed(value):
        return f"{override!r} has a {open_bracket!r} without its other half: complete or quote it."
    inner = value.strip("'\"").replace("\\", "\\\\").replace('"', '\\"')
    quoted = f'["{inner[1:-1]}"]' if re.fullmatch(r"\[.*\]", inner) else f'"{inner}"'
    return (
        f"Hydra's grammar cannot read {override!r}: quote the value for Hydra and the whole "
        f"override for the shell, as in {shlex.quote(f'{key}={quoted}')}."
    )


def _unclosed(value: str) -> str | None:
    """The first bracket that has no partner, in a value without quotes."""
    pairs = {")": "(", "]": "[", "}": "{"}
    waiting: list[str] = []
    for character in "" if set(value) & set("'\"") else value:
        if character in pairs.values():
            waiting.append(character)
        elif character in pairs and (not waiting or waiting.pop() != pairs[character]):
            return character
    return waiting[0] if waiting else None


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
