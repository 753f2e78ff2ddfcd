"""Checkpoints of a TrainState."""

import jax
import jax.numpy as jnp
from etils import epath

from gpt4o_jax.checkpoint.store import Store
from gpt4o_jax.console import say
from gpt4o_jax.data.corpus import Corpus
from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.training.state import TrainState


def newest_step(store: Store, workdir: epath.Path) -> int | None:
    """The step to resume from, after removing what a killed process left behind; None: a fresh run."""
    store.clean()
    had_checkpoints = bool(store.steps()) or store.has_corrupt()  # corrupt ones were set aside, now or before
    start = store.newest_intact(say)
    if start is None and had_checkpoints:
        raise RunError(f"{workdir}: no checkpoint of this run is intact; remove the folder to start again", ExitCode.DATA)
    return start


def save_state(store: Store, step: int, state: TrainState, averaged, corpus: Corpus, kept: dict | None = None) -> None:
    """Saves the trained part of the state as separately restorable items. averaged: the weights for evaluation (eval_params)."""
    items = {"params": state.params, "opt_state": state.opt_state, "counters": _counters(state)}
    if averaged is not state.params:
        items["ema"] = averaged
    store.save(step, items, {"step": step, "corpus": corpus.name, "tokenizer": corpus.tokenizer.digest, **(kept or {})})


def restore_state(store: Store, step: int, shapes: TrainState, shardings: TrainState) -> TrainState:
    """Restores what `save_state` saved, each device reading only its shards; LoRA's `base` stays None.

    Raises RunError if the checkpoint has other leaves, shapes or dtypes.
    """
    like = _with_shardings(shapes, shardings)
    like = like.replace(rng=jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=shardings.rng))
    counters = store.restore(step, "counters", _counters(like, wrap=False))
    return TrainState(
        step=counters["step"],
        params=store.restore(step, "params", like.params),
        opt_state=store.restore(step, "opt_state", like.opt_state),
        ema=None if like.ema is None else store.restore(step, "ema", like.ema),
        rng=jax.random.wrap_key_data(counters["rng"]),
        skipped_steps=counters["skipped_steps"],
        skipped_in_a_row=counters["skipped_in_a_row"],
    )


def _counters(state: TrainState, wrap: bool = True) -> dict:
    names = ("step", "skipped_steps", "skipped_in_a_row")
    return {n: getattr(state, n) for n in names} | {"rng": jax.random.key_data(state.rng) if wrap else state.rng}


def _with_shardings(shapes, shardings):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
