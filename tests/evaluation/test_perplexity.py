"""Every target of a document is scored exactly once, with the context of its window; bytes are UTF-8 bytes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4o_jax.config import ModelConfig
from gpt4o_jax.data.token_cache import TokenCache
from gpt4o_jax.data.tokenizer import BOS, EOS, byte_tokenizer
from gpt4o_jax.errors import RunError
from gpt4o_jax.evaluation.perplexity import cached_documents, evaluate, text_document, windows
from gpt4o_jax.model import gpt
from gpt4o_jax.ops.compute import Compute

T = 8
TEXTS = ["naïve €5 fits", "x", "", "a much longer text, over several windows ☃", "eight..."]
TOKENIZER = byte_tokenizer()
DOCUMENTS = [text_document(text, TOKENIZER) for text in TEXTS]
SHAPE = dict(vocab_size=288, context_length=T, n_layers=1, d_model=16, n_heads=2)
MODEL = gpt.GPT(
    ModelConfig(**SHAPE, positions="learned", output_init="scaled", init_std=0.5, logit_softcap=3.0), Compute("cpu", "float32")
)


@pytest.fixture
def params(one_device):
    return jax.jit(functools.partial(gpt.init, MODEL))(jax.random.key(0))


def brute_force(params, stride):
    """Each target by a separate pass over the context of its window: (nats, how many ranked first, tokens)."""
    contexts, targets = [], []
    for ids in DOCUMENTS:
        for i in range(1, len(ids)):
            begin = next(b for b in range(0, i, stride) if i <= b + T)  # the first window that reaches it
            contexts.append(ids[begin:i])
            targets.append(ids[i])
    lengths = np.array([len(c) for c in contexts])
    tokens = np.stack([np.pad(c, (0, T - len(c))) for c in contexts])
    index = np.broadcast_to(np.arange(T), tokens.shape)
    hidden, _, _ = jax.jit(lambda *x: MODEL.apply({"params": params}, *x))(tokens, index, (index < lengths[:, None]).astype(int))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    logprobs = np.asarray(jax.nn.log_softmax(gpt.unembed(MODEL, params, last)[:, 0]), np.float64)
    nats = -logprobs[np.arange(len(targets)), targets].sum()
    return nats, int(np.sum(logprobs.argmax(axis=1) == targets)), len(targets)


@pytest.mark.parametrize("stride", [1, 3, 8, None])
def test_equals_brute_force(params, stride):
    nats, first, tokens = brute_force(params, stride or T // 2)
    got = evaluate(MODEL, params, DOCUMENTS, TOKENIZER, stride, batch_size=4, loss_chunk=5)
    text_bytes = sum(len(text.encode()) for text in TEXTS)
    assert (got["tokens"], got["bytes"]) == (tokens, text_bytes)
    assert got["accuracy"] == first / tokens
    np.testing.assert_allclose(got["loss"], nats / tokens, rtol=1e-5)
    np.testing.assert_allclose(got["perplexity"], math.exp(nats / tokens), rtol=1e-4)
    np.testing.assert_allclose(got["bits_per_byte"], nats / math.log(2) / text_bytes, rtol=1e-5)


def test_batch_size_changes_nothing(params):
    small, large = (evaluate(MODEL, params, DOCUMENTS, TOKENIZER, batch_size=b) for b in (1, 16))
    assert small.keys() == large.keys()
    for name in small:
        np.testing.assert_allclose(small[name], large[name], rtol=1e-6)


def test_max_tokens_reads_whole_documents_and_no_text_is_no_error(params):
    limited = evaluate(MODEL, params, DOCUMENTS, TOKENIZER, max_tokens=1)
    assert limited == evaluate(MODEL, params, DOCUMENTS[:1], TOKENIZER)
    empty = evaluate(MODEL, params, [], TOKENIZER)
    assert (empty["tokens"], empty["loss"], empty["bits_per_byte"]) == (0, 0, 0)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(2, 20), st.data())
def test_windows_cover_every_target_once(length, T, data):
    stride = data.draw(st.integers(1, T))
    ids = np.arange(100, 100 + length)
    scored = []
    for inputs, real, first in windows(ids, T, stride):
        assert inputs.shape == (T + 1,) and 2 <= real <= T + 1 and not inputs[real:].any()
        begin = inputs[0] - 100
        assert begin % stride == 0
        np.testing.assert_array_equal(inputs[:real], ids[begin : begin + real])
        for t in range(first, real - 1):  # input t has target t + 1
            scored.append(int(inputs[t + 1]))
            assert begin == 0 or t >= T - stride, "at least T - stride tokens before the input are in sight"
    assert scored == list(range(101, 100 + length))


def test_a_stride_beyond_the_window_is_refused(params):
    """It would skip targets and still count them."""
    with pytest.raises(RunError, match=r"stride=9 .*=8"):
        evaluate(MODEL, params, DOCUMENTS, TOKENIZER, stride=T + 1)


def test_cached_documents_are_ids_from_bos_on_without_eos():
    stream = np.array([BOS, 40, 41, EOS, BOS, EOS, BOS, 42, EOS], np.uint16)
    found = cached_documents(TokenCache(stream, np.array([0, 4, 6, 9]), 3), TOKENIZER)
    assert [d.tolist() for d in found] == [[BOS, 40, 41], [BOS], [BOS, 42]]
    answers = [0, 0, 1, 1, 0, 0, 0, 0, 0]  # the first <eos> ends an answer, so it is scored like those within a conversation
    found = cached_documents(TokenCache(stream, np.array([0, 4, 6, 9]), 3, np.array(answers, np.uint8)), TOKENIZER)
    assert [(d.tolist(), c.tolist()) for d, c in found][:2] == [([BOS, 40, 41, EOS], [0, 0, 1, 1]), ([BOS], [0])]
    np.testing.assert_array_equal(text_document("é", TOKENIZER), [BOS, 32 + 0xC3, 32 + 0xA9])
