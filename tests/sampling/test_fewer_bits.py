"""With weights and caches in fewer bits, a running batch and drafts give what generate() gives, dense or with experts."""

import dataclasses
import functools

import jax
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import ModelConfig
from gpt4o_jax.data.tokenizer import BOS
from gpt4o_jax.model import gpt
from gpt4o_jax.model.quantization import for_generation
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.sampling.engine import Engine
from gpt4o_jax.sampling.generate import generate
from gpt4o_jax.sampling.logits import Sampling
from gpt4o_jax.sampling.speculative import Draft

DENSE = ModelConfig(
    vocab_size=300, context_length=64, n_layers=2, d_model=32, n_heads=2, layer_pattern=("local", "global"), window=6,
    output_init="scaled", init_std=0.5, logit_softcap=3.0,
)  # fmt: skip
MODELS = {"dense": DENSE, "experts": dataclasses.replace(DENSE, n_experts=4, experts_per_token=2, expert_d_ff=32)}
GREEDY = Sampling(0.0)
PROMPTS = [[BOS, *range(260, 264), *range(260, 264)], [BOS, *range(260, 300)], [BOS]]
NEW = [20, 12, 17]


@pytest.mark.parametrize(
    ("kind", "weights", "kv_cache"),
    [("dense", "int4", "int8"), ("dense", "bfloat16", "bfloat16"), ("dense", "float32", "int8"), ("experts", "int8", "int8")],
)
def test_a_running_batch_and_drafts_write_what_each_prompt_gives_alone(kind, weights, kv_cache):
    model = gpt.GPT(MODELS[kind], Compute("cpu", "float32"))
    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        params = jax.jit(functools.partial(gpt.init, model))(jax.random.key(1))
        model, params = for_generation(model, params, weights, kv_cache, rows=2)
        alone = [generate(model, params, [p], max(NEW), GREEDY)[0].ids[:n] for p, n in zip(PROMPTS, NEW, strict=True)]
        engine = Engine(model, params, rows=2)
        requests = [engine.submit(p, n, GREEDY) for p, n in zip(PROMPTS, NEW, strict=True)]
        engine.run()
        drafted = generate(model, params, PROMPTS[:1], NEW[0], GREEDY, draft=Draft(3))[0].ids
    assert [r.completion.ids for r in requests] == alone and len(set(alone[0])) > 1
    assert drafted == alone[0]
