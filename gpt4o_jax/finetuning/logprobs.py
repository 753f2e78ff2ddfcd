"""Log-probabilities of a batch's target tokens, for DPO and GRPO.

B rows, T positions
"""

import functools

import jax

from gpt4o_jax.config import TrainConfig
from gpt4o_jax.data.batches import Batch
from gpt4o_jax.model.gpt import GPT
from gpt4o_jax.model.vocabulary import head_scores
from gpt4o_jax.training.step import expert_losses


def token_logprobs(model: GPT, params, batch: Batch, chunk: int, key: jax.Array | None = None) -> jax.Array:
    """Log-probability in nats of each target given the earlier tokens of its segment, [B, T], float32. key: enables dropout.

    Logits exist for `chunk` positions of a row at a time, in the backward pass too.
    """
    return _forward(model, params, batch, chunk, key)[0]


def learned_logprobs(model: GPT, params, batch: Batch, t: TrainConfig, key: jax.Array | None):
    """(token_logprobs; auxiliary losses of mixtures of experts, to add to the loss; their parts by name). As in `loss_sum`."""
    logp_BT, aux = _forward(model, params, batch, t.loss_chunk, key)
    if "routings" not in aux:
        return logp_BT, 0.0, {}
    return logp_BT, *expert_losses(aux["routings"], batch, t.balance_loss, t.router_z_loss)


def _forward(model: GPT, params, batch: Batch, chunk: int, key: jax.Array | None):
    train = key is not None and model.config.dropout > 0
    inputs = (batch.tokens, batch.positions, batch.segments)
    hidden_BTD, _, aux = model.apply({"params": params}, *inputs, train=train, rngs={"dropout": key} if train else {})
    return -head_scores(model.config, model.compute, params, hidden_BTD, batch.targets, chunk)[0], aux


@functools.lru_cache(maxsize=4)
def scorer(model: GPT, chunk: int):
    """Jitted token_logprobs without dropout: (params, Batch [B, T]) -> [B, T]."""
    return jax.jit(lambda params, batch: token_logprobs(model, params, batch, chunk))
