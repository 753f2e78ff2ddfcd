"""Generation from strings to strings: stop strings, streaming, several samples per prompt."""

import codecs
from collections.abc import Callable, Iterator, Sequence

from gpt4o_jax.data.tokenizer import Tokenizer
from gpt4o_jax.errors import RunError, data_error, lone_surrogate
from gpt4o_jax.model.gpt import GPT
from gpt4o_jax.sampling.engine import Engine
from gpt4o_jax.sampling.generate import Completion, generate
from gpt4o_jax.sampling.logits import Sampling
from gpt4o_jax.sampling.speculative import Draft


def complete(
    model: GPT,
    params,
    tokenizer: Tokenizer,
    prompts: Sequence[str | list[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stop: Sequence[str] = (),
    stream: Callable[[int, str], None] | None = None,
    num_samples: int = 1,
    draft: Draft | None = None,
) -> list[tuple[str, Completion]]:
    """Continuations of `prompts` (texts or ids), `num_samples` of each, cut before the first stop string.

    Sample j of prompt p is row p * num_samples + j. stream(row, text) receives whole characters as they are generated, never any
    part of a stop string. Needs an active mesh. Raises RunError as generate() does, and for prompts and stop strings that are not
    valid text.
    """
    stops = _stops(tokenizer, stop)
    writers = [Streamer(tokenizer, stop, lambda text, row=row: stream(row, text)) for row in range(len(prompts) * num_samples)]
    completions = generate(
        model,
        params,
        [tokenizer.prompt(p) if isinstance(p, str) else p for p in prompts],
        max_new_tokens,
        sampling,
        seed,
        lambda row, ids: stops(ids),
        (lambda row, ids: writers[row].feed(ids)) if stream else (lambda row, ids: None),
        tokenizer.vocab_size,
        tokenizer.symbols,
        num_samples,
        draft,
    )
    if stream:
        for writer in writers:
            writer.close()
    return [(_before(tokenizer.decode(c.ids), stop), c) for c in completions]


def complete_each(
    model: GPT,
    params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stop: Sequence[str] = (),
    num_samples: int = 1,
    rows: int = 8,
) -> Iterator[tuple[int, list[tuple[str, Completion]]]]:
    """Continues many prompts, `rows` at a time (sampling/engine.py). Yields (index of a prompt, its samples) as they finish.

    The samples of a prompt are those that complete() gives for it alone. Needs an active mesh. Raises RunError, with the
    index of the prompt, before the first pass.
    """
    engine = Engine(model, params, rows, tokenizer.vocab_size, tokenizer.symbols)
    going, stops = {}, _stops(tokenizer, stop)
    for p, prompt in enumerate(prompts):
        try:
            how = (tokenizer.prompt(prompt), max_new_tokens, sampling, seed)
            going[p] = [engine.submit(*how, number, stops) for number in range(num_samples)]
        except RunError as e:
            raise RunError(f"prompts[{p}]: {e}", e.code) from None
    while going:
        engine.step()
        for p in [p for p, requests in going.items() if all(r.completion.finished for r in requests)]:
            yield p, [(_before(tokenizer.decode(r.completion.ids), stop), r.completion) for r in going.pop(p)]


def _stops(tokenizer: Tokenizer, stop: Sequence[str]) -> Callable[[list[int]], int | None]:
    """(ids so far) -> how many to keep if the last of them complete a stop string. Raises RunError for an invalid one."""
    for s in stop:
        if lone_surrogate(s):
            raise data_error(f"stop string {s!r}: not UTF-8 ({lone_surrogate(s)}); no text holds it")
    encoded = [s.encode() for s in stop if s]
    longest = max(map(len, encoded), default=0)

    def stops(ids: list[int]) -> int | None:
        # It is enough to look back as many tokens as the longest stop string has bytes.
        recent = tokenizer.decode_bytes(ids[-longest - 1 :]) if longest else b""
        return len(ids) if any(s in recent for s in encoded) else None

    return stops


def _before(text: str, stop: Sequence[str]) -> str:
    cuts = [at for s in stop if s and (at := text.find(s)) >= 0]
    return text[: min(cuts)] if cuts else text


class Streamer:
    """Passes text on as soon as its characters are complete and it can no longer become a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], write: Callable[[str], None]):
        self._tokenizer, self._stop, self._write = tokenizer, [s for s in stop if s], write
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held, self._ended = "", False

    def feed(self, ids: list[int], final: bool = False) -> None:
        self._held += self._decoder.decode(self._tokenizer.decode_bytes(ids), final)
        cuts = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if cuts:
            self._held, self._ended = self._held[: min(cuts)], True
        keep = 0 if final or self._ended else self._may_begin_stop()
        ready = self._held[: len(self._held) - keep]
        if ready:
            self._write(ready)
        self._held = self._held[len(ready) :]

    def close(self) -> None:
        if not self._ended:
            self.feed([], final=True)

    def _may_begin_stop(self) -> int:
        """Length of the longest suffix of the held text that is a proper prefix of a stop string."""
        lengths = (n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n]))
        return max(lengths, default=0)
