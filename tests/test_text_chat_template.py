"""Chat templates: what they render, and what they are stopped from doing."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from oracle_text.make_token_answers import HERE

from orcd_batch.errors import ClosedError, ConfigError, RowError, TemplateError
from orcd_batch.text import ChatTemplate

ANSWERS = json.loads((HERE / "templates.json").read_text())
MESSAGES = [{"role": "user", "content": "Hi"}]
GOOD = "{{ messages[0].content }}!"
BAD_ON_DEMAND = "{% if messages[0].content == 'bad' %}BAD{% else %}good{% endif %}"
BAD = [{"role": "user", "content": "bad"}]
REPO_ROOT = Path(__file__).parents[1]

TOO_MUCH = {
    "one long string": "{{ 'a' * 300000000 }}",
    "a long string that is only measured": "{{ (messages[0].role * 300000000)|length }}",
    "a long range": "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "nested loops": "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}"
    "{% endfor %}",
    "endless output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "endless recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "a wide percent format": "{{ '%0999999999d' % 1 }}",
    "a wide brace format": "{{ '{:999999999}'.format(1) }}",
    "a tower of powers": "{{ 9 ** (9 ** 9) }}",
    "a tower of powers unknown beforehand": "{% set x = messages|length + 8 %}{{ x ** (x ** x) }}",
    "joining": "{{ (['a' * 1000000] * 1000)|join }}",
    "replacing": "{% set x = 'a' * 100000 %}{{ x.replace('a', x) }}",
    "centering": "{{ 'a'.center(999999999) }}",
    "the center filter": "{{ 'a'|center(999999999) }}",
    "indenting": "{{ 'a\n'|indent(999999999) }}",
    "padding batches": "{{ [1]|batch(999999999, 'x')|list }}",
    "doubling": "{% set n = namespace(x='aa') %}{% for i in range(99) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "a long list": "{{ [0] * 999999999 }}",
    "much json": "{{ ([[['a' * 1000] * 100] * 100] * 100)|tojson }}",
    "splitting": "{{ ('a ' * 30000000).split()|length }}",
    "random words without end": "{{ lipsum(n=1000000) }}",
}

REACHING_OUT = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''|attr('__class__') }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{0.__class__}'|attr('format')('') }}",
    "{{ ''.format_map.__self__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__.os.environ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% set n = namespace(__class__=1) %}{{ n.__class__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ dict.__subclasses__() }}",
    "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}{{ os.environ }}",
    "{% extends '/etc/hostname' %}",
    "{{ [1, 2, 3]|random }}",
    "{{ ().__class__.__base__.__subclasses__() }}",
    "{% for f in [namespace] %}{{ f.mro() }}{% endfor %}",
]


def open_template(source: str, **limits: Any) -> ChatTemplate:
    return ChatTemplate(source, "<s>", "</s>", "2024-07-26", **limits)


@pytest.fixture(scope="module")
def good() -> Iterator[ChatTemplate]:
    with open_template(GOOD) as template:
        yield template


@pytest.mark.parametrize("name", ANSWERS["templates"])
def test_templates_render_as_transformers_renders_them(name: str) -> None:
    known = ANSWERS["templates"][name]
    bos, eos = ANSWERS["bos_token"], ANSWERS["eos_token"]
    with ChatTemplate(known["source"], bos, eos, ANSWERS["date"]) as template:
        for messages, expected in zip(ANSWERS["conversations"], known["rendered"], strict=True):
            if "error" in expected:
                with pytest.raises(TemplateError) as caught:
                    template.render(messages)
                assert expected["error"].rstrip(".") in str(caught.value)
            else:
                assert template.render(messages) == expected["text"]


@pytest.mark.parametrize("what", TOO_MUCH)
def test_a_template_that_wants_too_much_is_stopped_and_a_good_row_still_works(what: str) -> None:
    source = BAD_ON_DEMAND.replace("BAD", TOO_MUCH[what])
    with open_template(source, time_limit_s=0.2) as template:
        start = time.monotonic()
        with pytest.raises(TemplateError):
            template.render(BAD)
        assert time.monotonic() - start < 5.0
        assert template.render(MESSAGES) == "good"


@pytest.mark.parametrize("expression", ["(" * 100_000 + "1" + ")" * 100_000, "1" + "+1" * 100_000])
def test_a_template_that_cannot_even_be_compiled_in_time_is_stopped(expression: str) -> None:
    with open_template("{{ " + expression + " }}") as template:
        start = time.monotonic()
        for _ in range(3):
            with pytest.raises(TemplateError):
                template.render(MESSAGES)
        assert time.monotonic() - start < 5.0


@pytest.mark.parametrize("source", REACHING_OUT)
def test_a_template_that_reaches_for_pythons_insides_gets_nothing(source: str) -> None:
    with open_template(source) as template:
        try:
            shown = template.render(MESSAGES)
        except TemplateError as error:
            shown = "" if "unsafe" in str(error) or "loader" in str(error) else str(error)
        assert not any(word in shown for word in ("class '", "PATH", "root", "<module", "{'"))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        ([{"role": "user", "content": None}], "content of message 0 must be a text, found None"),
        ([*MESSAGES, {"role": "user"}], "content of message 1"),
        ([{"role": "", "content": "x"}], "role of message 0 must be a text, found ''"),
        ([{"role": 3, "content": "x"}], "found 3"),
        ([{"content": "x"}], "role of message 0"),
        (["x"], "Message 0 must be a role and a content"),
        ([{"role": "user", "content": "x", "at": {1, 2}}], "cannot be given to a template"),
    ],
)
def test_malformed_messages_are_refused_by_number(
    good: ChatTemplate, messages: list[Any], message: str
) -> None:
    with pytest.raises(TemplateError, match=message):
        good.render(messages)
    assert good.render(MESSAGES) == "Hi!"


def test_what_the_template_refuses_is_the_error_of_its_row() -> None:
    refusing = "{% if messages[0].role == 'alien' %}{{ raise_exception('No!') }}{% endif %}ok"
    with open_template(refusing) as template:
        with pytest.raises(RowError, match=r"No!; use model\.chat=false"):
            template.render([{"role": "alien", "content": "x"}])
        assert template.render(MESSAGES) == "ok"


def test_a_template_with_a_syntax_error_fails_every_row_without_starting_again() -> None:
    with open_template("{% if %}") as template:
        for _ in range(50):
            with pytest.raises(TemplateError, match="not valid"):
                template.render(MESSAGES)
        assert template._process is not None
        assert template._process.ended


def test_a_template_longer_than_a_megabyte_is_not_tried() -> None:
    with (
        open_template("x" * (1 << 20) + "y") as template,
        pytest.raises(TemplateError, match="1048577 characters"),
    ):
        template.render(MESSAGES)


def test_a_worker_killed_from_outside_is_replaced_unnoticed(good: ChatTemplate) -> None:
    assert good.render(MESSAGES) == "Hi!"
    os.kill(worker_of(good), signal.SIGKILL)
    assert good.render(MESSAGES) == "Hi!"


def test_rendering_is_fast_enough_for_large_jobs(good: ChatTemplate) -> None:
    good.render(MESSAGES)
    start = time.monotonic()
    for _ in range(1000):
        good.render(MESSAGES)
    assert 1000 / (time.monotonic() - start) > 1000


def test_a_long_message_goes_through_and_too_long_output_does_not(good: ChatTemplate) -> None:
    text = "é" * 1_000_000
    assert good.render([{"role": "user", "content": text}]) == text + "!"
    with pytest.raises(TemplateError, match="more than 4194304 characters"):
        good.render([{"role": "user", "content": "x" * 5_000_000}])


def test_a_message_that_does_not_fit_the_workers_memory_is_an_error_of_its_row() -> None:
    with open_template(GOOD, memory_limit_bytes=16 << 20) as template:
        with pytest.raises(TemplateError, match="ended twice"):
            template.render([{"role": "user", "content": "x" * 30_000_000}])
        assert template.render(MESSAGES) == "Hi!"


def test_closing_ends_the_worker_and_leaves_no_zombie() -> None:
    template = open_template(GOOD)
    template.render(MESSAGES)
    worker = worker_of(template)
    template.close()
    template.close()
    assert not exists(worker)
    with pytest.raises(ClosedError, match="closed"):
        template.render(MESSAGES)


def test_a_forgotten_template_takes_its_worker_along() -> None:
    template = open_template(GOOD)
    template.render(MESSAGES)
    worker = worker_of(template)
    del template
    assert not exists(worker)


def test_the_worker_dies_with_a_parent_that_is_killed() -> None:
    program = textwrap.dedent(
        """
        import os, signal
        from orcd_batch.text import ChatTemplate
        template = ChatTemplate("x", "", "", "2024-07-26")
        template.render([{"role": "user", "content": ""}])
        print(template._process._process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPO_ROOT, check=False
    )
    worker = int(done.stdout)
    deadline = time.monotonic() + 10
    while runs(worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not runs(worker)


def test_ctrl_c_at_the_terminal_does_not_reach_the_worker(good: ChatTemplate) -> None:
    good.render(MESSAGES)
    assert os.getpgid(worker_of(good)) != os.getpgid(0)


def test_the_worker_loads_nothing_heavy_and_none_of_the_other_rooms() -> None:
    program = "import sys, orcd_batch.text.template_worker; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPO_ROOT, check=True
    )
    loaded = set(done.stdout.split())
    assert not loaded & {"numpy", "hydra", "omegaconf", "tokenizers", "pyarrow", "gguf", "rich"}
    ours = {name for name in loaded if name.startswith("orcd_batch")}
    assert ours == {"orcd_batch", "orcd_batch.text", "orcd_batch.text.template_worker"}


@pytest.mark.parametrize("date", ["", "today", "26 Jul 2024", "2024-02-30"])
def test_a_date_that_is_none_is_refused(date: str) -> None:
    with pytest.raises(ConfigError, match="not of the form 2024-07-26"):
        ChatTemplate(GOOD, "", "", date)


def worker_of(template: ChatTemplate) -> int:
    assert template._process is not None
    return template._process._process.pid


def exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def runs(process: int) -> bool:
    """Like `exists`, but an ended process that only waits to be collected counts as gone."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
