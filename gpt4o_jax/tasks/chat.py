"""Conversations, and the chat format of each model family: fixed renderers, no template language.

A rendered conversation is a list of (Symbol or Text, whether the loss counts it). Symbols become ids that only code can
place, so nothing in a message can begin or end a turn. The loss counts the assistant's text and the symbol that ends it.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence

from gpt4o_jax.errors import RunError, data_error, did_you_mean

ROLES = ("system", "user", "assistant", "tool")
_UNWRITTEN = ("tool_calls", "function_call", "tool_call_id", "name", "reasoning_content")  # in other formats; more than a text


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A control symbol by name; "bos" and "eos" are those of the tokenizer, whatever their names."""

    name: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A piece of text, from a message or a template."""

    text: str


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn. content: its parts in order; text is the only kind so far."""

    role: str
    content: tuple[Text, ...]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


Rendered = list[tuple[Symbol | Text, bool]]


def say(role: str, text: str) -> Message:
    """A message with one text."""
    return Message(role, (Text(text),))


def read_messages(stored: Sequence[dict]) -> list[Message]:
    """Messages from JSON: {"role": ..., "content": text, or a list of {"type": "text", "text": ...}}.

    Raises RunError for anything else, with the number of the message.
    """
    messages = []
    readable = lambda part: isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
    for n, entry in enumerate(stored):
        role, content = (entry.get("role"), entry.get("content")) if isinstance(entry, dict) else (None, None)
        if role not in ROLES:
            raise data_error(f"message {n}: role {role!r}{did_you_mean(str(role), ROLES)}; expected one of {', '.join(ROLES)}")
        for name in _UNWRITTEN:
            if entry.get(name):
                raise data_error(f"message {n}: {name}: no template here writes it; put what it says into content, as text")
        if entry.get("weight") not in (None, 1):
            raise data_error(
                f"message {n}: weight is {entry['weight']!r}; the loss counts every answer alike: leave weight out, or end the"
                " conversation before the turn"
            )
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not parts or not all(map(readable, parts)):
            raise data_error(
                f'message {n}: content is {content!r}; expected a text, or a list of {{"type": "text", "text": ...}}'
            )
        messages.append(Message(role, tuple(Text(p["text"]) for p in parts)))
    return messages


# ---------------------------------------------------------------- templates

BOS, EOS = Symbol("bos"), Symbol("eos")


def _own(messages: Sequence[Message], reply: bool) -> Rendered:
    """Our own format: one symbol opens a turn, one ends it; any order of roles.

    Every turn begins with a space, so that a word has the same tokens at the start of a turn as inside it, and an answer that
    repeats a word of the question repeats its tokens.
    """
    out: Rendered = [(BOS, False)]
    for m in messages:
        answer = m.role == "assistant"
        out += [(Symbol(f"<|{m.role}|>"), False), (Text(" "), answer), *((part, answer) for part in m.content)]
        out += [(Symbol("<|end_of_turn|>"), answer)]
    return [*out, (Symbol("<|assistant|>"), False)] if reply else out


def _chatml(messages: Sequence[Message], reply: bool, system: str = "", tools_ask: bool = True) -> Rendered:
    """ChatML as in Qwen. tools_ask: results of tools are user turns, consecutive ones a single turn (from 2.5 on)."""
    if system and (not messages or messages[0].role != "system"):
        messages = [say("system", system), *messages]
    out: Rendered = []
    begin, end = (Symbol("<|im_start|>"), False), Symbol("<|im_end|>")
    for role, turns in itertools.groupby(enumerate(messages), lambda item: (item[1].role, item[0] * (item[1].role != "tool"))):
        if role[0] == "tool" and tools_ask:
            answers = "".join(f"\n<tool_response>\n{m.text}\n</tool_response>" for _, m in turns)
            out += [begin, (Text(f"user{answers}"), False), (end, False), (Text("\n"), False)]
            continue
        for _, m in turns:
            answer = m.role == "assistant"
            parts = [(part, answer) for part in m.content]
            out += [begin, (Text(f"{m.role}\n"), False), *parts, (end, answer), (Text("\n"), False)]
    return [*out, begin, (Text("assistant\n"), False)] if reply else out


_NO_THOUGHTS = "<think>\n\n</think>\n\n"


def _qwen3(messages: Sequence[Message], reply: bool) -> Rendered:
    """Qwen 3's ChatML: thoughts, <think>...</think> before an answer, are kept only in answers to the last question.

    The last answer always has a think block. An empty one is not counted by the loss, and `question` provides it, as the
    published template does with enable_thinking=False. In a chat the model decides whether to think.
    """
    asked = max((n for n, m in enumerate(messages) if m.role == "user" and not _tool_answer(m.text)), default=len(messages))
    shown: list[Message] = []
    for n, m in enumerate(messages):
        if m.role == "assistant":
            thoughts, closed, _ = m.text.partition("</think>")
            thoughts = thoughts.split("<think>")[-1].strip("\n") if closed else ""
            answer = m.text.split("</think>")[-1].lstrip("\n") if closed else m.text
            last = n == len(messages) - 1
            if n > asked and (thoughts or last):
                answer = f"<think>\n{thoughts}\n</think>\n\n" + answer.lstrip("\n")
            m = say(m.role, answer)
        shown.append(m)
    out = _chatml(shown, False)
    if shown and shown[-1].role == "assistant" and shown[-1].text.startswith(_NO_THOUGHTS):
        *_, (text, _), _, _ = out  # followed by the end of the turn and of its line
        out[-3:-2] = [(Text(_NO_THOUGHTS), False), (Text(text.text.removeprefix(_NO_THOUGHTS)), True)]
    return [*out, *_chatml([], True)] if reply else out


def _tool_answer(text: str) -> bool:
    return text.startswith("<tool_response>") and text.endswith("</tool_response>")


def _llama3(messages: Sequence[Message], reply: bool, dated: str = "") -> Rendered:
    """Llama 3's headers. dated: text that 3.1 and later put at the start of a system turn, which is then always present."""
    if dated:
        given = bool(messages) and messages[0].role == "system"
        system = messages[0].text.strip() if given else ""
        messages = [say("system", dated + system), *messages[given:]]
    header = lambda role: [
        (Symbol("<|start_header_id|>"), False), (Text(role), False), (Symbol("<|end_header_id|>"), False), (Text("\n\n"), False)
    ]  # fmt: skip
    out: Rendered = [(BOS, False)]
    for n, m in enumerate(messages):
        answer, text = m.role == "assistant", m.text.strip()
        if dated and n == 0:
            text = m.text  # not stripped: without a system text it ends with the blank line after the date
        elif dated and m.role == "tool":
            text = json.dumps(m.text, ensure_ascii=False)
        role = "ipython" if dated and m.role == "tool" else m.role
        out += [*header(role), (Text(text), answer), (Symbol("<|eot_id|>"), answer)]
    return [*out, *header("assistant")] if reply else out


def _pairs(name: str, messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """(system text, turns), for families that only allow user, assistant, user, ... Raises RunError for another order."""
    given = bool(messages) and messages[0].role == "system"
    system, turns = messages[0].text if given else "", list(messages[given:])
    for n, m in enumerate(turns):
        expected = "assistant" if n % 2 else "user"
        if m.role != expected:
            at = f"message {n + given}"
            raise data_error(f"chat template {name}: {at} is of role {m.role}, expected {expected}: the two must alternate")
    return system, turns


def _llama2(messages: Sequence[Message], reply: bool) -> Rendered:
    """Llama 2's [INST]; the system text goes inside the first."""
    system, turns = _pairs("llama2", messages)
    out: Rendered = []
    for n, m in enumerate(turns):
        if m.role == "user":
            head = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if n == 0 and system else ""
            out += [(BOS, False), (Text(f"[INST] {(head + m.text).strip()} [/INST]"), False)]
        else:
            out += [(Text(f" {m.text.strip()} "), True), (EOS, True)]
    return out


def _mistral(messages: Sequence[Message], reply: bool, name: str = "mistral", space: str = "") -> Rendered:
    """[INST] as in Mistral 7B Instruct v0.2 and Mixtral. Their first templates reject a system text; here it goes before the
    first question, as in their later ones, which also have a space before every turn."""
    system, turns = _pairs(name, messages)
    out: Rendered = [(BOS, False)]
    for n, m in enumerate(turns):
        if m.role == "user":
            head = f"{system}\n\n" if n == 0 and system else ""
            out += [(Text(f"{space}[INST] {head}{m.text} [/INST]"), False)]
        else:
            out += [(Text(space + m.text), True), (EOS, True)]
    return out


def _mistral3(messages: Sequence[Message], reply: bool) -> Rendered:
    """[INST] as in Mistral 7B Instruct v0.3, a symbol; the system text goes before the last question (mistral-common)."""
    system, turns = _pairs("mistral0.3", messages)
    last = (len(turns) - 1) // 2 * 2
    out: Rendered = [(BOS, False)]
    for n, m in enumerate(turns):
        if m.role == "user":
            head = f"{system}\n\n" if n == last and system else ""
            out += [(Symbol("[INST]"), False), (Text(f" {head}{m.text}"), False), (Symbol("[/INST]"), False)]
        else:
            out += [(Text(f" {m.text.strip()}"), True), (EOS, True)]
    return out


def _gemma(messages: Sequence[Message], reply: bool) -> Rendered:
    """Gemma's turns. Gemma 2 rejects a system text; here it goes before the first question, as in Gemma 3."""
    system, turns = _pairs("gemma", messages)
    begin, end = (Symbol("<start_of_turn>"), False), Symbol("<end_of_turn>")
    out: Rendered = [(BOS, False)]
    for n, m in enumerate(turns):
        answer = m.role == "assistant"
        head = f"{system}\n\n" if n == 0 and system else ""
        role = "model" if answer else "user"
        out += [begin, (Text(f"{role}\n{head}"), False), (Text(m.text.strip()), answer), (end, answer), (Text("\n"), False)]
    return [*out, begin, (Text("model\n"), False)] if reply else out


def _olmo2(messages: Sequence[Message], reply: bool) -> Rendered:
    """OLMo 2's headers, which are text; eos ends an answer, followed by a newline if there is another turn."""
    out: Rendered = [(BOS, False)]
    for n, m in enumerate(messages):
        if m.role == "tool":
            raise data_error(f"chat template olmo2: message {n} is of role tool, expected system, user or assistant")
        answer, last = m.role == "assistant", n == len(messages) - 1
        out += [(Text(f"<|{m.role}|>\n"), False), *((part, answer) for part in m.content)]
        out += [(EOS, True)] * answer + [(Text("\n"), False)] * (not (answer and last))
    return [*out, (Text("<|assistant|>\n"), False)] if reply else out


def _plain(messages: Sequence[Message], reply: bool) -> Rendered:
    """Only the symbols of plain text: one line per message, and eos after an answer, as after a document."""
    out: Rendered = [(BOS, False)]
    for m in messages:
        answer = m.role == "assistant"
        out += [(Text(m.text), answer), (EOS, True) if answer else (Text("\n"), False)]
    return out


def _continued(messages: Sequence[Message], reply: bool) -> Rendered:
    return [(BOS, False), (Text("\n".join(m.text for m in messages)), False)]


@dataclasses.dataclass(frozen=True)
class Template:
    """The chat format of a family. render(messages, reply): with reply, the header of the assistant's next turn is added."""

    render: Callable[[Sequence[Message], bool], Rendered]
    end: Symbol  # ends the assistant's turn
    begin: str = ""  # comes before the assistant's text without being part of it
    no_thoughts: str = ""  # comes after the header of a turn whose answer has no thoughts; not learned

    def said(self, text: str) -> str:
        """The text of a reply that was generated after the header of a turn."""
        return text.removeprefix(self.begin)


# Default system texts of some families; LLAMA31 comes before every system text.
QWEN15 = "You are a helpful assistant"
QWEN2 = f"{QWEN15}."
QWEN25 = f"You are Qwen, created by Alibaba Cloud. {QWEN2}"
LLAMA31 = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
TEMPLATES = {
    "own": Template(_own, Symbol("<|end_of_turn|>"), " "),
    "chatml": Template(_chatml, Symbol("<|im_end|>")),
    "qwen1.5": Template(lambda messages, reply: _chatml(messages, reply, QWEN15, tools_ask=False), Symbol("<|im_end|>")),
    "qwen2": Template(lambda messages, reply: _chatml(messages, reply, QWEN2, tools_ask=False), Symbol("<|im_end|>")),
    "qwen2.5": Template(lambda messages, reply: _chatml(messages, reply, QWEN25), Symbol("<|im_end|>")),
    "qwen2.5-base": Template(lambda messages, reply: _chatml(messages, reply, QWEN2), Symbol("<|im_end|>")),
    "qwen3": Template(_qwen3, Symbol("<|im_end|>"), no_thoughts=_NO_THOUGHTS),
    "llama3": Template(_llama3, Symbol("<|eot_id|>")),
    "llama3.1": Template(lambda messages, reply: _llama3(messages, reply, LLAMA31), Symbol("<|eot_id|>")),
    "llama2": Template(_llama2, EOS, " "),
    "mistral": Template(_mistral, EOS),
    "mistral0.2": Template(lambda messages, reply: _mistral(messages, reply, "mistral0.2", " "), EOS, " "),
    "mistral0.3": Template(_mistral3, EOS, " "),
    "gemma": Template(_gemma, Symbol("<end_of_turn>")),
    "olmo2": Template(_olmo2, EOS),
    "plain": Template(_plain, EOS),
}
# No template: one text that user and model write in turns, to chat with models that were not trained to. Nothing marks the end
# of a turn, so it is not for training.
CONTINUED = Template(_continued, EOS)
KNOB = "--config.data.template"


def template(name: str, knob: str = KNOB) -> Template:
    """The template of that name. Raises RunError if there is none. knob: the setting or flag for it, for messages."""
    if name not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        raise RunError(f"chat template {name!r}{did_you_mean(name, TEMPLATES)}; expected {knob}=one of {known}")
    return TEMPLATES[name]


def template_for(name: str, tokenizer, knob: str = KNOB) -> Template:
    """The template of that name. Raises RunError if there is none, or the tokenizer lacks symbols that it writes."""
    absent = missing(template(name, knob), tokenizer)
    if absent:
        able = [other for other, t in TEMPLATES.items() if not missing(t, tokenizer)]
        raise data_error(
            f"chat template {name} writes {', '.join(absent)}, which the tokenizer has no symbols for; take"
            f" {knob}={' or '.join(able)}, or a model trained or imported with a tokenizer that has them"
            " (--config.tokenizer.path=FOLDER of a published one)"
        )
    return template(name)


def missing(template: Template, tokenizer) -> list[str]:
    """Names of the template's symbols that the tokenizer does not have."""
    rendered = template.render([say("user", "a"), say("assistant", "b"), say("user", "c")], True)
    names = dict.fromkeys(part.name for part, _ in rendered if isinstance(part, Symbol))
    return [name for name in names if name not in (BOS.name, EOS.name) and name not in tokenizer.names]


# ---------------------------------------------------------------- ids


def symbol_id(symbol: Symbol, tokenizer) -> int:
    """The id of a symbol. Raises RunError if the tokenizer does not have it."""
    roles = {"bos": tokenizer.symbols.bos, "eos": tokenizer.symbols.eos[0]}
    return roles[symbol.name] if symbol.name in roles else tokenizer.special(symbol.name)


def symbols_of_answers(template: Template, tokenizer):
    """The tokenizer's Symbols for generating a reply, with the symbol that ends the assistant's turn added to eos."""
    ends = (*tokenizer.symbols.eos, symbol_id(template.end, tokenizer))
    return dataclasses.replace(tokenizer.symbols, eos=tuple(dict.fromkeys(ends)))


def question(template: Template, messages: Sequence[Message], tokenizer) -> list[int]:
    """The prompt for the last message, an answer: ids of the conversation up to where that message begins in training."""
    *asked, answer = messages
    rendered = template.render(asked, True)
    if template.no_thoughts and "</think>" not in answer.text:
        rendered = [*rendered, (Text(template.no_thoughts), False)]
    return encode(rendered, tokenizer)[0]


def encode(rendered: Rendered, tokenizer) -> tuple[list[int], list[bool]]:
    """(ids, whether the loss counts each). Text between two symbols is tokenised as a whole, as with a Jinja template.

    A token that spans counted and uncounted text does not count. Raises RunError if the tokenizer lacks a symbol.
    """
    ids: list[int] = []
    counts: list[bool] = []
    for is_text, group in itertools.groupby(rendered, lambda item: isinstance(item[0], Text)):
        items = list(group)
        if is_text:
            new_ids, new_counts = _encode_text([(t.text, c) for t, c in items], tokenizer, behind_symbol=bool(ids))
        else:
            new_ids, new_counts = [symbol_id(s, tokenizer) for s, _ in items], [c for _, c in items]
        ids += new_ids
        counts += new_counts
    return ids, counts


def _encode_text(items: list[tuple[str, bool]], tokenizer, behind_symbol: bool) -> tuple[list[int], list[bool]]:
    whole = "".join(text for text, _ in items)
    ids = tokenizer.encode(whole, behind_symbol)
    written = tokenizer.decode_bytes(ids)
    extra = len(written) - len(whole.encode())
    if written[max(extra, 0) :] != whole.encode():  # the tokenizer changes the text: where parts meet is unknown
        cut = [(tokenizer.encode(text, True), counts) for text, counts in items]
        return [i for part, _ in cut for i in part], [counts for part, counts in cut for _ in part]
    lengths = [len(text.encode()) for text, _ in items]
    counting = [c for n, (_, c) in zip(lengths, items, strict=True) for _ in range(n)]  # by byte of the text
    starts = itertools.accumulate((len(tokenizer.pieces[i]) for i in ids), initial=-extra)
    ends = itertools.accumulate((len(tokenizer.pieces[i]) for i in ids), initial=-extra)
    next(ends)
    return ids, [all(counting[max(a, 0) : b]) and b > 0 for a, b in zip(starts, ends, strict=False)]
