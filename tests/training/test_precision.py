"""compute_dtype=float32 holds on GPUs and TPUs, whose default precision rounds float32 operands: read from programs for them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import freeze
from gpt4o_jax.data.batches import Batch
from gpt4o_jax.model import gpt
from gpt4o_jax.model.cache import empty_cache
from gpt4o_jax.model.quantization import for_generation
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.training.program import build
from gpt4o_jax.training.step import make_step

V, T, B = 64, 128, 4
SIZES = {"model.vocab_size": V, "model.context_length": T, "model.d_model": 32, "model.n_layers": 2, "train.batch_size": B}
MODELS = {
    "dense": {},
    "muon": {"optimizer.name": "muon"},
    "experts": {"model.n_experts": 4, "model.n_shared_experts": 1},
    "adapters": {"model.n_experts": 4, "lora.rank": 2, "init.from": "x"},
    "heads ahead": {"model.mtp_heads": 1, "model.tied": True, "model.bias": True, "model.norm": "layer"},
    "ring": {"mesh.context": 2, "mesh.data": 1},
}


def products(lowered) -> list[tuple[str, bool]]:
    """(whole line, whether it multiplies in float32) of each product of floating-point operands in a lowered program."""
    lines = [line for line in lowered.as_text().splitlines() if re.search(r"stablehlo\.dot_general|chlo\.ragged_dot", line)]
    return [(line, line.count("HIGHEST") == 2) for line in lines]


def for_platform(monkeypatch, platform: str, dtype: str):
    monkeypatch.setattr(Compute, "on", classmethod(lambda cls, mesh, dtype, packed=True: cls(platform, dtype, packed=packed)))


def lowered_step(monkeypatch, platform: str, dtype: str, knobs: dict):
    for_platform(monkeypatch, platform, dtype)
    config = freeze(SIZES | {"model.compute_dtype": dtype} | knobs)
    mesh = parallel.make_mesh(config.mesh, jax.devices()[: max(config.mesh.context, 1)])
    program = build(config, mesh)
    ints, floats = (jax.ShapeDtypeStruct((1, B, T), dtype) for dtype in (jnp.int32, jnp.float32))
    with jax.set_mesh(mesh):
        step = make_step(program.model, program.optimizer, config, 10, np.ones(V))
        traced = jax.jit(step).trace(program.shapes, Batch(ints, ints, floats, ints, ints))
        return traced.lower(lowering_platforms=({"gpu": "cuda"}.get(platform, platform),))


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("name", MODELS)
def test_no_product_of_a_float32_step_is_rounded(monkeypatch, name, platform):
    found = products(lowered_step(monkeypatch, platform, "float32", MODELS[name]))
    assert len(found) > 10
    assert [line for line, exact in found if not exact] == []


def test_bfloat16_products_keep_the_default():
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = products(lowered_step(monkeypatch, "tpu", "bfloat16", {"model.attention": "reference"}))
    assert len(found) > 10 and not any(exact for _, exact in found)


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_no_product_of_a_float32_pass_with_a_cache_is_rounded(monkeypatch, one_device, weights):
    model = gpt.GPT(freeze(SIZES | {"model.n_experts": 4}).model, Compute("gpu", "float32"))

    def step(params, tokens):
        ready, params = for_generation(model, params, weights, "float32", B)
        cache = empty_cache(ready.config, B, T, ready.compute.kv_cache)
        hidden, cache, _ = ready.apply({"params": params}, tokens, tokens * 0, tokens * 0 + 1, cache)
        return gpt.unembed(ready, params, hidden), cache

    traced = jax.jit(step).trace(gpt.shapes(model), jax.ShapeDtypeStruct((B, 1), jnp.int32))
    found = products(traced.lower(lowering_platforms=("cuda",)))
    assert len(found) >= 8
    assert [line for line, exact in found if not exact] == []
