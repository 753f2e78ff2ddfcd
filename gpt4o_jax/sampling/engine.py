"""Continuous batching: requests join a running batch as soon as a row is free, and leave it when they are done.

    engine = Engine(model, params, rows=8)
    request = engine.submit(prompt, max_new_tokens=100, sampling=Sampling(0.7), seed=1)
    while engine.step():        # request.completion grows; request.on_tokens is called
        ...

A batch that waits for its longest row leaves the other rows idle. Here a free row is given to the next request between two decode
calls: its prompt is prefilled separately and copied into the row. What a request draws depends only on its own prompt, seed and
position, so its tokens are those of generate() for this prompt alone. When few requests are left, the batch shrinks to a quarter
of its rows, repeatedly; it grows when more arrive.

R rows of the batch, P prompts prefilled together, T prompt positions, S cache slots, D model width, V vocabulary,
n tokens per decode call
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpt4o_jax.data.tokenizer import Symbols
from gpt4o_jax.errors import RunError
from gpt4o_jax.model.cache import empty_cache, shrink, take_rows
from gpt4o_jax.model.gpt import GPT
from gpt4o_jax.parallel import replicated
from gpt4o_jax.sampling import decode as plain
from gpt4o_jax.sampling import logits as lg
from gpt4o_jax.sampling.decode import State, bucket
from gpt4o_jax.sampling.generate import Completion, extend, layout
from gpt4o_jax.sampling.logits import Sampling

DECODE_CHUNK = 8  # shorter than generate()'s: a row that ends computes to the end of the call for nothing
LAST_CHUNK = 2  # if a row is known to end within a call, so that it is free sooner


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and its completion so far: `completion.finished` is "" until it is done."""

    prompt: Sequence[int]
    sampling: Sampling
    room: int  # most new tokens
    seed: int
    number: int
    should_stop: Callable[[list[int]], int | None]
    on_tokens: Callable[[list[int]], None]
    completion: Completion = dataclasses.field(default_factory=lambda: Completion([], [], ""))

    @property
    def length(self) -> int:
        """Tokens that its row may need a slot for: the prompt and those kept so far."""
        return len(self.prompt) + len(self.completion.ids)


class Engine:
    """A running batch of at most `rows` rows. Every call needs an active mesh. The queue is unbounded."""

    def __init__(self, model: GPT, params, rows: int = 8, vocab_size: int | None = None, symbols: Symbols = Symbols()):
        """vocab_size, symbols: as for generate(). Raises RunError if rows < 1."""
        if rows < 1:
            raise RunError(f"engine: rows={rows}: expected at least 1")
        self._model, self._params, self._how = model, params, (vocab_size, symbols)
        self._waiting: collections.deque[Request] = collections.deque()
        self._most = rows
        self._rows: list[Request | None] = [None] * rows
        self._slots = bucket(1, model.config.context_length)
        nobody = jnp.zeros(rows, jnp.int32)
        self._state = State(
            empty_cache(model.config, rows, self._slots, model.compute.kv_cache), nobody, jnp.copy(nobody),
            lg.row_keys(0, nobody), lg.seen_in_prompt(nobody[:, None], nobody[:, None] > 0, model.config.vocab_size),
        )  # fmt: skip

    def submit(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        number: int = 0,
        should_stop: Callable[[list[int]], int | None] = lambda ids: None,
        on_tokens: Callable[[list[int]], None] = lambda ids: None,
    ) -> Request:
        """Queues a request. number: index among the samples of the same prompt. For the rest, and errors, see generate()."""
        vocab_size, symbols = self._how
        lg.drawable(sampling, self._model.config.vocab_size, vocab_size, symbols)
        room = int(layout(self._model, [prompt], max_new_tokens, symbols.pad)[0][0])
        request = Request(tuple(prompt), sampling, room, seed, number, should_stop, on_tokens)
        self._waiting.append(request)
        return request

    def step(self) -> bool:
        """Gives free rows to waiting requests and decodes some tokens. Returns whether any request is left."""
        self._fit_rows()
        self._admit()
        if any(self._rows):
            self._decode()
        return bool(self._waiting) or any(self._rows)

    def run(self) -> None:
        """Steps until all requests are done."""
        while self.step():
            pass

    def _fit_rows(self) -> None:
        """Fits the batch to the rows needed, in factors of 4: each size is compiled once."""
        busy = [row for row, request in enumerate(self._rows) if request]
        wanted, width = len(busy) + len(self._waiting), self._most
        while width >= 4 and 0 < wanted <= width // 4:
            width //= 4
        if width == len(self._rows):
            return
        rows_R = np.array((busy + [0] * width)[:width])  # what an empty row holds is never read
        cache, *others = self._state
        self._state = State(take_rows(cache, rows_R), *jax.tree.map(lambda x: x[rows_R], others))
        self._rows = [self._rows[row] for row in busy] + [None] * (width - len(busy))

    def _admit(self) -> None:
        free = [row for row, request in enumerate(self._rows) if request is None]
        joining = [(row, self._waiting.popleft()) for row in free[: len(self._waiting)]]
        if not joining:
            return
        for row, request in joining:
            self._rows[row] = request
        self._make_room()
        by_bucket = collections.defaultdict(list)
        for row, request in joining:
            by_bucket[bucket(len(request.prompt), self._model.config.context_length), request.sampling].append((row, request))
        _, symbols = self._how
        for (T, sampling), group in by_bucket.items():
            P = bucket(len(group), len(self._rows), least=1)
            lengths_P = np.ones(P, np.int32)
            tokens_PT = np.full((P, T), symbols.pad, np.int32)
            rows_P = np.full(P, len(self._rows), np.int32)  # unused places are out of range: written to no row
            seeds_P, numbers_P = np.zeros((2, P), np.uint32)
            for i, (row, request) in enumerate(group):
                tokens_PT[i, : len(request.prompt)] = request.prompt
                lengths_P[i], rows_P[i] = len(request.prompt), row
                seeds_P[i], numbers_P[i] = request.seed, request.number
            join = _join(self._model, sampling, self._slots, *self._how)
            self._state, chosen = join(self._params, self._state, tokens_PT, lengths_P, rows_P, seeds_P, numbers_P)
            chosen = jax.device_get(chosen)
            for i, (row, _) in enumerate(group):
                self._take(row, jax.tree.map(lambda x, i=i: x[:, i].tolist(), chosen))

    def _decode(self) -> None:
        self._make_room()
        samplings = tuple(sorted({r.sampling for r in self._rows if r}, key=repr))
        which_R = np.array([samplings.index(r.sampling) if r else 0 for r in self._rows], np.int32)
        done_R = np.array([r is None for r in self._rows])
        left = min(r.room - len(r.completion.ids) for r in self._rows if r)
        n = DECODE_CHUNK if left >= DECODE_CHUNK else LAST_CHUNK
        self._state, chosen = _decode(self._model, samplings, n, *self._how)(self._params, self._state, which_R, done_R)
        chosen = jax.device_get(chosen)
        for row, request in enumerate(self._rows):
            if request:
                width = request.sampling.top_logprobs
                tokens = [x[:, row] if x.ndim == 2 else x[:, row, :width] for x in chosen]
                self._take(row, lg.Chosen(*(x.tolist() for x in tokens)))

    def _make_room(self) -> None:
        """Fits the cache to its longest row (rings up to their full size), since attention reads all of it."""
        need = max(r.length for r in self._rows if r) + DECODE_CHUNK
        slots = bucket(need, self._model.config.context_length)
        if slots < self._slots:
            self._state = self._state._replace(cache=shrink(self._model.config, self._state.cache, slots))
            self._slots = slots
        self._slots = max(self._slots, slots)
        self._state = plain.with_room(self._model, self._state, self._slots)

    def _take(self, row: int, tokens) -> None:
        r, (_, symbols) = self._rows[row], self._how
        extend(
            r.completion, row, [True] * len(tokens.token_B), tokens, r.room, symbols.eos, r.sampling.stop_ids,
            lambda _, ids: r.should_stop(ids), lambda _, ids: r.on_tokens(ids),
        )  # fmt: skip
        if r.completion.finished:
            self._rows[row] = None


@functools.lru_cache(maxsize=32)
def _join(model: GPT, sampling: Sampling, slots: int, vocab_size: int | None, symbols: Symbols):
    """jit: (params, state, prompts, lengths, rows, seeds, numbers) -> (state with these rows in it, their first tokens)."""
    allowed_V = lg.drawable(sampling, model.config.vocab_size, vocab_size, symbols)

    @functools.partial(jax.jit, donate_argnums=1)
    def join(params, state: State, tokens_PT, lengths_P, rows_P, seeds_P, numbers_P):
        keys_P = jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(seeds_P, numbers_P)
        new, chosen = plain.start(model, sampling, allowed_V, params, tokens_PT, lengths_P, keys_P, slots)
        put = lambda old, x: old.at[rows_P].set(x, mode="drop")
        cache = jax.tree.map(lambda old, x: old.at[:, rows_P].set(x, mode="drop"), state.cache, new.cache)
        # What a row without penalties has seen is never read: the values of the previous request may stay.
        seen = state.seen if new.seen is None else jax.tree.map(put, state.seen, new.seen)
        state = State(
            cache, put(state.token_B, new.token_B), put(state.positions_B, new.positions_B), put(state.keys_B, new.keys_B), seen
        )
        return state, replicated(jax.tree.map(lambda x: x[None], chosen))

    return join


@functools.lru_cache(maxsize=16)
def _decode(model: GPT, samplings: tuple[Sampling, ...], n: int, vocab_size: int | None, symbols: Symbols):
    """jit: (params, state, which of `samplings` each row has, which rows are empty) -> (state, Chosen [n, R])."""
    drawables = [lg.drawable(s, model.config.vocab_size, vocab_size, symbols) for s in samplings]
    widest = max(samplings, key=lambda s: s.top_logprobs)
    counting = any(s.penalised for s in samplings)

    @functools.partial(jax.jit, donate_argnums=1)
    def decode(params, state: State, which_R, done_R):
        def one(carry, _):
            state, done_R = carry
            hidden_R1D, cache, _ = model.apply(
                {"params": params}, state.token_B[:, None], state.positions_B[:, None], (~done_R).astype(jnp.int32)[:, None],
                state.cache,
            )  # fmt: skip
            logits_RV = plain.drawable_logits(model, params, hidden_R1D, np.ones(model.config.vocab_size, bool))[:, 0]
            positions_R = state.positions_B + 1
            keys_R = lg.at_positions(state.keys_B, positions_R)
            token_R, ended_R, allowed_RV = state.token_B, done_R, jnp.zeros(logits_RV.shape, bool)
            for i, (s, allowed_V) in enumerate(zip(samplings, drawables, strict=True)):
                mine_R = which_R == i
                own_R = lg.choose(jnp.where(allowed_V, logits_RV, -jnp.inf), keys_R, s, state.seen)
                token_R = jnp.where(mine_R, own_R, token_R)
                ended_R |= mine_R & jnp.isin(own_R, np.array(lg.endings(s, symbols)))
                allowed_RV |= mine_R[:, None] & allowed_V
            chosen = lg.told(jnp.where(allowed_RV, logits_RV, -jnp.inf), token_R, widest)
            seen = lg.also_seen(state.seen, token_R) if counting else state.seen
            return (State(cache, token_R, positions_R, state.keys_B, seen), ended_R), chosen

        (state, _), chosen = jax.lax.scan(one, (state, done_R), None, length=n)
        return state, replicated(chosen)

    return decode
