"""An inspection as titled tables of text, which the terminal and the Markdown report share."""

from collections.abc import Iterable
from dataclasses import dataclass

from orcd_batch.checkpoint.inspection import DerivedFacts, Inspection
from orcd_batch.checkpoint.inspection_difference import Difference, ItemDifference

_MAX_SHOWN = 100


@dataclass(frozen=True, slots=True)
class Section:
    """One table. numbers: the columns that hold numbers, to be aligned right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int] = frozenset()


def sections(inspection: Inspection) -> list[Section]:
    """Every table there is something to say in, the most telling first."""
    found = [
        _summary(inspection),
        Section("Configuration", ("fact", "value"), _pairs(inspection.configuration.items())),
        Section("Derived facts", ("fact", "value"), _derived(inspection.derived)),
    ]
    if inspection.difference is not None:
        found += _difference(inspection.difference)
    found += [
        Section(
            "Tensor types",
            ("type", "tensors", "parameters", "bytes"),
            tuple(
                (s.ggml_type, f"{s.num_tensors:,}", f"{s.num_elements:,}", f"{s.num_bytes:,}")
                for s in inspection.type_shares
            ),
            frozenset({1, 2, 3}),
        ),
        Section(
            "Metadata",
            ("key", "type", "value"),
            tuple((shown(e.key), e.value_type, shown(e.value)) for e in inspection.metadata),
        ),
        Section(
            "Tensors (shape: outermost dimension first)",
            ("name", "shape", "type", "offset", "bytes"),
            tuple(
                (shown(t.name), _shape(t.shape), t.ggml_type, f"{t.offset:,}", f"{t.num_bytes:,}")
                for t in inspection.tensors
            ),
            frozenset({1, 3, 4}),
        ),
    ]
    return [section for section in found if section.rows]


def shown(value: object) -> str:
    """Text on one line, without control characters, shortened to 100 characters."""
    text = f"{value:.7g}" if isinstance(value, float) else str(value)
    if len(text) > _MAX_SHOWN:
        text = text[: _MAX_SHOWN - 1] + "…"
    return text if text.isprintable() else repr(text)[1:-1]


def bytes_text(num_bytes: int) -> str:
    """Bytes in full and in a decimal unit, such as "393,216 B" or "7.64 GB (7,642,159,104 B)"."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit} ({num_bytes:,} B)"
    return f"{num_bytes:,} B"


def _summary(inspection: Inspection) -> Section:
    rows = [
        ("file", shown(inspection.path)),
        ("size", bytes_text(inspection.size_bytes)),
        ("format", f"GGUF version {inspection.version}"),
        ("architecture", shown(inspection.architecture)),
        ("name", shown(inspection.name)),
        ("can run here", "yes" if inspection.runnable else "no"),
    ]
    rows += [("because", _one_line(reason)) for reason in inspection.reasons]
    return Section("Summary", ("fact", "value"), tuple(rows))


def _derived(facts: DerivedFacts) -> tuple[tuple[str, str], ...]:
    attention = facts.attention or "unknown"
    if facts.heads_per_kv_head is not None:
        attention += f", {facts.heads_per_kv_head}:1 (query heads per KV head)"
    rows = [("attention", attention)]
    if facts.num_parameters:
        rows += [
            ("parameters", f"{facts.num_parameters:,}"),
            ("bits per parameter", f"{facts.bits_per_parameter:.2f}"),
            ("weights in the file", bytes_text(facts.file_bytes)),
            ("weights as fp16", bytes_text(facts.fp16_bytes)),
            ("weights as fp32", bytes_text(facts.fp32_bytes)),
        ]
    else:
        rows.append(("parameters", "none: the file holds no tensors"))
    per_token, full = facts.kv_cache_bytes_per_token, facts.kv_cache_bytes_full_context
    return (
        *rows,
        ("KV cache per token, fp16", "unknown" if per_token is None else bytes_text(per_token)),
        ("KV cache at full context, fp16", "unknown" if full is None else bytes_text(full)),
    )


def _difference(difference: Difference) -> list[Section]:
    other = shown(difference.path)
    if difference.is_empty:
        rows = (("everything", f"is the same, {difference.num_equal_tensors} tensors included"),)
        return [Section(f"Compared with {other}", ("what", "result"), rows)]
    columns = ("what", "this file", "the other")
    parts = (
        ("configuration", difference.configuration),
        ("metadata", difference.metadata),
        (f"tensors ({difference.num_equal_tensors} are the same)", difference.tensors),
    )
    return [
        Section(f"Differs from {other}: {title}", columns, tuple(map(_item, items)))
        for title, items in parts
    ]


def _item(item: ItemDifference) -> tuple[str, str, str]:
    here, there = ("(none)" if v is None else shown(v) for v in (item.here, item.there))
    return shown(item.name), here, there


def _pairs(items: Iterable[tuple[str, object]]) -> tuple[tuple[str, str], ...]:
    return tuple((name, shown(value)) for name, value in items)


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(str(size) for size in shape)


def _one_line(sentence: str) -> str:
    return sentence if sentence.isprintable() else repr(sentence)[1:-1]
