"""A training state is restored bit for bit, on another mesh too, and continues as if nothing had happened."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from gpt4o_jax import parallel
from gpt4o_jax.checkpoint.store import Store
from gpt4o_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt4o_jax.data.batches import Batch
from gpt4o_jax.model import gpt
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.run import load_params
from gpt4o_jax.training.checkpoints import restore_state, save_state
from gpt4o_jax.training.optimizer import OPTIMIZERS, eval_params, make_optimizer
from gpt4o_jax.training.state import create, state_shardings
from gpt4o_jax.training.step import make_step

B, T, V = 8, 8, 48
# Wide enough that Adafactor factors the feed-forward's moments, while the others stay whole.
MODEL = gpt.GPT(
    ModelConfig(vocab_size=V, context_length=T, n_layers=2, d_model=128, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=128),
    Compute("cpu", "float32"),
)


class Corpus:
    """What save_state records of the corpus."""

    name = "c"
    tokenizer = type("Tokenizer", (), {"digest": "t"})


def batches(steps: int) -> Batch:
    tokens = np.random.default_rng(0).integers(4, V, (steps, B, T + 1)).astype(np.int32)
    ones = np.ones((steps, B, T), np.int32)
    index = np.broadcast_to(np.arange(T, dtype=np.int32), ones.shape)
    return Batch(tokens[..., :-1], tokens[..., 1:], ones.astype(np.float32), index, ones)


def bits(tree) -> list[bytes]:
    numbers = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(numbers(x)).tobytes() for x in jax.tree.leaves(tree)]


class Training:
    """A step and where its state lies on one mesh."""

    def __init__(self, config: RunConfig, mesh):
        self.mesh, self.config = mesh, config
        with jax.set_mesh(mesh):
            axes = gpt.logical_axes(MODEL)
            optimizer = make_optimizer(config.optimizer, axes)
            fresh = functools.partial(create, functools.partial(gpt.init, MODEL), optimizer, ema=config.optimizer.ema_decay > 0)
            self.shapes = jax.eval_shape(fresh, jax.random.key(0))
            self.shardings = state_shardings(self.shapes, axes, mesh)
            self.start = jax.jit(fresh, out_shardings=self.shardings)
            step = make_step(MODEL, optimizer, config, 8, np.ones(V))
            rows = jax.sharding.NamedSharding(mesh, parallel.spec((None, "batch", "seq")))
            whole = jax.sharding.NamedSharding(mesh, jax.P())
            self._step = jax.jit(
                step, in_shardings=(self.shardings, rows), out_shardings=(self.shardings, whole), donate_argnums=0
            )

    def run(self, state, first: int, last: int):
        with jax.set_mesh(self.mesh):
            return self._step(state, jax.tree.map(lambda x: x[first:last], batches(8)))[0]

    def save(self, folder, state):
        with Store(folder) as store:
            save_state(store, int(state.step), state, eval_params(self.config.optimizer, state), Corpus)

    def restore(self, folder, step: int):
        with Store(folder) as store, jax.set_mesh(self.mesh):
            return restore_state(store, step, self.shapes, self.shardings), load_params(store, step, MODEL, self.mesh)


@pytest.mark.parametrize("name, ema_decay", [*((name, 0.0) for name in OPTIMIZERS), ("adamw", 0.9)])
def test_a_restored_state_goes_on_to_the_same_bits(tmp_path, name, ema_decay):
    config = RunConfig(
        model=MODEL.config,
        optimizer=OptimizerConfig(name=name, schedule="constant", warmup_steps=2, ema_decay=ema_decay),
        train=TrainConfig(batch_size=B),
    )
    training = Training(config, parallel.make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2]))
    with jax.set_mesh(training.mesh):
        state = training.run(training.start(jax.random.key(0)), 0, 3)
    folder = epath.Path(tmp_path)
    training.save(folder, state)
    before, average = bits(state), bits(eval_params(config.optimizer, state))
    restored, for_use = training.restore(folder, 3)
    assert bits(restored) == before and jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(for_use) == average, "what evaluation and sampling open is the average"
    assert (average == bits(state.params)) == (name != "schedule_free" and not ema_decay)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert a.sharding == b.sharding or a.ndim == 0
    elsewhere, _ = Training(config, parallel.make_mesh(devices=jax.devices()[:1])).restore(folder, 3)
    assert bits(elsewhere) == before
    assert bits(training.run(restored, 3, 6)) == bits(training.run(state, 3, 6))
