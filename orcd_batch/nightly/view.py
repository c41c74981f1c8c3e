"""What a person sees of a check: one line a run, and the verdict, all on stderr."""

import logging
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orcd_batch.nightly.outcome import Outcome
from orcd_batch.nightly.plan import Variation

log = logging.getLogger(__name__)

_STYLES = {"equal": "green", "differs": "bold red", "failed": "bold red"}
_MAX_CHANGES = 30


class NightView:
    """The display of one check; also written to the log file of its directory."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)

    def say(self, sentence: str, style: str = "") -> None:
        log.info("%s", sentence)
        self.console.print(Text(sentence, style=style))

    def begin(self, variation: Variation) -> None:
        log.info("%s begins: %s", variation.name, variation.title)
        if self.console.is_terminal:
            self.console.print(Text(f"… {variation.name}: {variation.title}"), end="\r")

    def end(self, outcome: Outcome) -> None:
        seconds = f" ({outcome.result.seconds:.1f} s)" if outcome.result else ""
        status = "ran" if outcome.name == "reference" and outcome.equal else outcome.status
        line = Text(f"{status:8}", style=_STYLES[outcome.status])
        self.console.print(line + Text(f"{outcome.name}: {outcome.title}{seconds}"))
        log.info("%s: %s, %s", outcome.name, outcome.status, outcome.explanation)
        if not outcome.equal:
            self.console.print(Text(f"        {outcome.explanation}."))

    def finish(self, night: Mapping[str, Any]) -> None:
        """What was left out, what changed, where everything lies, and the verdict."""
        for skipped in night["skipped"]:
            self.say(f"left out {skipped['name']}: {skipped['title']} ({skipped['reason']})", "dim")
        if night["verdict"] == "fail" and night["changed"]:
            self.console.print(_changes_table(night))
        if len(night["groups"]) > 1:
            groups = " | ".join(", ".join(names) for names in night["groups"])
            self.say(f"Runs with the same bits: {groups}")
        for name in ("history", "baseline", "junit", "report"):
            if night[name] is not None:
                self.say(f"{name}: {night[name]}", "dim")
        passed = night["verdict"] == "pass"
        count = night["num_comparisons"]
        rows = f"{count} comparison{'' if count == 1 else 's'} of {night['num_rows']} rows"
        self.say(
            f"Passed: {rows}, every bit equal." if passed else f"Failed. {night['cause']}",
            "bold green" if passed else "bold red",
        )


def _changes_table(night: Mapping[str, Any]) -> Table:
    since = night["last_good_night"] or "the baseline"
    table = Table(title=f"Changed since {since}", title_justify="left")
    for name in ("fact", "before", "now"):
        table.add_column(name, overflow="fold")
    for change in night["changed"][:_MAX_CHANGES]:
        cells = (change["field"], change["before"] or "–", change["now"] or "–")
        table.add_row(*(Text(cell if len(cell) <= 80 else cell[:77] + "…") for cell in cells))
    if len(night["changed"]) > _MAX_CHANGES:
        table.add_row(f"… {len(night['changed']) - _MAX_CHANGES} more")
    return table
