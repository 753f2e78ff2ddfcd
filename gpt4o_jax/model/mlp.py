"""The position-wise feed-forward. B batch, T positions, D model width, F hidden width."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt4o_jax.config import ModelConfig
from gpt4o_jax.model.layers import normal, param
from gpt4o_jax.ops import keep
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.products import product
from gpt4o_jax.ops.sums import add_bias
from gpt4o_jax.parallel import constrain

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),  # with erf
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),  # as in GPT-2
    "relu": nn.relu,
    "relu2": lambda x: jnp.square(nn.relu(x)),  # Primer, arXiv:2109.08668
    "swiglu": nn.silu,  # gated, arXiv:2002.05202
    "geglu": functools.partial(nn.gelu, approximate=True),  # gated, as in Gemma
}


class MLP(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) if gated. [B, T, D] -> [B, T, D]."""

    config: ModelConfig
    compute: Compute
    output_init: nn.initializers.Initializer
    width: int | None = None  # F; None: config.ff_width

    @nn.compact
    def __call__(self, x_BTD: jax.Array, train: bool) -> jax.Array:
        c = self.config
        D, F = c.d_model, self.width or c.ff_width
        up_BTF = self._in("up", x_BTD, D, F)
        activation = ACTIVATIONS[c.mlp]
        hidden_BTF = activation(self._in("gate", x_BTD, D, F)) * up_BTF if c.gated else activation(up_BTF)
        hidden_BTF = constrain(hidden_BTF, "batch", "seq", "mlp")
        down_FD = param(self, "down", self.output_init, (F, D), ("mlp", "embed"))
        y_BTD = product("BTF,FD->BTD", hidden_BTF, down_FD, self.compute)
        if c.bias:
            y_BTD = add_bias(y_BTD, param(self, "down_bias", nn.initializers.zeros, (D,), ("embed",)))
        return nn.Dropout(c.dropout, deterministic=not train)(y_BTD)

    def _in(self, name: str, x_BTD: jax.Array, D: int, F: int) -> jax.Array:
        w_DF = param(self, name, normal(self.config.hidden_std), (D, F), ("embed", "mlp"))
        y_BTF = checkpoint_name(product("BTD,DF->BTF", x_BTD, w_DF, self.compute), keep.MLP_HIDDEN)
        if self.config.bias:
            y_BTF = add_bias(y_BTF, param(self, f"{name}_bias", nn.initializers.zeros, (F,), ("mlp",)))
        return y_BTF
