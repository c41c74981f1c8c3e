"""The process that renders one chat template, which is code from an untrusted file.

Run as `python -m orcd_batch.text.template_worker` by `template_process`. Frames in and out are a
length (4 bytes, little-endian) and that much JSON: first the settings, then one list of messages
at a time. The kernel enforces the limits: address space, no files, no processes, and timers whose
signals nothing catches, so that no loop, in Python or in C, outlives them. Globals and filters are
those of Hugging Face's `apply_chat_template`, without the ones that draw random numbers.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from functools import partial
from struct import Struct
from typing import Any

import jinja2.debug
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

LENGTH = Struct("<I")
_WALL_TIMES_CPU = 20
_MAX_MESSAGE = 300
_WARM_UP = r"""{%- set x = namespace(a='\u00e9\N{DIGIT ONE}') -%}
{%- generation -%}{%- for y in [x.a] -%}{{ y|tojson|pprint|wordwrap|trim }}
{{- strftime_now('%d %b %Y') }}{%- continue -%}{%- endfor -%}{%- endgeneration -%}{{ x.a.b.c }}"""


def main() -> None:
    """Serve until the other side closes the pipe."""
    settings = _receive()
    if settings is None:
        return
    time_limit_s = settings["time_limit_s"]
    _load_everything(settings)
    _limit_resources(settings["memory_limit_bytes"])
    template: list[jinja2.Template] = []
    answer = _guarded(time_limit_s, partial(_compile, settings, template))
    _send(answer)
    while "fatal" not in answer and (messages := _receive()) is not None:
        answer = _guarded(time_limit_s, partial(_render, template[0], messages, settings))
        _send(answer)


def _guarded(time_limit_s: float, work: Callable[[], str]) -> dict[str, object]:
    """Do `work` under the timers; an answer that is `fatal` leaves the process unfit for more."""
    signal.setitimer(signal.ITIMER_PROF, time_limit_s)
    signal.setitimer(signal.ITIMER_REAL, time_limit_s * _WALL_TIMES_CPU)
    try:
        return {"text": work()}
    except MemoryError:
        return {"error": "it needs more memory than it may have", "fatal": True}
    except RecursionError:
        return {"error": "it nests or calls itself too deeply", "fatal": True}
    except Exception as error:
        return {"error": f"{error!s:.{_MAX_MESSAGE}}" or type(error).__name__}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _render(template: jinja2.Template, messages: object, settings: dict[str, Any]) -> str:
    pieces = []
    room = settings["output_limit"]
    for piece in template.generate(
        messages=messages,
        tools=None,
        documents=None,
        add_generation_prompt=True,
        bos_token=settings["bos_token"],
        eos_token=settings["eos_token"],
    ):
        room -= len(piece)
        if room < 0:
            raise ValueError(f"it writes more than {settings['output_limit']} characters")
        pieces.append(piece)
    return "".join(pieces)


def _load_everything(settings: dict[str, Any]) -> None:
    """Run through what imports modules late: afterwards no file can be opened."""
    template: list[jinja2.Template] = []
    _compile({**settings, "source": _WARM_UP}, template)
    with suppress(jinja2.exceptions.UndefinedError):
        _render(template[0], [], settings)


def _compile(settings: dict[str, Any], template: list[jinja2.Template]) -> str:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
        optimized=False,
        finalize=_as_it_is,
    )
    del environment.globals["lipsum"], environment.filters["random"]
    today = date.fromisoformat(settings["date"])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: today.strftime(pattern)
    environment.globals["namespace"] = _Namespace
    template.append(environment.from_string(settings["source"]))
    return ""


@jinja2.pass_context
def _as_it_is(context: jinja2.runtime.Context, value: object) -> object:
    """Wants the context, so that jinja2 cannot compute constant expressions while it compiles.

    Such an expression then harms only the rows that come across it.
    """
    return value


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what an assistant said; it only prints it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold the name {name!r:.60}")


def _raise_exception(message: object) -> None:
    raise jinja2.exceptions.TemplateError(str(message))


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _limit_resources(memory_limit_bytes: int) -> None:
    """Take away what rendering does not need; the memory limit is on top of what is in use."""
    limits = {"RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0, "RLIMIT_NOFILE": 3}
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
        limits["RLIMIT_AS"] = pages * resource.getpagesize() + memory_limit_bytes
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, name), (limit, limit))


def _receive() -> Any:
    header = _read(LENGTH.size)
    return None if header is None else json.loads(_read(LENGTH.unpack(header)[0]) or b"null")


def _read(count: int) -> bytes | None:
    pieces = []
    while count > 0:
        piece = os.read(0, min(count, 1 << 20))
        if not piece:
            return None
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def _send(answer: object) -> None:
    payload = json.dumps(answer).encode()
    view = memoryview(LENGTH.pack(len(payload)) + payload)
    while view:
        view = view[os.write(1, view) :]


if __name__ == "__main__":
    main()
