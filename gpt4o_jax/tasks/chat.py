"""One form of conversation, and how each family of models writes it: fixed renderers, no template language.

A rendered conversation is a list of (Symbol or Text, whether the loss counts it). Symbols become the ids that only code
can place, so nothing that stands in a message can begin or end a turn. What counts: the assistant's words and the symbol
that ends them.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence

from gpt4o_jax.errors import RunError, data_error, did_you_mean

ROLES = ("system", "user", "assistant", "tool")
_UNWRITTEN = ("tool_calls", "function_call", "tool_call_id", "name", "reasoning_content")  # of others' files; more than a text


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A control symbol by its name; "bos" and "eos" are those of the tokenizer, whatever their names."""

    name: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A piece of text, of a message or of a template."""

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
    """A message of one text."""
    return Message(role, (Text(text),))


def read_messages(stored: Sequence[dict]) -> list[Message]:
    """Messages from JSON: {"role": ..., "content": text, or a list of {"type": "text", "text": ...}}. Raises RunError."""
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
    """Ours: one symbol opens a turn, one ends it; any order of roles.

    A space begins every turn: so a word is the same tokens at its beginning as within it, and an answer that repeats a word
    of the question repeats its tokens.
    """
    out: Rendered = [(BOS, False)]
    for m in messages:
        answer = m.role == "assistant"
        out += [(Symbol(f"<|{m.role}|>"), False), (Text(" "), answer), *((part, answer) for part in m.content)]
        out += [(Symbol("<|end_of_turn|>"), answer)]
    return [*out, (Symbol("<|assistant|>"), False)] if reply else out


def _chatml(messages: Sequence[Message], reply: bool, system: str = "", tools_ask: bool = True) -> Rendered:
    """ChatML as Qwen writes it. tools_ask: answers of tools are turns of the user, those in a row one turn (from 2.5 on)."""
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
    """Qwen 3's ChatML: thoughts, <think>...</think> before an answer, stay only in answers to the last question.

    There the last answer has a place for thoughts even where it has none, which the loss then does not count: `question` gives
    it, as the published template does with enable_thinking=False. Who chats leaves thoughts to the model.
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
        *_, (text, _), _, _ = out  # what ends the turn and its line come behind
        out[-3:-2] = [(Text(_NO_THOUGHTS), False), (Text(text.text.removeprefix(_NO_THOUGHTS)), True)]
    return [*out, *_chatml([], True)] if reply else out


def _tool_answer(text: str) -> bool:
    return text.startswith("<tool_response>") and text.endswith("</tool_response>")


def _llama3(messages: Sequence[Message], reply: bool, dated: str = "") -> Rendered:
    """Llama 3's headers. dated: what 3.1 and later put at the head of a system turn that is always there."""
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
            text = m.text  # where no system text is given, the date's empty line ends it
        elif dated and m.role == "tool":
            text = json.dumps(m.text, ensure_ascii=False)
        role = "ipython" if dated and m.role == "tool" else m.role
        out += [*header(role), (Text(text), answer), (Symbol("<|eot_id|>"), answer)]
    return [*out, *header("assistant")] if reply else out


def _pairs(name: str, messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """(system text, turns), for families that know no other order than user, assistant, user, ..."""
    given = bool(messages) and messages[0].role == "system"
    system, turns = messages[0].text if given else "", list(messages[given:])
    for n, m in enumerate(turns):
        expected = "assistant" if n % 2 else "user"
        if m.role != expected:
            at = f"message {n + given}"
            raise data_error(f"chat template {name}: {at} is of role {m.role}, expected {expected}: the two must alternate")
    return system, turns


def _llama2(messages: Sequence[Message], reply: bool) -> Rendered:
    """Llama 2's [INST]; the system text stands inside the first."""
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
    """Mistral 7B Instruct v0.2's and Mixtral's [INST]. As first published they refuse a system text; here that stands before the
    first question, as in what was published later, which has a space before every turn too."""
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
    """Mistral 7B Instruct v0.3's [INST], a symbol; the system text stands before the last question (mistral-common)."""
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
    """Gemma's turns. Gemma 2 refuses a system text; here it stands before the first question, as in Gemma 3."""
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
    """OLMo 2's headers, which are text; eos ends an answer, and a line's end stands behind it where a turn follows."""
    out: Rendered = [(BOS, False)]
    for n, m in enumerate(messages):
        if m.role == "tool":
            raise data_error(f"chat template olmo2: message {n} is of role tool, expected system, user or assistant")
        answer, last = m.role == "assistant", n == len(messages) - 1
        out += [(Text(f"<|{m.role}|>\n"), False), *((part, answer) for part in m.content)]
        out += [(EOS, True)] * answer + [(Text("\n"), False)] * (not (answer and last))
    return [*out, (Text("<|assistant|>\n"), False)] if reply else out


def _plain(messages: Sequence[Message], reply: bool) -> Rendered:
    """No symbols but those of every text: a line for each message, eos behind an answer, as behind a document."""
    out: Rendered = [(BOS, False)]
    for m in messages:
        answer = m.role == "assistant"
        out += [(Text(m.text), answer), (EOS, True) if answer else (Text("\n"), False)]
    return out


def _continued(messages: Sequence[Message], reply: bool) -> Rendered:
    return [(BOS, False), (Text("\n".join(m.text for m in messages)), False)]


@dataclasses.dataclass(frozen=True)
class Template:
    """How a family writes conversations. render(messages, reply): reply asks for the head of the assistant's next turn."""

    render: Callable[[Sequence[Message], bool], Rendered]
    end: Symbol  # what ends the assistant's turn
    begin: str = ""  # what stands before the text of the assistant's turn, and is not of it
    no_thoughts: str = ""  # what stands behind the head of a turn whose answer has no thoughts, and is not learned

    def said(self, text: str) -> str:
        """The text of a reply that was generated behind the head of a turn."""
        return text.removeprefix(self.begin)


# System texts that some put where none is given; LLAMA31 stands before every one.
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
# No template: one text that user and model write in turns. For talking with models that know no conversations; as nothing ends
# a turn in it, it is none to train with.
CONTINUED = Template(_continued, EOS)
KNOB = "--config.data.template"


def template(name: str, knob: str = KNOB) -> Template:
    """The template of that name. Raises RunError where there is none. knob: where it is set, for messages."""
    if name not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        raise RunError(f"chat template {name!r}{did_you_mean(name, TEMPLATES)}; expected {knob}=one of {known}")
    return TEMPLATES[name]


def template_for(name: str, tokenizer, knob: str = KNOB) -> Template:
    """The same. Raises RunError also where the tokenizer lacks symbols that it writes."""
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
    """Names of the symbols of a conversation that the tokenizer does not have."""
    rendered = template.render([say("user", "a"), say("assistant", "b"), say("user", "c")], True)
    names = dict.fromkeys(part.name for part, _ in rendered if isinstance(part, Symbol))
    return [name for name in names if name not in (BOS.name, EOS.name) and name not in tokenizer.names]


# ---------------------------------------------------------------- ids


def symbol_id(symbol: Symbol, tokenizer) -> int:
    """Raises RunError where the tokenizer has no such symbol."""
    roles = {"bos": tokenizer.symbols.bos, "eos": tokenizer.symbols.eos[0]}
    return roles[symbol.name] if symbol.name in roles else tokenizer.special(symbol.name)


def symbols_of_answers(template: Template, tokenizer):
    """The tokenizer's Symbols for generating a reply: what ends the assistant's turn ends it too."""
    ends = (*tokenizer.symbols.eos, symbol_id(template.end, tokenizer))
    return dataclasses.replace(tokenizer.symbols, eos=tuple(dict.fromkeys(ends)))


def question(template: Template, messages: Sequence[Message], tokenizer) -> list[int]:
    """Ids of a conversation up to where its last message, an answer, begins in training: what is given to be answered."""
    *asked, answer = messages
    rendered = template.render(asked, True)
    if template.no_thoughts and "</think>" not in answer.text:
        rendered = [*rendered, (Text(template.no_thoughts), False)]
    return encode(rendered, tokenizer)[0]


def encode(rendered: Rendered, tokenizer) -> tuple[list[int], list[bool]]:
    """(ids, whether the loss counts each). Text between two symbols is cut as a whole, as it is where the template is a text.

    A token that lies across the border of what counts does not count.
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
    if written[max(extra, 0) :] != whole.encode():  # a tokenizer that changes the text: where parts meet cannot be told
        cut = [(tokenizer.encode(text, True), counts) for text, counts in items]
        return [i for part, _ in cut for i in part], [counts for part, counts in cut for _ in part]
    lengths = [len(text.encode()) for text, _ in items]
    counting = [c for n, (_, c) in zip(lengths, items, strict=True) for _ in range(n)]  # by byte of the text
    starts = itertools.accumulate((len(tokenizer.pieces[i]) for i in ids), initial=-extra)
    ends = itertools.accumulate((len(tokenizer.pieces[i]) for i in ids), initial=-extra)
    next(ends)
    return ids, [all(counting[max(a, 0) : b]) and b > 0 for a, b in zip(starts, ends, strict=False)]
