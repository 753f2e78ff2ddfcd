"""Generation follows the model: greedy is the argmax of full passes, draws depend only on prompt, row and seed, and a row ends
at <eos>, at a stop string or at its length.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import ModelConfig
from gpt4o_jax.data.tokenizer import BOS, EOS, RESERVED, Symbols, Tokenizer
from gpt4o_jax.errors import RunError
from gpt4o_jax.model import gpt
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.sampling import decode
from gpt4o_jax.sampling.decode import prefill
from gpt4o_jax.sampling.generate import generate
from gpt4o_jax.sampling.logits import Sampling
from gpt4o_jax.sampling.text import complete

# Pieces of several characters, and characters of several pieces ("é" and "€" are split into bytes).
PIECES = [b"a", b"b", b"c", b"ab", b"ba", b"cab", b" ", b"\xc3", b"\xa9", b"\xe2", b"\x82", b"\xac"]
TOKENIZER = Tokenizer("test", [b""] * RESERVED + PIECES, b"", lambda text: [RESERVED + PIECES.index(c.encode()) for c in text])
LIMIT = 64
CONFIG = ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    context_length=LIMIT,
    n_layers=2,
    d_model=16,
    n_heads=2,
    output_init="scaled",
    init_std=0.5,
    logit_softcap=3.0,
)
MODEL = gpt.GPT(CONFIG, Compute("cpu", "float32"))
PROMPTS = [[BOS, 40], [BOS, 33, 35, 41, 36, 32, 37], [BOS], [BOS, *[34] * 20]]


@pytest.fixture(scope="module")
def params():
    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        made = jax.jit(functools.partial(gpt.init, MODEL))(jax.random.key(1))
        yield jax.tree.map(jnp.asarray, made)


@pytest.fixture(scope="module")
def next_logits(params):
    """ids -> logits of the next token, by one full pass, with control symbols except <eos> excluded."""

    @jax.jit
    def full(tokens, length):
        index = jnp.arange(LIMIT)[None]
        hidden, _, _ = MODEL.apply({"params": params}, tokens, index, (index < length).astype(jnp.int32))
        logits = gpt.unembed(MODEL, params, hidden)[0, length - 1]
        return jnp.where((jnp.arange(logits.size) < RESERVED) & (jnp.arange(logits.size) != EOS), -jnp.inf, logits)

    return lambda ids: full(np.pad(np.array(ids, np.int32), (0, LIMIT - len(ids)))[None], len(ids))


def ids_of(completions):
    return [c.ids for c in completions]


def test_greedy_is_the_argmax_of_repeated_full_passes(params, next_logits):
    for prompt, c in zip(PROMPTS, generate(MODEL, params, PROMPTS, 20, Sampling(0.0)), strict=True):
        ids = list(prompt)
        for token, logprob in zip(c.ids, c.logprobs, strict=True):
            logits = next_logits(ids)
            assert token == int(jnp.argmax(logits))
            np.testing.assert_allclose(logprob, jax.nn.log_softmax(logits)[token], rtol=1e-4, atol=1e-5)
            ids.append(token)
        assert c.finished == ("length" if len(c.ids) == 20 else "eos")
        assert c.finished == "length" or int(jnp.argmax(next_logits(ids))) == EOS


def test_rows_of_a_batch_equal_each_row_alone(params):
    together = generate(MODEL, params, PROMPTS, 20, Sampling(0.0))
    assert ids_of(together) == [generate(MODEL, params, [p], 20, Sampling(0.0))[0].ids for p in PROMPTS]


def test_a_long_neighbour_does_not_shorten_a_row(params):
    long = [BOS, *[34] * (LIMIT - 3)]
    short, other = generate(MODEL, params, [PROMPTS[0], long], 20, Sampling(0.0))
    assert short.ids == generate(MODEL, params, [PROMPTS[0]], 20, Sampling(0.0))[0].ids
    assert len(other.ids) <= 2 and other.ids == generate(MODEL, params, [long], 20, Sampling(0.0))[0].ids


def test_draws_follow_prompt_row_and_seed_only(params):
    draw = lambda prompts, seed: ids_of(generate(MODEL, params, prompts, 20, Sampling(), seed))
    first = draw(PROMPTS, 5)
    assert draw(PROMPTS, 5) == first
    assert draw(PROMPTS, 6) != first
    assert draw([PROMPTS[0], [BOS, 43], PROMPTS[2], [BOS, *[33] * 20]], 5)[::2] == first[::2], "its neighbours changed"
    same_prompt = draw([PROMPTS[1]] * 4, 5)
    assert len({tuple(ids) for ids in same_prompt}) > 1, "rows of one prompt are different samples"


def test_control_symbols_are_never_drawn_and_eos_ends_a_row(params):
    finished = set()
    for seed in range(12):
        for c in generate(MODEL, params, PROMPTS, 20, Sampling(5.0), seed):
            assert all(RESERVED <= token < TOKENIZER.vocab_size for token in c.ids)
            assert len(c.ids) == len(c.logprobs) <= 20
            assert (len(c.ids) == 20) or c.finished == "eos"
            finished.add(c.finished)
    assert finished == {"eos", "length"}


def test_symbols_of_another_tokenizer_end_rows_and_are_never_drawn(params):
    symbols = Symbols(bos=BOS, eos=(33, 38), pad=3, control=frozenset({0, 33, 35, 38}))
    ended = 0
    for seed in range(4):
        for c in generate(MODEL, params, PROMPTS, 20, Sampling(5.0), seed, vocab_size=TOKENIZER.vocab_size, symbols=symbols):
            assert not {*c.ids} & symbols.control and all(i < TOKENIZER.vocab_size for i in c.ids)
            assert c.finished == "eos" or len(c.ids) == 20
            ended += c.finished == "eos"
    assert ended


def test_a_number_of_tokens_beyond_int32_is_as_many_as_fit(params):
    assert generate(MODEL, params, PROMPTS, 10**10, Sampling(), 3) == generate(MODEL, params, PROMPTS, LIMIT, Sampling(), 3)


@pytest.mark.parametrize("n", [1, 16, 17])
def test_max_new_tokens_cuts_the_same_text(params, n):
    for short, long in zip(*(generate(MODEL, params, PROMPTS, m, Sampling(), 3) for m in (n, 20)), strict=True):
        assert short.ids == long.ids[:n]
        assert short.finished == ("length" if len(short.ids) == n else "eos")


def test_rows_the_tokenizer_has_no_piece_for_are_never_drawn(params):
    """A model may have more rows than the tokenizer has pieces (padded to a round number)."""
    fewer = Tokenizer("test", TOKENIZER.pieces[:-4], b"", TOKENIZER.encode)
    for seed in range(4):
        for text, c in complete(MODEL, params, fewer, [""] * 4, 20, Sampling(5.0), seed):
            assert all(token < fewer.vocab_size for token in c.ids)
            assert text == fewer.decode(c.ids)


STOPS = [["ab"], ["bab", "c"], ["é"], ["a b", "b"], ["cabab", " ab"], ["\n"]]


def test_stop_strings_cut_the_text_that_would_have_come(params):
    """Even if a stop string begins in one token and ends in another, or within one. Streams give the same text, no more."""
    hits = 0
    for seed in range(10):
        free = ids_of(generate(MODEL, params, PROMPTS[2:3] * 4, 20, Sampling(1.5), seed))
        for stop in STOPS:
            streamed = [""] * 4

            def stream(row, text, streamed=streamed):
                streamed[row] += text

            done = complete(MODEL, params, TOKENIZER, [""] * 4, 20, Sampling(1.5), seed, stop, stream)
            for row, (text, c) in enumerate(done):
                wanted, length = cut(free[row], stop)
                assert (text, len(c.ids)) == (wanted, length)
                assert c.ids == free[row][:length]
                assert streamed[row] == text
                assert (c.finished == "stop") == any(s in TOKENIZER.decode(c.ids) for s in stop)
                hits += c.finished == "stop"
    assert hits > 20


def cut(ids, stop):
    """The text before the first stop string, and the number of tokens until that string is complete."""
    for n in range(1, len(ids) + 1):
        text = TOKENIZER.decode(ids[:n])
        if any(s in text for s in stop):
            return text[: min(text.find(s) for s in stop if s in text)], n
    return TOKENIZER.decode(ids), len(ids)


def test_a_stop_string_that_stays_incomplete_is_text(params):
    """Its beginning is held back while it may still become one, then emitted at the end."""
    plain = complete(MODEL, params, TOKENIZER, [""] * 4, 20, Sampling(), 2)
    parts = []
    stop = [text[-2:] + "never" for text, _ in plain if len(text) > 1]
    done = complete(MODEL, params, TOKENIZER, [""] * 4, 20, Sampling(), 2, stop, lambda row, text: parts.append((row, text)))
    for row, ((text, c), (wanted, _)) in enumerate(zip(done, plain, strict=True)):
        assert text == wanted == "".join(t for r, t in parts if r == row)
        assert c.finished != "stop"


def test_samples_of_one_prefill_equal_repeated_prompts(params, monkeypatch):
    s = Sampling(1.2, top_k=8, repetition_penalty=1.3, presence_penalty=0.4, top_logprobs=2)
    repeated = generate(MODEL, params, [p for p in PROMPTS for _ in range(3)], 20, s, 5)
    several = generate(MODEL, params, PROMPTS, 20, s, 5, num_samples=3)
    assert [(c.ids, c.finished) for c in several] == [(c.ids, c.finished) for c in repeated]
    for c, wanted in zip(several, repeated, strict=True):
        np.testing.assert_allclose(c.logprobs, wanted.logprobs, rtol=1e-5)
    rows = []
    monkeypatch.setattr(
        decode, "prefill", lambda model, params, tokens, *a: rows.append(len(tokens)) or prefill(model, params, tokens, *a)
    )
    decode.functions.cache_clear()
    generate(MODEL, params, PROMPTS, 20, s, 5, num_samples=3)
    assert rows == [len(PROMPTS)]


PENALISED = Sampling(
    0.0, repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.6, logit_bias=((36, 2.0), (EOS, -100.0))
)


def test_penalties_count_what_each_row_has_seen(params, next_logits):
    """Greedy, step by step, against full passes and a list."""
    for prompt, c in zip(PROMPTS, generate(MODEL, params, PROMPTS, 20, PENALISED), strict=True):
        assert c.finished == "length"
        ids = list(prompt)
        for token, logprob in zip(c.ids, c.logprobs, strict=True):
            raw = np.asarray(next_logits(ids), np.float64)
            logits, new = raw.copy(), ids[len(prompt) :]
            logits[36] += 2
            logits[EOS] -= 100
            for i in set(ids):
                logits[i] = logits[i] / 1.5 if logits[i] > 0 else logits[i] * 1.5
            for i in new:
                logits[i] -= 0.6
            for i in set(new):
                logits[i] -= 0.3
            assert token == int(np.argmax(logits))
            np.testing.assert_allclose(logprob, jax.nn.log_softmax(raw)[token], rtol=1e-4, atol=1e-5)
            ids.append(token)


def test_stop_ids_end_a_row_before_them(params):
    """Including control symbols, which are drawn only if they are stop ids."""
    free = generate(MODEL, params, PROMPTS * 2, 20, Sampling(2.0), 4)
    stops = tuple({c.ids[len(c.ids) // 2] for c in free if c.ids[2:]})[:2]
    for row, c in zip(free, generate(MODEL, params, PROMPTS * 2, 20, Sampling(2.0, stop_ids=stops), 4), strict=True):
        wanted = list(itertools.takewhile(lambda i: i not in stops, row.ids))
        assert c.ids == wanted and len(c.logprobs) == len(wanted)
        assert c.finished == (row.finished if wanted == row.ids else "stop")
    turn = Sampling(0.0, stop_ids=(8,), logit_bias=((8, 100.0),))
    assert [(c.ids, c.finished) for c in generate(MODEL, params, PROMPTS, 20, turn)] == [([], "stop")] * 4


def test_top_log_probabilities_are_the_models(params, next_logits):
    for prompt, c in zip(PROMPTS, generate(MODEL, params, PROMPTS, 4, Sampling(2.0, top_logprobs=3), 1), strict=True):
        assert len(c.top) == len(c.ids)
        for n, top in enumerate(c.top):
            exact = np.asarray(jax.nn.log_softmax(next_logits(prompt + c.ids[:n])))
            assert [i for i, _ in top] == np.argsort(-exact)[:3].tolist()
            np.testing.assert_allclose([p for _, p in top], np.sort(exact)[:-4:-1], rtol=1e-4, atol=1e-5)
    assert generate(MODEL, params, PROMPTS, 4)[0].top == []
    (c,) = generate(MODEL, params, PROMPTS[:1], 4, Sampling(0.0, top_logprobs=20, logit_bias=((40, 9.0),)))
    assert all(len(top) == len(PIECES) + 1 and np.isfinite([p for _, p in top]).all() for top in c.top), "pieces and <eos>"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(stop_ids=(44,)), "stop_ids token 44 does not exist: the vocabulary has 44 tokens"),
        (dict(logit_bias=((3, 1.0),)), "logit_bias token 3 is a control symbol, which is never drawn"),
        (dict(logit_bias=((99, 1.0),)), "logit_bias token 99 does not exist: the vocabulary has 44 tokens"),
    ],
)
def test_tokens_that_cannot_be_are_refused(params, settings, message):
    with pytest.raises(RunError, match=message) as e:
        generate(MODEL, params, PROMPTS, 4, Sampling(**settings))
    assert e.value.code == 2


@pytest.mark.parametrize("prompt", [[BOS] * LIMIT, [BOS] * (LIMIT + 5), []])
def test_prompts_that_do_not_fit_are_refused(params, prompt):
    with pytest.raises(RunError, match=str(len(prompt)) if prompt else "empty") as e:
        generate(MODEL, params, [[BOS], prompt], 4)
    assert e.value.code == 2
