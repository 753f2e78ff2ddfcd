"""A running batch gives each request what generate() gives it alone, whichever requests come and go meanwhile."""

import dataclasses
import functools
import itertools

import jax
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import ModelConfig
from gpt4o_jax.data.tokenizer import BOS
from gpt4o_jax.errors import RunError
from gpt4o_jax.model import gpt
from gpt4o_jax.model.cache import empty_cache
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.sampling.engine import Engine
from gpt4o_jax.sampling.generate import generate
from gpt4o_jax.sampling.logits import Sampling

CONFIG = ModelConfig(
    vocab_size=300, context_length=64, n_layers=2, d_model=16, n_heads=2, layer_pattern=("local", "global"), window=6,
    output_init="scaled", init_std=0.5, logit_softcap=3.0,
)  # fmt: skip
MODEL = gpt.GPT(CONFIG, Compute("cpu", "float32"))
SAMPLINGS = [
    Sampling(0.0),
    Sampling(top_k=20, top_logprobs=2),
    Sampling(0.0, repetition_penalty=1.3, frequency_penalty=0.4),
    Sampling(0.9, presence_penalty=1.5, logit_bias=((270, 2.0),)),
]
# (prompt, maximum new tokens, sampling, seed, sample number): more requests than rows, prompts of two buckets, one that fills
# the context.
REQUESTS = [
    ([BOS, *[260 + (7 * i + j) % 40 for j in range(length)]], new, SAMPLINGS[i % 4], i, i % 3)
    for i, (length, new) in enumerate([(3, 9), (40, 20), (0, 30), (5, 1), (12, 25), (58, 20), (2, 17), (33, 8)])
]


@pytest.fixture(scope="module")
def params():
    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        yield jax.jit(functools.partial(gpt.init, MODEL))(jax.random.key(1))


@pytest.fixture(scope="module")
def alone(params):
    return [generate(MODEL, params, [p], n, s, seed, num_samples=3)[number] for p, n, s, seed, number in REQUESTS]


def check(request, wanted):
    got = request.completion
    assert (got.ids, got.finished) == (wanted.ids, wanted.finished)
    assert got.logprobs == pytest.approx(wanted.logprobs, rel=1e-4, abs=1e-5)
    assert [[i for i, _ in top] for top in got.top] == [[i for i, _ in top] for top in wanted.top]


def test_every_request_gets_its_own_tokens(params, alone):
    engine, streamed = Engine(MODEL, params, rows=3), [[] for _ in REQUESTS]
    submit = lambda i: engine.submit(*REQUESTS[i], on_tokens=streamed[i].extend)
    requests = [submit(i) for i in range(5)]
    engine.step()
    requests += [submit(i) for i in range(5, len(REQUESTS))]  # while the others run
    engine.run()
    for request, wanted, ids in zip(requests, alone, streamed, strict=True):
        check(request, wanted)
        assert ids == wanted.ids
    assert not engine.step()


def test_a_request_may_stop_itself_and_leave_its_place(params, alone):
    engine = Engine(MODEL, params, rows=1)
    first = engine.submit(*REQUESTS[2], should_stop=lambda ids: 4 if len(ids) == 5 else None)
    second = engine.submit(*REQUESTS[0])
    engine.run()
    assert (first.completion.ids, first.completion.finished) == (alone[2].ids[:4], "stop")
    check(second, alone[0])


def test_a_row_forgets_what_the_one_before_it_has_seen(params):
    """Penalties count one request's tokens: the same text whoever had the row before, and another text without penalties."""
    prompt, s = REQUESTS[0][0], SAMPLINGS[2]
    engine = Engine(MODEL, params, rows=1)
    requests = [engine.submit(prompt, 20, sampling) for sampling in (s, s, SAMPLINGS[0], s)]
    engine.run()
    texts = [r.completion.ids for r in requests]
    assert texts[0] == texts[1] == texts[3] != texts[2]


LAYERS = {
    "global": dict(layer_pattern=("global",), window=None),
    "rings of 32 slots, and a layer left over": dict(n_layers=3),
    "rings of 48": dict(window=30),  # cut to 32 for rows that have not wrapped around
}


@pytest.mark.parametrize("layers", LAYERS)
def test_the_cache_shrinks_when_its_longest_row_has_left(layers):
    """The remaining rows continue unaffected, and so do those for which it grows again."""
    model = gpt.GPT(dataclasses.replace(CONFIG, **LAYERS[layers]), Compute("cpu", "float32"))
    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        params = jax.jit(functools.partial(gpt.init, model))(jax.random.key(1))
        engine, slots = Engine(model, params, rows=2), []
        asked = [([BOS, *range(260, 300)], 4), ([BOS, 260], 22), ([BOS, 270], 16), ([BOS, *range(270, 290)], 40)]
        requests = [engine.submit(prompt, new, Sampling(0.0)) for prompt, new in asked]
        while engine.step():
            cache = engine._state.cache
            slots.append(max(s.k_BKSH.shape[3] for s in cache))
            assert [s.k_BKSH.shape for s in cache] == [s.k_BKSH.shape for s in empty_cache(model.config, 2, engine._slots)]
        first, last = slots.index(64), slots.index(32)
        assert first < last and slots[-1] == 64
        alone = generate(model, params, [prompt for prompt, _ in asked], 40, Sampling(0.0))
        for request, wanted, (_, new) in zip(requests, alone, asked, strict=True):
            assert request.completion.ids == wanted.ids[:new]
            assert request.completion.logprobs == pytest.approx(wanted.logprobs[:new], rel=1e-4, abs=1e-5)


def test_few_requests_run_in_few_rows_and_more_bring_the_others_back(params, alone):
    engine, widths = Engine(MODEL, params, rows=8), []
    requests = [engine.submit(*asked) for asked in REQUESTS[:6]]
    while engine.step():
        widths.append(len(engine._rows))
        if widths[-1] == 2 and len(requests) == 6:
            requests += [engine.submit(*asked) for asked in REQUESTS[6:]]
    assert [width for width, _ in itertools.groupby(widths)][:3] == [8, 2, 8]
    for request, wanted in zip(requests, alone, strict=True):
        check(request, wanted)


def test_what_cannot_be_done_is_refused_at_once(params):
    engine = Engine(MODEL, params, rows=1)
    for prompt, sampling, said in (
        ([], Sampling(), "empty"),
        ([BOS] * 64, Sampling(), "64"),
        ([BOS], Sampling(stop_ids=(300,)), "300"),
    ):
        with pytest.raises(RunError, match=said):
            engine.submit(prompt, 4, sampling)
    with pytest.raises(RunError, match="rows=0"):
        Engine(MODEL, params, rows=0)
    assert not engine.step()
