"""Chat with a model: the history as prompt, streamed replies; the oldest turns are dropped to make room."""

import dataclasses
from collections.abc import Callable

import numpy as np

from gpt4o_jax.errors import RunError
from gpt4o_jax.run import Run
from gpt4o_jax.sampling.generate import generate
from gpt4o_jax.sampling.logits import Sampling, drawable
from gpt4o_jax.sampling.text import Streamer
from gpt4o_jax.tasks.chat import Message, Template, encode, say, symbols_of_answers


@dataclasses.dataclass
class Session:
    """The state of a conversation. Use it under `with jax.set_mesh(run.mesh):`."""

    run: Run
    template: Template
    sampling: Sampling
    max_new_tokens: int
    seed: int
    system: str = ""
    turns: list[Message] = dataclasses.field(default_factory=list)  # user, assistant, user, ...
    replies: int = 0  # given so far, dropped ones included
    tokens: int = 0  # of all replies


def prompt(session: Session) -> tuple[list[int], int]:
    """(ids of the conversation up to the reply's first token, number of turns dropped to make it fit).

    At most half of the context is kept free for the reply. Turns are dropped in pairs of question and answer, the oldest
    first. Raises RunError if the last question alone does not fit.
    """
    limit = session.run.model.config.context_length
    free = min(session.max_new_tokens, max(limit // 2, 1))
    head = [say("system", session.system)] if session.system else []
    for dropped in range(0, len(session.turns), 2):
        ids, _ = encode(session.template.render([*head, *session.turns[dropped:]], True), session.run.tokenizer)
        if len(ids) + free <= limit:
            return ids, dropped
    what = "this message and the system text are" if session.turns[-1].text else "the system text is"
    raise RunError(
        f"{what} {len(ids)} tokens, but the context holds {limit} and {free} are kept for the reply; write less, or /set"
        " max_new_tokens"
    )


def check(session: Session) -> None:
    """Raises RunError if no message could be answered: the template cannot render the system text, it does not fit, or
    `sampling` names tokens that do not exist or are never drawn."""
    run, symbols = session.run, symbols_of_answers(session.template, session.run.tokenizer)
    drawable(session.sampling, run.model.config.vocab_size, run.tokenizer.vocab_size, symbols)
    prompt(dataclasses.replace(session, turns=[say("user", "")]))


def reply(session: Session, text: str, write: Callable[[str], None], tell: Callable[[str], None]) -> bool:
    """Asks `text`, streams the answer to `write` and keeps both. Returns False if KeyboardInterrupt stopped it early.

    tell: gets a line if turns were dropped. Raises RunError, and keeps nothing, if the question does not fit.
    """
    before = list(session.turns)
    try:
        return _reply(session, text, write, tell)
    except RunError:
        session.turns[:] = before
        raise


def _reply(session: Session, text: str, write: Callable[[str], None], tell: Callable[[str], None]) -> bool:
    tokenizer = session.run.tokenizer
    session.turns.append(say("user", text))
    ids, dropped = prompt(session)
    if dropped:
        del session.turns[:dropped]
        tell(f"the context is full: the oldest {dropped} turns were dropped")
    symbols = symbols_of_answers(session.template, tokenizer)
    said: list[int] = []

    stream = Streamer(tokenizer, (), _without(session.template.begin, write))

    def take(row: int, new: list[int]) -> None:
        said.extend(new)
        stream.feed(new)

    rows = [ids]
    how = {"on_tokens": take, "vocab_size": tokenizer.vocab_size, "symbols": symbols}
    seed = int(np.random.SeedSequence([session.seed, session.replies]).generate_state(1)[0] >> 1)
    finished = True
    try:
        generate(session.run.model, session.run.params, rows, session.max_new_tokens, session.sampling, seed, **how)
    except KeyboardInterrupt:
        finished = False
    stream.close()
    session.turns.append(say("assistant", session.template.said(tokenizer.decode(said))))
    session.replies += 1
    session.tokens += len(said)
    return finished


def _without(begin: str, write: Callable[[str], None]) -> Callable[[str], None]:
    """`write` for a text in pieces, without `begin` at the start of the text."""
    left = begin

    def write_rest(text: str) -> None:
        nonlocal left
        while text and left and text[0] == left[0]:
            text, left = text[1:], left[1:]
        if text:
            left = ""
            write(text)

    return write_rest
