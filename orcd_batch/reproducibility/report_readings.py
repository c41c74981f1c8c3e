"""A few prompts and what became of them, for a person to read."""

from collections.abc import Mapping
from typing import Any

from orcd_batch.data.first_rows import preview
from orcd_batch.reproducibility.report import SEED, Report, section
from orcd_batch.reproducibility.report_page import Reading, Section
from orcd_batch.reproducibility.report_tables import group_name

_NUM_PROMPTS = 3
_MAX_COMPLETIONS = 12
_MAX_SAMPLES = 4
_MAX_PREVIEWED = 64


def readings(found: Report) -> Section:
    """The first prompts, and what each group (or run) made of them."""
    chosen = [(group.parameters, i) for group in found.groups for i in group.runs[:2]]
    if found.sweep is None:
        chosen = [({}, index) for index in range(len(found.runs))]
    prompts: dict[str, list[tuple[str, str]]] = {}
    for parameters, index in chosen[:_MAX_COMPLETIONS]:
        run, manifest = found.runs[index], found.manifests[index]
        prefix = str(manifest.get("output_prefix", ""))
        name = _reading_name(found, parameters, index)
        column = _input_column(manifest)
        samples = max(1, int(run.sampling.get("n", 1)))
        rows = preview(run.path, column, prefix, _NUM_PROMPTS * min(samples, _MAX_PREVIEWED))
        for number, (prompt, text) in enumerate(rows):
            if number % samples < _MAX_SAMPLES:
                prompts.setdefault(prompt or "(prompt not kept)", []).append((name, text))
    shown = [Reading(prompt, texts) for prompt, texts in list(prompts.items())[:_NUM_PROMPTS]]
    return Section("To read", "The first prompts and their completions.", readings=shown)


def _input_column(manifest: dict[str, Any]) -> str:
    dataset = section(manifest, "identity", "dataset")
    kind = manifest.get("input_column")
    names = [dataset.get(f"{name}_column") for name in ("prompt", "messages", "token_ids")]
    own = [name for name in names if name not in (None, "prompt", "messages", "token_ids")]
    return str(kind or next(iter(own), None) or next((n for n in names if n), ""))


def _reading_name(found: Report, parameters: Mapping[str, Any], index: int) -> str:
    """How a completion is announced: its group and seed, or its run."""
    run = found.runs[index]
    if found.sweep is None:
        return "completion" if len(found.runs) == 1 else f"run {index}"
    seed = f", seed {run.parameters[SEED]}" if SEED in run.parameters else ""
    return group_name(parameters) + seed if parameters else seed.removeprefix(", ")
