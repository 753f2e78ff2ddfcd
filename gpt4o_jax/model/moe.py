"""A mixture of experts in place of a feed-forward, and its load balancing.

B batch, T positions, D model width, F hidden width of an expert, E experts, k experts per token
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt4o_jax.config import ModelConfig
from gpt4o_jax.model.layers import normal, param
from gpt4o_jax.model.mlp import ACTIVATIONS, MLP
from gpt4o_jax.model.vocabulary import layout
from gpt4o_jax.ops import experts as ops
from gpt4o_jax.ops.adapted import Adapted
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.weights import Weight
from gpt4o_jax.parallel import experts as exchange
from gpt4o_jax.parallel import gathered, mesh_axes, per_shard

INTO, OUT = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")  # axes of the experts' matrices


class Routing(NamedTuple):
    """Sums over the tokens of a batch, without padding."""

    tokens_E: jax.Array  # number sent to each expert
    probability_E: jax.Array  # of each expert, 1 per token in total
    squared_z: jax.Array  # squared log-normaliser of the router logits


class Experts(nn.Module):
    """Weighted sum of the k experts that the router chooses for a token, plus the shared experts, which process every token."""

    config: ModelConfig
    compute: Compute
    output_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x_BTD: jax.Array, segments_BT: jax.Array, train: bool) -> tuple[jax.Array, Routing]:
        c = self.config
        D, F, E = c.d_model, c.expert_width, c.n_experts
        init = normal(c.hidden_std)
        router_DE = param(self, "router", init, (D, E), ("embed", "expert"))
        gate_EDF = param(self, "gate", init, (E, D, F), INTO) if c.gated else None
        up_EDF = param(self, "up", init, (E, D, F), INTO)
        down_EFD = param(self, "down", self.output_init, (E, F, D), OUT)
        balance_E = param(self, "balance", nn.initializers.zeros, (E,), ("expert",)) if c.router_bias else None

        weights = (router_DE, balance_E, gate_EDF, up_EDF, down_EFD)
        y_BTD, routing = _mixture(c, self.compute, x_BTD, segments_BT > 0, *weights)
        y_BTD = nn.Dropout(c.dropout, deterministic=not train)(y_BTD)
        if c.n_shared_experts:
            y_BTD += MLP(c, self.compute, self.output_init, c.n_shared_experts * F, name="shared")(x_BTD, train)
        return y_BTD, routing


def _mixture(c: ModelConfig, compute: Compute, x_BTD, real_BT, *weights) -> tuple[jax.Array, Routing]:
    if jax.sharding.get_abstract_mesh().size == 1 or isinstance(weights[-1], Weight):
        return _routed(c, compute, ops.experts, x_BTD, real_BT, *weights)
    tokens, between = layout(real_BT)
    local = functools.partial(_among_devices, c, compute, mesh_axes(*tokens), between != tokens)
    parts = [(*tokens, None), tokens, ("embed", "expert"), ("expert",)]
    parts += [_named(w, names) for w, names in zip(weights[2:], (INTO, INTO, OUT), strict=True)]
    return per_shard(local, parts, [(*between, None), ()])(x_BTD, real_BT, *weights)


def _among_devices(c, compute, axes, scatter, x_BTD, real_BT, router_DE, balance_E, gate_EDF, up_EDF, down_EFD):
    """`_routed` on one device with its shards of the weights; `scatter` splits T over "tensor"; Routing is summed over `axes`."""
    router_DE = gathered(gathered(router_DE, "fsdp", 0), "expert", 1)
    balance_E = None if balance_E is None else gathered(balance_E, "expert", 0)
    gate_EDF = None if gate_EDF is None else _whole(gate_EDF, INTO, compute)
    up_EDF, down_EFD = _whole(up_EDF, INTO, compute), _whole(down_EFD, OUT, compute)
    experts = ops.experts if jax.lax.axis_size("expert") == 1 else exchange.experts
    y_BTD, routing = _routed(c, compute, experts, x_BTD, real_BT, router_DE, balance_E, gate_EDF, up_EDF, down_EFD)
    add_up = functools.partial(jax.lax.psum_scatter, scatter_dimension=1, tiled=True) if scatter else jax.lax.psum
    return add_up(y_BTD, "tensor"), jax.lax.psum(routing, axes)


def _named(w, names: tuple[str, ...]):
    """Axis names for every array of w."""
    if not isinstance(w, Adapted):
        return names
    return dataclasses.replace(w, base=names, A=(*names[:2], "rank"), B=(names[0], "rank", names[2]))


def _whole(w, names: tuple[str, ...], compute):
    """This device's part of w, joined with those of the others along "fsdp"."""
    join = lambda part, names: gathered(part, "fsdp", names.index("embed"), compute.operand) if "embed" in names else part
    return jax.tree.map(join, w, _named(w, names))


def _routed(c, compute, experts, x_BTD, real_BT, router_DE, balance_E, *weights):
    """(weighted sum of the chosen experts, computed by `experts`, [B, T, D]; Routing of these tokens)."""
    B, T, D = x_BTD.shape
    x_MD, real_M = x_BTD.reshape(B * T, D), real_BT.reshape(B * T).astype(jnp.float32)
    # In float32 throughout: rounding errors of the router change where tokens go.
    logits_ME = jnp.dot(x_MD, router_DE, precision=jax.lax.Precision.HIGHEST)
    scores_ME = ops.SCORES[c.router_scores](logits_ME)
    chosen_Mk, gates_Mk = ops.choose(scores_ME, c.experts_per_token, c.router_normalise, balance_E)
    apply = lambda *rows: experts(*rows, *weights, ACTIVATIONS[c.mlp], compute)
    y_MD = ops.in_chunks(apply, c.expert_chunk, x_MD, chosen_Mk, gates_Mk)

    share_ME = scores_ME / jnp.sum(scores_ME, axis=-1, keepdims=True)
    routing = Routing(
        tokens_E=jnp.sum(real_M[:, None, None] * jax.nn.one_hot(chosen_Mk, c.n_experts), axis=(0, 1)),
        probability_E=jnp.sum(real_M[:, None] * share_ME, axis=0),
        squared_z=jnp.sum(real_M * jax.nn.logsumexp(logits_ME, axis=-1) ** 2),
    )
    return y_MD.reshape(B, T, D), routing


# ---------------------------------------------------------------- losses, metrics and balancing


def _mixtures(routings: dict) -> Routing:
    """One Routing for all mixtures of a model, their arrays concatenated along the layers axis."""
    leaves = jax.tree.leaves(routings, is_leaf=lambda x: isinstance(x, Routing))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *leaves)


def losses(routings: dict) -> tuple[jax.Array, jax.Array]:
    """(load-balancing loss, router z-loss), means over tokens and mixtures.

    The first is Switch's E sum_e f_e P_e (arXiv:2101.03961), f_e being an expert's share of assignments and P_e of probability: 1
    if both are even. The second is the squared log-normaliser of the logits (ST-MoE, arXiv:2202.08906).
    """
    r = _mixtures(routings)
    tokens_L = jnp.maximum(jnp.sum(r.probability_E, axis=-1), 1)
    share_LE = r.tokens_E / jnp.maximum(jnp.sum(r.tokens_E, axis=-1, keepdims=True), 1)
    balance_L = r.tokens_E.shape[-1] * jnp.sum(share_LE * r.probability_E, axis=-1) / tokens_L
    return jnp.mean(balance_L), jnp.mean(r.squared_z / tokens_L)


def load(routings: dict) -> dict:
    """tokens_E of every mixture, nested like the parameters: {"layers": {"moe": [L, E]}}."""
    return jax.tree.map(lambda r: r.tokens_E, routings, is_leaf=lambda x: isinstance(x, Routing))


def load_metrics(load: dict) -> dict[str, jax.Array]:
    """How even the load is, averaged over mixtures."""
    tokens_LE = jnp.concatenate(jax.tree.leaves(load))
    share_LE = tokens_LE / jnp.maximum(jnp.sum(tokens_LE, axis=-1, keepdims=True), 1)
    E = tokens_LE.shape[-1]
    entropy_L = -jnp.sum(jax.scipy.special.xlogy(share_LE, share_LE), axis=-1)
    return {
        "expert_load_max": jnp.mean(jnp.max(share_LE, axis=-1) * E),  # in units of the mean load; 1: even
        "expert_load_entropy": jnp.mean(entropy_L) / jnp.log(max(E, 2)),  # 1: even; 0: a single expert
        "experts_dead": jnp.mean(tokens_LE == 0),  # share of experts without a token
    }


def rebalanced(new: dict, old: dict, load: dict, rate: float) -> dict:
    """Parameters `new`, but each router's bias is that of `old`, moved by `rate` towards an even load (arXiv:2408.15664).

    Biases of experts with less than the mean load rise, the others' sink; the optimizer's own change of the bias is discarded.
    """
    if isinstance(load, dict):
        return new | {name: rebalanced(new[name], old[name], part, rate) for name, part in load.items()}
    missing_LE = jnp.mean(load, axis=-1, keepdims=True) - load
    return new | {"balance": old["balance"] + rate * jnp.sign(missing_LE)}
