"""The position-wise feed-forward. B batch, T positions, D model width, F hidden width."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt4o_jax.config import ModelConfig
from gpt4o_jax.model.layers import normal, param
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.products import product
from gpt4o_jax.parallel import constrain


class MLP(nn.Module):
    """gelu (exact, with erf), relu, relu2 (Primer, arXiv:2109.08668) or swiglu (arXiv:2002.05202)."""

    config: ModelConfig
    compute: Compute
    output_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x_BTD: jax.Array, train: bool) -> jax.Array:
        c = self.config
        D, F = c.d_model, c.ff_width
        up_BTF = self._in("up", x_BTD, D, F)
        if c.mlp == "swiglu":
            hidden_BTF = nn.silu(self._in("gate", x_BTD, D, F)) * up_BTF
        elif c.mlp == "relu2":
            hidden_BTF = jnp.square(nn.relu(up_BTF))
        else:
            hidden_BTF = nn.relu(up_BTF) if c.mlp == "relu" else nn.gelu(up_BTF, approximate=False)
        hidden_BTF = constrain(hidden_BTF, "batch", "seq", "mlp")
        down_FD = param(self, "down", self.output_init, (F, D), ("mlp", "embed"))
        y_BTD = product("BTF,FD->BTD", hidden_BTF, down_FD, self.compute)
        if c.bias:
            y_BTD += param(self, "down_bias", nn.initializers.zeros, (D,), ("embed",))
        return nn.Dropout(c.dropout, deterministic=not train)(y_BTD)

    def _in(self, name: str, x_BTD: jax.Array, D: int, F: int) -> jax.Array:
        w_DF = param(self, name, normal(self.config.init_std), (D, F), ("embed", "mlp"))
        y_BTF = product("BTD,DF->BTF", x_BTD, w_DF, self.compute)
        if self.config.bias:
            y_BTF += param(self, f"{name}_bias", nn.initializers.zeros, (F,), ("mlp",))
        return y_BTF
