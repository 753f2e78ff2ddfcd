"""What weights and caches in fewer bits cost, on text of the model's own.

Of text that a model drew itself no other model has a lower loss on average: what rounding adds is how far it went from there
(the Kullback-Leibler divergence), and not luck.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import ModelConfig
from gpt4o_jax.data.tokenizer import BOS, byte_tokenizer
from gpt4o_jax.evaluation.perplexity import evaluate
from gpt4o_jax.model import gpt
from gpt4o_jax.model.quantization import for_generation
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.sampling.generate import generate

T = 80  # more than one chunk of a cache, and no whole number of them
TOKENIZER = byte_tokenizer()
DENSE = ModelConfig(
    vocab_size=288, context_length=T, n_layers=2, d_model=32, n_heads=2, output_init="scaled", init_std=0.3, tied=True
)
SHAPES = {
    "dense": DENSE,
    "windows": dataclasses.replace(DENSE, layer_pattern=("local", "global"), window=20, positions="learned", n_kv_heads=1),
    "mixture of experts": dataclasses.replace(DENSE, n_experts=4, experts_per_token=2, expert_d_ff=48, mlp="swiglu"),
}


@pytest.fixture(scope="module", params=SHAPES)
def scored(request):
    """(the model's loss on its own text, scores of it in other numbers)."""
    model = gpt.GPT(SHAPES[request.param], Compute("cpu", "float32"))
    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        params = jax.jit(functools.partial(gpt.init, model))(jax.random.key(0))
        drawn = generate(model, params, [[BOS]], T, num_samples=24)
        documents = [np.array([BOS, *c.ids], np.int32) for c in drawn]

        def score(model, params, **how):
            return evaluate(model, params, documents, TOKENIZER, T, batch_size=12, **how)

        yield (
            score(model, params),
            lambda **kinds: score(*for_generation(model, params, **kinds), through_cache="kv_cache" in kinds),
        )


def test_through_the_cache_in_float32_it_is_the_full_pass(scored):
    plain, again = scored
    assert plain["tokens"] > 1000
    got = again(kv_cache="float32")
    assert (got["tokens"], got["accuracy"]) == (plain["tokens"], plain["accuracy"])
    np.testing.assert_allclose(got["loss"], plain["loss"], rtol=1e-5)


def test_fewer_bits_cost_little_and_fewer_yet_more(scored):
    plain, again = scored
    kinds = [dict(kv_cache="int8"), dict(weights="int8"), dict(weights="int4"), dict(weights="int4", kv_cache="int8")]
    added = [again(**kind)["loss"] - plain["loss"] for kind in kinds]
    assert max(map(abs, added[:2])) < 0.01 and min(added[2:]) > 0.05 and max(added[2:]) < 0.3
