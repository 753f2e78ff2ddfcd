"""chats with a model in the terminal"""

import dataclasses
import io
import sys

from gpt4o_jax.commands import sampling_flags
from gpt4o_jax.commands.flags import Flag

_DRAWING = tuple(f for f in sampling_flags.FLAGS if f.name != "top_logprobs")  # there is nowhere to show them
FLAGS = (
    Flag("workdir", str, "", "run folder", required=True),
    Flag("step", int, None, "checkpoint step; default: the best, where the run keeps it, else the newest", low=0),
    Flag(
        "template",
        str,
        "",
        "chat template: own, plain, chatml, llama3, ...; default: the one the model was trained with",
    ),
    Flag("system", str, "", "system prompt", blank=True),
    Flag("max_new_tokens", int, 256, "maximum length of a reply, in tokens", low=1),
    *_DRAWING,
    Flag("seed", int, 0, "same seed and messages, same replies", low=0, high=2**31 - 1),
)

HELP = """\
/reset              forget the conversation
/system TEXT        tell the model TEXT before the conversation; without TEXT: nothing
/set NAME=VALUE     change max_new_tokens, seed, temperature, top_p, ...; without: show them
/help  /exit        this text; leave (also Ctrl-D). Ctrl-C stops a reply. //TEXT says /TEXT to the model"""


def main(flags: dict, overrides: dict[str, str]) -> dict:
    sampling = sampling_flags.sampling("chat", {**flags, "top_logprobs": 0})
    import jax

    from gpt4o_jax import run as runs
    from gpt4o_jax.data import conversations
    from gpt4o_jax.errors import RunError
    from gpt4o_jax.sampling.chat import Session, check, reply
    from gpt4o_jax.tasks import chat

    name = flags["template"]
    if name:
        chat.template(name, "--template")  # before the model is read
    run = runs.open_run(flags["workdir"], flags["step"])
    trained = conversations.trained_template(run.config.data, run.tokenizer)
    if not name and conversations.knows_only_published(run.config.data, run.tokenizer):
        able = [known for known, t in chat.TEMPLATES.items() if not chat.missing(t, run.tokenizer)]
        otherwise = f"for another: --template={' or '.join(able)}"
        _tell(f"{conversations.UNRENDERED}: your text is continued as plain text ({otherwise})")
    elif not name and not trained:
        _tell("this model was not trained to chat: your text is continued as plain text (for another: --template)")
    name = name or trained
    template = chat.template_for(name, run.tokenizer, "--template") if name else chat.CONTINUED
    name = name or "none"
    session = Session(run, template, sampling, flags["max_new_tokens"], flags["seed"], flags["system"])
    check(session)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    _tell(f"{run.workdir} at step {run.step}, template {name}; /help lists the commands")
    with jax.set_mesh(run.mesh):
        for line in _lines():
            if line == "/exit":
                break
            try:
                if line.startswith("/") and not line.startswith("//"):
                    _tell(_command(session, line))
                    continue
                if not reply(session, line.removeprefix("/") if line.startswith("//") else line, write, _tell):
                    _tell("\nstopped")
                write("\n")
            except RunError as e:
                _tell(str(e))
    return {
        "workdir": str(run.workdir), "step": run.step, "template": name, "replies": session.replies, "tokens": session.tokens,
        "messages": [{"role": m.role, "content": m.text} for m in session.turns],
    }  # fmt: skip


def _lines():
    """The user's lines until the end of input; empty lines, and those that are not UTF-8, are skipped."""
    from gpt4o_jax.errors import lone_surrogate

    on_terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):  # otherwise one byte that is not UTF-8 loses the lines around it
        sys.stdin.reconfigure(errors="surrogateescape")
    if on_terminal:
        import readline  # noqa: F401  (line editing and history)
    while True:
        try:
            line = input("> ") if on_terminal else sys.stdin.readline()
        except KeyboardInterrupt:
            _tell("\n/exit or Ctrl-D leaves")
            continue
        except EOFError:
            return
        if not line and not on_terminal:
            return
        if lone_surrogate(line):
            byte = next(ord(ch) & 0xFF for ch in line if lone_surrogate(ch))
            _tell(f"not UTF-8 (byte 0x{byte:02x} in {line.strip()!r:.60}): passed over; `iconv -t UTF-8` converts it")
        elif line.strip():
            yield line.strip()


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _command(session, line: str) -> str:
    """Runs a /command. Returns the text to show. Raises RunError for a mistake in it."""
    from gpt4o_jax.errors import RunError, did_you_mean
    from gpt4o_jax.sampling.chat import check

    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if name == "help":
        return HELP
    if name == "reset":
        session.turns.clear()
        return "forgotten"
    if name == "system":
        check(dataclasses.replace(session, system=rest))
        session.system = rest
        return "system text set" if rest else "no system text"
    if name == "set":
        return _set(session, rest)
    known = ("reset", "system", "set", "help", "exit")
    raise RunError(f"unknown command /{name}{did_you_mean(name, known)}; /help lists them")


def _set(session, rest: str) -> str:
    from gpt4o_jax.commands.flags import parse
    from gpt4o_jax.errors import RunError, did_you_mean

    settable = [f for f in FLAGS if f.name in ("max_new_tokens", "seed") or (f in _DRAWING and f.kind in (int, float))]
    names = [assignment.partition("=")[0] for assignment in rest.split()]
    for name, assignment in zip(names, rest.split(), strict=True):
        known = [f.name for f in settable]
        if name not in known:
            raise RunError(f"/set: no setting {name!r}{did_you_mean(name, known)}; /set alone shows them")
        if "=" not in assignment:
            raise RunError(f"/set: {name} needs a value: /set {name}=...")
    # All are parsed before any is set: a mistake changes nothing.
    values, _ = parse("/set", settable, [f"--{assignment}" for assignment in rest.split()], False)
    session.sampling = dataclasses.replace(session.sampling, **{n: values[n] for n in names if not hasattr(session, n)})
    for name in names:
        if hasattr(session, name):
            setattr(session, name, values[name])
    now = {f.name: getattr(session if hasattr(session, f.name) else session.sampling, f.name) for f in settable}
    return " ".join(f"{name}={value}" for name, value in now.items())
