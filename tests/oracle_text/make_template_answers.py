"""Writes templates.json: chat templates, and what transformers renders with them.

    pip install transformers jinja2
    PYTHONPATH=tests:. python tests/oracle_text/make_template_answers.py VOCAB_DIR SMOLLM2.gguf

`phi-3`, `qwen2` and `smollm2` are taken from the files; the others are what their models publish,
the tool branches of Qwen2.5 and Llama 3.1 left out and long lines broken.
"""

import datetime
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jinja2
from transformers.utils import chat_template_utils

from orcd_batch.checkpoint import GGUFFile

HERE = Path(__file__).parent
DATE = "2024-07-26"
BOS, EOS = "<s>", "<|endoftext|>"

CHATML = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

PHI_3 = """{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'user' %}{{'<|user|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>
' + message['content'] + '<|end|>
'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}"""

LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant"
    "<|end_header_id|>\n\n' }}{% endif %}"
)

LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + "
    "system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)

LLAMA_3_1 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{#- The system message goes into a block of its own. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN_2_5 = """{%- if tools %}
    {{- raise_exception('no tools here') }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. ' }}
        {{- 'You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
           or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif (message.role == "tool") %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

EVERYTHING = """{% set ns = namespace(count=0, seen=[]) %}
{% macro show(message, depth=1) %}
  [{{ message.role|upper }}:{{ message|tojson }}{{ message.content|tojson(indent=2) }}]
{% endmacro %}
{% for message in messages if message.role != 'skipped' %}
    {% if message.role == 'stop' %}{% break %}{% endif %}
    {% if loop.index is divisibleby 3 %}{% continue %}{% endif %}
    {% set ns.count = ns.count + message.content|length %}
    {% generation %}{{ show(message) }}{% endgeneration %}
    {{- loop.cycle('odd', 'even') }} {{ loop.revindex }} {{ message.name is defined }}
{% endfor %}
{{ ns.count }} {{ messages|map(attribute='role')|join('/') }} {{ messages[-1].content[::-1] }}
{{ '%s-%05d' % ('x', 42) }} {{ "{:>6}|{}".format('a', none) }} {{ unknown is defined }}{{ unknown }}
{{ 'abc'.split('b') }} {{ {'a': 1}.items()|list }} {{ strftime_now('%A %Y-%m-%d %H:%M') }}
{{ documents is none }} {{ tools is none }} {{ eos_token }}"""

USER = {"role": "user", "content": "What is 2 + 2?"}
CONVERSATIONS: list[list[dict[str, str]]] = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [USER, {"role": "assistant", "content": " 4 "}, {"role": "user", "content": "Sure?\n"}],
    [{"role": "user", "content": "<b> & \"quotes\" {{ 'x' * 3 }} {% if %} é 日本 😀 \u2028 \\n"}],
    [USER, USER],
    [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2", "name": "t"}],
    [{"role": "stop", "content": ""}, {"role": "skipped", "content": "\t"}],
]


class FixedDate(datetime.datetime):
    """The day that the tests give to the templates."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "FixedDate":
        return cls.fromisoformat(DATE)


def render(template: str, conversation: list[dict[str, str]]) -> dict[str, Any]:
    """The text that transformers renders, or the message the template raised."""
    try:
        with patch.object(chat_template_utils, "datetime", FixedDate):
            texts, _ = chat_template_utils.render_jinja_template(
                conversations=[conversation],
                chat_template=template,
                add_generation_prompt=True,
                bos_token=BOS,
                eos_token=EOS,
            )
    except jinja2.TemplateError as error:
        return {"error": str(error)}
    return {"text": texts[0]}


def from_file(path: Path) -> str:
    """The template that a GGUF carries."""
    with GGUFFile.open(path) as gguf:
        return str(gguf.metadata["tokenizer.chat_template"])


def main() -> None:
    vocab_dir, smollm2 = Path(sys.argv[1]), Path(sys.argv[2])
    templates = {
        "phi-3": from_file(vocab_dir / "ggml-vocab-phi-3.gguf"),
        "phi-3 as published": PHI_3,
        "qwen2": from_file(vocab_dir / "ggml-vocab-qwen2.gguf"),
        "qwen2.5": QWEN_2_5,
        "llama-2": LLAMA_2,
        "llama-3": LLAMA_3,
        "llama-3.1": LLAMA_3_1,
        "smollm2": from_file(smollm2),
        "chatml": CHATML,
        "everything": EVERYTHING,
    }
    document = {
        "date": DATE,
        "bos_token": BOS,
        "eos_token": EOS,
        "conversations": CONVERSATIONS,
        "templates": {
            name: {"source": source, "rendered": [render(source, c) for c in CONVERSATIONS]}
            for name, source in templates.items()
        },
    }
    (HERE / "templates.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
