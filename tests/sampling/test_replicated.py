"""Every array read on the host must be fully replicated, so that any process can read it, however rows are split."""

import functools

import jax
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import MeshConfig, ModelConfig
from gpt4o_jax.data.tokenizer import BOS, RESERVED
from gpt4o_jax.model import gpt
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.sampling.beam import beam_search
from gpt4o_jax.sampling.engine import Engine
from gpt4o_jax.sampling.generate import generate
from gpt4o_jax.sampling.logits import Sampling
from gpt4o_jax.sampling.speculative import Draft

MODEL = gpt.GPT(
    ModelConfig(vocab_size=RESERVED + 8, context_length=32, n_layers=1, d_model=16, n_heads=2, output_init="scaled"),
    Compute("cpu", "float32"),
)
PROMPTS = [[BOS, 33, 34], [BOS, 35], [BOS, 36, 37, 38], [BOS, 39]]  # a number of rows that a mesh of two shards would split


def generated(params, **how) -> list[list[int]]:
    return [c.ids for c in generate(MODEL, params, PROMPTS, 20, **how)]


def continuous(params) -> list[list[int]]:
    engine = Engine(MODEL, params, rows=2)
    requests = [engine.submit(prompt, 10) for prompt in PROMPTS]
    engine.run()
    return [r.completion.ids for r in requests]


WAYS = {
    "greedy": lambda params: generated(params, sampling=Sampling(0.0)),
    "samples": lambda params: generated(params, sampling=Sampling(top_logprobs=2, repetition_penalty=1.1), num_samples=2),
    "look-up": lambda params: generated(params, draft=Draft(3)),
    "draft": lambda params: generated(params, draft=Draft(3, MODEL, params)),
    "engine": continuous,
    "beams": lambda params: [h.ids for found in beam_search(MODEL, params, PROMPTS, 6, beams=2) for h in found],
}


@pytest.mark.parametrize("axis", ["data", "fsdp"])
@pytest.mark.parametrize("way", WAYS)
def test_every_process_could_read_what_comes_back(monkeypatch, way, axis):
    fetch, fetched = jax.device_get, []
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.extend(jax.tree.leaves(tree)) or fetch(tree))
    mesh = parallel.make_mesh(MeshConfig(**({"data": 1} | {axis: 2})), jax.devices()[:2])
    with jax.set_mesh(mesh):
        placed = parallel.shardings(gpt.logical_axes(MODEL), mesh)
        params = jax.jit(functools.partial(gpt.init, MODEL), out_shardings=placed)(jax.random.key(0))
        assert WAYS[way](params)
    assert fetched and all(len(x.sharding.device_set) == 2 and x.is_fully_replicated for x in fetched)
