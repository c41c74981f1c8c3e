"""What changed, in words: the facts that differ as one clause, the likeliest cause first."""

from collections.abc import Iterator, Mapping, Sequence

from orcd_batch.data.manifest import shortened
from orcd_batch.reproducibility.facts import Change

_MAX_NAMED = 3

# Facts that follow from more exact ones beside them, by the prefix of those.
_DERIVED = {
    "model.hash": ("model.tensors.", "model.metadata."),
    "model.tokenizer_hash": ("model.metadata.tokenizer.ggml.",),
    "model.template_hash": ("model.metadata.tokenizer.chat_template",),
    "code_hash": ("code.",),
    "kernels_hash": ("code.kernels/", "backend.cubins.", "backend.compile_options"),
    "git_commit": ("code.",),
    "package_version": ("code.",),
}
_WORDS = {
    "model.hash": "the model file",
    "model.tokenizer_hash": "the tokenizer",
    "model.template_hash": "the chat template",
    "model.metadata.tokenizer.chat_template": "the chat template in the model file",
    "input_hash": "the prompts",
    "code_hash": "orcd_batch's code",
    "kernels_hash": "the compiled kernels",
}


# One phrase for all facts with the prefix; the first two before all else, the others after it.
_MODEL_GROUPS = {
    "model.tensors.": "the model file's tensor {}",
    "model.metadata.": "the model file's key {}",
}
_OWN_GROUPS = {
    "code.": "orcd_batch's code in {}",
    "backend.": "what the engine chose or compiled at its start ({})",
}


def describe(changes: Sequence[Change]) -> str:
    """The changes as one clause for a sentence, such as "the chat template in the model file;
    numpy 2.4.5 → 2.4.6"; "nothing on record" where there are none."""
    named = [change for change in changes if not _is_derived(change, changes)]
    phrases = [*_grouped(named, _MODEL_GROUPS)]
    phrases += [_single(change) for change in named if _stands_alone(change)]
    phrases += _grouped(named, _OWN_GROUPS)
    return "; ".join(phrases) or "nothing on record"


def _grouped(found: Sequence[Change], groups: Mapping[str, str]) -> Iterator[str]:
    for prefix, phrase in groups.items():
        ours = [c for c in found if c.field.startswith(prefix) and c.field not in _WORDS]
        names = [change.field.removeprefix(prefix) for change in ours]
        if names:
            more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
            yield phrase.format(", ".join(names[:_MAX_NAMED]) + more)


def _stands_alone(change: Change) -> bool:
    groups = (*_MODEL_GROUPS, *_OWN_GROUPS)
    return change.field in _WORDS or not change.field.startswith(groups)


def _is_derived(change: Change, changes: Sequence[Change]) -> bool:
    exact = _DERIVED.get(change.field)
    return exact is not None and any(c.field.startswith(exact) for c in changes)


def _single(change: Change) -> str:
    if change.field in _WORDS:
        return _WORDS[change.field]
    name = change.field.removeprefix("versions.")
    return f"{name} {_value(change.before)} → {_value(change.now)}"


def _value(value: str | None) -> str:
    return "(none)" if value is None else shortened(value)
