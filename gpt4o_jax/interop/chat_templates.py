"""The templates of tasks/chat.py in Jinja, the language of chat_template.jinja in a Hugging Face folder.

For messages whose content is one text, each produces exactly what the renderer of its name does. Every tag strips the white space
before it, so that the environment's settings do not matter. Content that is not a text is an error, because it is added to a
string; so are tool definitions and tool calls, which none of the renderers writes. Results of tools are turns like others, in the
form of each family.
"""

import json
from string import Template

from gpt4o_jax.data.tokenizer_published import template_mark
from gpt4o_jax.tasks import chat

_ROLES = r"""
    {%- if message.role not in $roles %}
        {{- raise_exception('role ' + message.role + ', expected one of ' + $roles | join(', ')) }}
    {%- endif %}"""

_REPLY = r"""
{%- if add_generation_prompt %}
    {{- $head }}
{%- endif %}"""

_OWN = r"""
{{- bos_token }}
{%- for message in messages %}$known
    {{- '<|' + message.role + '|> ' + message.content + '<|end_of_turn|>' }}
{%- endfor %}"""

_PLAIN = r"""
{{- bos_token }}
{%- for message in messages %}
    {{- message.content + (eos_token if message.role == 'assistant' else '\n') }}
{%- endfor %}"""

_OLMO2 = r"""
{{- bos_token }}
{%- for message in messages %}$known
    {{- '<|' + message.role + '|>\n' + message.content }}
    {%- if message.role == 'assistant' %}
        {{- eos_token + ('' if loop.last else '\n') }}
    {%- else %}
        {{- '\n' }}
    {%- endif %}
{%- endfor %}"""

# ---------------------------------------------------------------- ChatML

_DEFAULT_SYSTEM = r"""
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\n' + $system + '<|im_end|>\n' }}
{%- endif %}"""

_CHATML = r"""
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}"""

_CHATML_TOOLS_ASK = r"""
{%- for message in messages %}
    {%- set content = message.content %}$thoughts
    {%- if message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}"""

_QWEN3_ASKED = r"""
{%- set last = namespace(asked=messages | length) %}
{%- for message in messages %}
    {%- set answers = message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>') %}
    {%- if message.role == 'user' and not answers %}
        {%- set last.asked = loop.index0 %}
    {%- endif %}
{%- endfor %}"""

_QWEN3_THOUGHTS = r"""
    {%- if message.role == 'assistant' %}
        {%- set thoughts = '' %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > last.asked and (thoughts or loop.last) %}
            {%- set content = '<think>\n' + thoughts + '\n</think>\n\n' + content.lstrip('\n') %}
        {%- endif %}
    {%- endif %}"""

_QWEN3_REPLY = r"""
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- $no_thoughts }}
    {%- endif %}
{%- endif %}"""

# ---------------------------------------------------------------- Llama 3

_LLAMA3 = r"""
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content.strip() + '<|eot_id|>' }}
{%- endfor %}"""

_LLAMA31 = r"""
{%- set given = messages[0].role == 'system' %}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' + $dated }}
{{- (messages[0].content.strip() if given else '') + '<|eot_id|>' }}
{%- for message in (messages[1:] if given else messages) %}
    {%- set tool = message.role == 'tool' %}
    {{- '<|start_header_id|>' + ('ipython' if tool else message.role) + '<|end_header_id|>\n\n' }}
    {{- ((message.content + '') | tojson if tool else message.content.strip()) + '<|eot_id|>' }}
{%- endfor %}"""

# ---------------------------------------------------------------- user, assistant, user, ...

_PAIRS = r"""
{%- set given = messages[0].role == 'system' %}
{%- set system = messages[0].content + '' if given else '' %}
{%- set turns = messages[1:] if given else messages %}$begin
{%- for message in turns %}
    {%- if message.role != ('assistant' if loop.index0 % 2 else 'user') %}
        {{- raise_exception('role ' + message.role + ': user and assistant must alternate') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {%- set head = $head if system and loop.index0 == $at else '' %}
        {{- $asked }}
    {%- else %}
        {{- $answer }}
    {%- endif %}
{%- endfor %}"""


def _fill(text: str, **parts: str) -> str:
    return Template(text).substitute(parts)


def _known(*roles: str) -> str:
    return _fill(_ROLES, roles=str(list(roles)))


def _reply(head: str) -> str:
    return _fill(_REPLY, head=head)


def _chatml(system: str = "", tools_ask: bool = True) -> str:
    default = _fill(_DEFAULT_SYSTEM, system=json.dumps(system)) if system else ""
    turns = _fill(_CHATML_TOOLS_ASK, thoughts="") if tools_ask else _CHATML
    return default + turns + _reply(r"'<|im_start|>assistant\n'")


def _qwen3() -> str:
    no_thoughts = json.dumps(chat.TEMPLATES["qwen3"].no_thoughts)
    turns = _fill(_CHATML_TOOLS_ASK, thoughts=_QWEN3_THOUGHTS)
    return _QWEN3_ASKED + turns + _fill(_QWEN3_REPLY, no_thoughts=no_thoughts)


def _pairs(asked: str, answer: str, head: str = r"system + '\n\n'", at: str = "0", bos_each: bool = False) -> str:
    """asked, answer: the text of a turn; head: the system text as part of a question; at: index of that question's turn."""
    begin = "" if bos_each else "\n{{- bos_token }}"
    return _fill(_PAIRS, begin=begin, head=head, at=at, asked=asked, answer=answer)


_LLAMA3_REPLY = _reply(r"'<|start_header_id|>assistant<|end_header_id|>\n\n'")
_BODIES = {
    "own": _fill(_OWN, known=_known(*chat.ROLES)) + _reply("'<|assistant|>'"),
    "chatml": _chatml(),
    "qwen1.5": _chatml(chat.QWEN15, tools_ask=False),
    "qwen2": _chatml(chat.QWEN2, tools_ask=False),
    "qwen2.5": _chatml(chat.QWEN25),
    "qwen2.5-base": _chatml(chat.QWEN2),
    "qwen3": _qwen3(),
    "llama3": _LLAMA3 + _LLAMA3_REPLY,
    "llama3.1": _fill(_LLAMA31, dated=json.dumps(chat.LLAMA31)) + _LLAMA3_REPLY,
    "llama2": _pairs(
        asked="bos_token + '[INST] ' + (head + message.content).strip() + ' [/INST]'",
        answer="' ' + message.content.strip() + ' ' + eos_token",
        head=r"'<<SYS>>\n' + system + '\n<</SYS>>\n\n'",
        bos_each=True,
    ),
    "mistral": _pairs(asked="'[INST] ' + head + message.content + ' [/INST]'", answer="message.content + eos_token"),
    "mistral0.2": _pairs(asked="' [INST] ' + head + message.content + ' [/INST]'", answer="' ' + message.content + eos_token"),
    "mistral0.3": _pairs(
        asked="'[INST] ' + head + message.content + '[/INST]'",
        answer="' ' + message.content.strip() + eos_token",
        at="(turns | length - 1) // 2 * 2",
    ),
    "gemma": _pairs(
        asked=r"'<start_of_turn>user\n' + head + message.content.strip() + '<end_of_turn>\n'",
        answer=r"'<start_of_turn>model\n' + message.content.strip() + '<end_of_turn>\n'",
    )
    + _reply(r"'<start_of_turn>model\n'"),
    "olmo2": _fill(_OLMO2, known=_known("system", "user", "assistant")) + _reply(r"'<|assistant|>\n'"),
    "plain": _PLAIN,
}

# Families whose published templates write tool definitions; a model that was only imported is exported with its own template.
PUBLISHED_WITH_TOOLS = ("qwen2.5", "qwen2.5-base", "qwen3", "llama3.1", "mistral0.3")

_NO_TOOLS = r"""
{%- if tools %}
    {{- raise_exception($definitions) }}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {{- raise_exception('tool_calls of a message are not written by this template; put a call into its content') }}
    {%- endif %}
{%- endfor %}"""


def _no_tools(name: str) -> str:
    theirs = f": the template published with {name} does, but this model was trained on conversations without"
    why = (theirs if name in PUBLISHED_WITH_TOOLS else "") + "; put them into the text of the system message"
    return _fill(_NO_TOOLS, definitions=json.dumps(f"definitions of tools (tools=) are not written by template {name}{why}"))


TEXTS = {name: template_mark(name) + _no_tools(name) + body + "\n" for name, body in _BODIES.items()}
