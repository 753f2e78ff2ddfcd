"""Multiple choice and the harness's three request types agree with brute force over the model's log-probabilities."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import ModelConfig, RunConfig
from gpt4o_jax.data.tokenizer import BOS, EOS, byte_tokenizer, train
from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.evaluation import choice
from gpt4o_jax.evaluation.continuations import encode_pair, rolling, score
from gpt4o_jax.evaluation.harness import Harness
from gpt4o_jax.model import gpt
from gpt4o_jax.ops.compute import Compute

TOKENIZER, LIMIT = byte_tokenizer(), 48
CONFIG = ModelConfig(vocab_size=288, context_length=LIMIT, n_layers=2, d_model=32, n_heads=2, compute_dtype="float32")
MODEL = gpt.GPT(CONFIG, Compute("cpu", "float32"))


@pytest.fixture(scope="module", autouse=True)
def params():
    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        # Larger weights than a fresh model's, so that texts differ clearly in probability.
        yield jax.tree.map(lambda x: 3 * x, gpt.init(MODEL, jax.random.key(0)))


@pytest.fixture(scope="module")
def logprobs(params):
    """ids -> [len(ids), V]: log-probabilities of the next token at each position, by one full pass at a fixed length."""

    @jax.jit
    def forward(tokens_BT):
        index_BT = jnp.arange(LIMIT)[None]
        hidden, _, _ = MODEL.apply({"params": params}, tokens_BT, index_BT, jnp.ones_like(index_BT))
        return jax.nn.log_softmax(gpt.unembed(MODEL, params, hidden), axis=-1)

    return lambda ids: np.asarray(forward(jnp.array([ids + [0] * (LIMIT - len(ids))]))[0, : len(ids)], np.float64)


def brute_force(logprobs, context, continuation):
    row = (context + continuation)[-(LIMIT + 1) :]
    said = logprobs(row[:-1])[-len(continuation) :]
    each = said[np.arange(len(continuation)), continuation]
    return each.sum(), (said.argmax(axis=-1) == continuation).all()


def greedy(logprobs, ids, n):
    """The n most probable tokens that a text may contain, or fewer up to <eos>."""
    out = []
    while len(out) < n:
        said = logprobs(ids + out)[-1]
        said[[i for i in range(32) if i != EOS]] = -np.inf
        if said.argmax() == EOS:
            break
        out.append(int(said.argmax()))
    return out


TEXTS = [
    ("", "ab"),
    ("x", "y"),
    ("The cat ", "sat on"),
    ("a  ", " b"),
    ("   ", "z"),
    ("long " * 30, "tail"),
    ("é", "ü"),
    ("q", "w" * 40),
]


def requests(*args):
    return [types.SimpleNamespace(args=a) for a in args]


@pytest.fixture(scope="module")
def harness(params):
    run = types.SimpleNamespace(model=MODEL, params=params, tokenizer=TOKENIZER, config=RunConfig(model=MODEL.config))
    return Harness(run, batch_size=3)


# ---------------------------------------------------------------- log-probabilities


def test_pairs_are_cut_where_the_context_ends_but_for_its_last_spaces():
    ids = lambda text: [32 + b for b in text.encode()]
    cut = {t: encode_pair(TOKENIZER, *t) for t in TEXTS}
    assert cut["", "ab"] == ([BOS], ids("ab")) and cut["   ", "z"] == ([BOS], ids("   z"))
    assert cut["The cat ", "sat on"] == ([BOS, *ids("The cat")], ids(" sat on"))


def test_a_token_across_the_end_of_a_context_counts_to_what_follows():
    tokenizer = train("bpe", 310, ["the cat " * 200])
    *before, cat = tokenizer.prompt("the cat")
    assert tokenizer.pieces[cat].strip() == b"cat"
    assert encode_pair(tokenizer, "the ca", "t") == (before, [cat])
    tokenizer.symbols = dataclasses.replace(tokenizer.symbols, prompts_begin=False)
    assert encode_pair(tokenizer, " ca", "t") == ([BOS], [cat]), (
        "where prompts do not begin with <bos>, it is before the only token"
    )


def test_an_empty_continuation_has_no_score():
    for context in ("", "The cat"):
        with pytest.raises(RunError, match="an empty continuation"):
            encode_pair(TOKENIZER, context, "")


def test_scores_are_those_of_brute_force_in_any_company(params, logprobs):
    pairs = [encode_pair(TOKENIZER, *t) for t in TEXTS]
    context = [BOS, *TOKENIZER.encode("go")]
    pairs.append((context, greedy(logprobs, context, 5)))  # the greedy continuation, and one with a less likely token
    pairs.append((context, [*pairs[-1][1][:-1], 32 + ord("#")]))
    wanted = [brute_force(logprobs, *p) for p in pairs]
    for batch_size, order in ((3, 1), (16, -1)):
        got = score(MODEL, params, pairs[::order], batch_size)[::order]
        np.testing.assert_allclose([g[0] for g in got], [w[0] for w in wanted], rtol=1e-5, atol=1e-5)
        assert [g[1] for g in got] == [w[1] for w in wanted]
    assert [g[1] for g in got[-2:]] == [True, False]


def test_a_continuation_that_cannot_be_scored_whole_is_refused(params):
    with pytest.raises(RunError, match=r"49 tokens does not fit model\.context_length=48"):
        score(MODEL, params, [([BOS], [40] * 49)])


@pytest.mark.parametrize("n", [0, 1, 5, 6, 7, 12, 13, 20])
def test_rolling_windows_score_each_token_once_after_as_much_as_fits(n):
    T, ids = 6, list(range(100, 100 + n))
    pairs = rolling(ids, 1, T)
    assert [i for _, continuation in pairs for i in continuation] == ids
    for context, continuation in pairs:
        whole = context + continuation
        assert whole == ([1, *ids])[ids.index(continuation[-1]) + 2 - len(whole) :][: len(whole)]
        assert len(whole) == min(T, ids.index(continuation[-1]) + 1) + 1


def test_the_harness_gets_what_brute_force_gets(harness, logprobs):
    got = harness.loglikelihood(requests(*TEXTS))
    wanted = [brute_force(logprobs, *encode_pair(TOKENIZER, *t)) for t in TEXTS]
    np.testing.assert_allclose([g[0] for g in got], [w[0] for w in wanted], rtol=1e-5, atol=1e-5)
    texts = ["", "a", "words " * 30]
    totals = [sum(brute_force(logprobs, *p)[0] for p in rolling(TOKENIZER.encode(t), BOS, LIMIT)) for t in texts]
    np.testing.assert_allclose(harness.loglikelihood_rolling(requests(*[(t,) for t in texts])), totals, rtol=1e-5)


def test_the_harness_generates_what_greedy_decoding_gives_up_to_a_stop(harness, logprobs):
    contexts = ["go", "The cat", "long " * 30, "x"]
    n = 10
    prompts = [[BOS, *TOKENIZER.encode(c)][-(LIMIT - n) :] for c in contexts]
    texts = [TOKENIZER.decode(greedy(logprobs, p, n)) for p in prompts]
    assert harness.generate_until(requests(*[(c, {"max_gen_toks": n}) for c in contexts])) == texts
    stops = [t[3:5] if len(t) > 5 else "never" for t in texts]
    asked = [
        (c, {"until": [s], "max_gen_toks": n, "do_sample": False, "temperature": 0.0})
        for c, s in zip(contexts, stops, strict=True)
    ]
    assert harness.generate_until(requests(*asked)) == [
        t[: t.find(s)] if s in t else t for t, s in zip(texts, stops, strict=True)
    ]
    with pytest.raises(RunError, match="wants 48 new tokens"):
        harness.generate_until(requests(("x", {"max_gen_toks": 48})))
    with pytest.raises(RunError, match=r"generation_kwargs\.num_beams=4"):
        harness.generate_until(requests(("x", {"num_beams": 4})))


def test_the_harness_draws_anew_in_every_batch(harness):
    """Otherwise a task that repeats a question would get the same answers."""
    asked = requests(*[("go", {"do_sample": True, "temperature": 5.0, "max_gen_toks": 8})] * 12)
    begin = lambda: Harness(harness.run, 3)
    texts = begin().generate_until(asked)
    assert len(set(texts)) > 9 and texts == begin().generate_until(asked)


# ---------------------------------------------------------------- multiple choice

QUESTIONS = [
    choice.Question(f"What is {i}?", (f"{i}", "a long answer, much longer", f"{i + 1}"[: 1 + i % 2]), i % 3) for i in range(7)
]


@pytest.mark.parametrize(("shots", "limit"), [(0, None), (1, 4)])
def test_choices_are_those_of_brute_force(params, logprobs, shots, limit):
    got = choice.evaluate(MODEL, params, TOKENIZER, QUESTIONS, shots, limit, seed=5)
    right, right_norm = [], []
    for n, q in enumerate(QUESTIONS[:limit]):
        text = choice.context(QUESTIONS, n, shots, 5)
        said = [brute_force(logprobs, *encode_pair(TOKENIZER, text, f" {c}"))[0] for c in q.choices]
        right.append(np.argmax(said) == q.answer)
        right_norm.append(np.argmax([s / len(c) for s, c in zip(said, q.choices, strict=True)]) == q.answer)
    assert got == {
        "accuracy": pytest.approx(np.mean(right)), "accuracy_norm": pytest.approx(np.mean(right_norm)),
        "chance": pytest.approx(1 / 3), "questions": limit or 7,
    }  # fmt: skip


def test_examples_are_other_questions_with_their_answers():
    for n in range(7):
        *solved, last = choice.context(QUESTIONS, n, 3, seed=0).split("\n\n")
        assert last == f"Question: What is {n}?\nAnswer:" and len({*solved}) == 3
        known = {f"Question: {q.question}\nAnswer: {q.choices[q.answer]}" for i, q in enumerate(QUESTIONS) if i != n}
        assert {*solved} <= known
    assert choice.context(QUESTIONS, 0, 3, seed=0) != choice.context(QUESTIONS, 0, 3, seed=1)


GOOD = {"question": "1+1?", "choices": ["1", "2"], "answer": 1}


def test_questions_are_read_from_jsonl(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "answer": 0}) + "\n")
    assert [q.answer for q in choice.read_questions(path)] == [1, 0]


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("{", ":2: expected a JSON object"),
        ("[]", ":2: expected a JSON object"),
        (json.dumps({**GOOD, "answer": 2}), ":2: answer is 2, expected a number from 0 to 1"),
        (json.dumps({**GOOD, "answer": "A"}), ":2: answer is 'A'"),
        (json.dumps({**GOOD, "choices": ["1"]}), ":2: expected question a text"),
        (json.dumps({**GOOD, "choices": ["1", "\ud800"]}), ":2: not valid Unicode: lone surrogate U+D800"),
        (json.dumps({**GOOD, "choices": ["1", ""]}), ":2: expected question a text"),
    ],
)
def test_bad_questions_are_told_by_line(tmp_path, line, fragment):
    path = tmp_path / "q.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(RunError) as e:
        choice.read_questions(path)
    assert e.value.code == ExitCode.DATA and f"{path}{fragment}" in str(e.value)


def test_too_few_questions_for_the_examples(params):
    with pytest.raises(RunError, match="--num_fewshot=7: expected fewer than there are questions"):
        choice.evaluate(MODEL, params, TOKENIZER, QUESTIONS, 7)
