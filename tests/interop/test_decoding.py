"""Whole models of each family, not single knobs: decoding through a cache in fewer bits equals one call on the whole text.

test_fixtures.py compares generation through a float32 cache, for every case.

B batch, T positions
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.model import gpt
from gpt4o_jax.model.cache import empty_cache
from tests.interop.conftest import FIXTURES, load, logits
from tests.model.test_cache import TOLERANCE
from tests.rounding import next_larger

LONG = 96  # tokens in a row; the windows' rings have 32 slots and wrap around twice
PROMPTS = np.array([40, 17], np.int32)  # one longer, one shorter than a ring
# Windows in some or all layers, soft-caps, sandwich and post-norms, QK-norm per head and over the projection, experts.
FAMILIES = (
    "gpt2-plain", "llama-gqa", "mistral-window", "qwen2-window", "qwen3-window", "olmo2-gqa", "gemma2-four", "gemma3_text-plain",
    "mixtral-window", "qwen3_moe-window",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_and_decode_give_what_one_call_gives(name, kind):
    """Rounding may change a router's choice, so mixtures are only compared with one call through the same cache."""
    in_pieces, from_float32, rounding = distances(name, kind)
    assert in_pieces <= max(1e-4, rounding)
    assert "moe" in name or "mixtral" in name or from_float32 <= TOLERANCE[kind]


def distances(name: str, kind: str) -> tuple[float, float, float]:
    """Distances: (prompts and single tokens to one call on the text, both through this cache; that call to no cache; rounding).

    Each is the largest difference of logits over the largest logit. rounding: the one call, to that of six models with parameters
    a rounding away; 0 except for int8. A number halfway between two int8 codes may switch to the other one, both then and when
    the text comes in pieces, which moves logits by more than 1e-4 (one such code of qwen3-tied: by 3.65e-4 in both cases).
    """
    model, params, _ = load(FIXTURES / name)
    tokens_BT = np.load(FIXTURES / name / "expected.npz")["tokens"].astype(np.int32)
    full = logits(model, params, np.concatenate([tokens_BT, tokens_BT[:1]]), [512, 300, 512])[:2, :LONG]  # as in test_fixtures
    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        run = _calls(model, kind)
        whole, prefilled, decoded = jax.device_get(run(params, tokens_BT[:, :LONG]))
        rounded = [run(next_larger(params, seed), tokens_BT[:, :LONG])[0] for seed in range(6 if kind == "int8" else 0)]
    largest, far = np.abs(full).max(), []
    for row, n in enumerate(PROMPTS):
        far += [np.abs(prefilled[row, :n] - whole[row, :n]).max(), np.abs(decoded[row, : LONG - n] - whole[row, n:]).max()]
    rounding = max([np.abs(other - whole).max() for other in jax.device_get(rounded)], default=0.0)
    return max(far) / largest, np.abs(whole - full).max() / largest, rounding / largest


def _calls(model, kind: str):
    """Jitted: (params, tokens [B, LONG]) -> logits of one call, of PROMPTS, and of the tokens after them, one at a time."""

    def call(params, cache, tokens_BT, positions_BT, valid_BT):
        valid_BT = valid_BT.astype(jnp.int32)
        hidden_BTD, cache, _ = model.apply({"params": params}, tokens_BT, positions_BT, valid_BT, cache)
        return cache, gpt.unembed(model, params, hidden_BTD)

    @jax.jit
    def run(params, tokens_BT):
        empty, index_1T, n_B1 = empty_cache(model.config, 2, LONG, kind), jnp.arange(LONG)[None], PROMPTS[:, None]
        index_BT = jnp.broadcast_to(index_1T, tokens_BT.shape)
        _, whole = call(params, empty, tokens_BT, index_BT, index_BT >= 0)
        first = np.s_[:, : PROMPTS.max()]
        cache, prefilled = call(params, empty, tokens_BT[first], index_BT[first], (index_BT < n_B1)[first])

        def one(cache, i):
            at_B1 = jnp.minimum(n_B1 + i, LONG - 1)
            token_B1 = jnp.take_along_axis(tokens_BT, at_B1, axis=1)
            cache, logits_B1V = call(params, cache, token_B1, at_B1, n_B1 + i < LONG)
            return cache, logits_B1V[:, 0]

        _, decoded = jax.lax.scan(one, cache, jnp.arange(LONG - PROMPTS.min()))
        return whole, prefilled, jnp.moveaxis(decoded, 0, 1)

    return run
