"""Adapters of low rank: which weights get one, how they start, how they stand beside the weights and are added to them.

Source: LoRA, Hu et al. 2021, arXiv:2106.09685.

Adapters are a tree like the parameters, with {"A": ..., "B": ...} in the place of each weight that has one, and without the
others. A [..., *summed, r] and B [..., r, *outputs] lead with layers and experts as their weight does.
"""

import fnmatch
import functools
import math

import jax
import jax.numpy as jnp
from flax import traverse_util

from gpt4o_jax.config_finetune import LoraConfig
from gpt4o_jax.errors import RunError
from gpt4o_jax.model.matrices import Matrix, hidden_matrix
from gpt4o_jax.ops.adapted import Adapted, change


def adaptable(axes: dict) -> dict[str, Matrix]:
    """The weights that can have an adapter, by path: hidden matrices, but for routers, whose products are exact.

    axes: model.gpt.logical_axes.
    """
    flat = traverse_util.flatten_dict(axes, sep="/")
    found = {path: hidden_matrix(names) for path, names in flat.items() if names[-1] != "expert"}
    return {path: matrix for path, matrix in found.items() if matrix}


def chosen(c: LoraConfig, axes: dict) -> dict[str, Matrix]:
    """Those that get one. Raises RunError where a pattern matches none."""
    able = adaptable(axes)
    for pattern in c.targets:
        if not fnmatch.filter(able, pattern):
            raise RunError(
                f"config.lora.targets: {pattern!r} matches no weight that can have an adapter; expected patterns such as '*' on"
                f" {', '.join(able)}"
            )
    return {path: matrix for path, matrix in able.items() if any(fnmatch.fnmatchcase(path, p) for p in c.targets)}


def logical_axes(c: LoraConfig, axes: dict) -> dict:
    """For every adapter the names of its axes; axes: those of the model. Raises RunError as `chosen` does."""
    flat, made = traverse_util.flatten_dict(axes, sep="/"), {}
    for path, (rows, columns) in chosen(c, axes).items():
        names = flat[path]
        made[path] = {"A": (*names[: columns[0]], "rank"), "B": (*names[: rows[0]], "rank", *names[columns[0] :])}
    return traverse_util.unflatten_dict(made, sep="/")


def init(c: LoraConfig, axes: dict, shapes: dict, key: jax.Array) -> dict:
    """Fresh adapters, which change nothing: A random, of variance 1 / inputs, B zero.

    axes, shapes: of the model's parameters.
    """
    flat, made = traverse_util.flatten_dict(shapes, sep="/"), {}
    for i, (path, (rows, columns)) in enumerate(chosen(c, axes).items()):
        shape = flat[path].shape
        std = math.prod(shape[axis] for axis in rows) ** -0.5
        A = std * jax.random.normal(jax.random.fold_in(key, i), (*shape[: columns[0]], c.rank), jnp.float32)
        made[path] = {"A": A, "B": jnp.zeros((*shape[: rows[0]], c.rank, *shape[columns[0] :]), jnp.float32)}
    return traverse_util.unflatten_dict(made, sep="/")


def beside(base: dict | None, adapters: dict, scale: float) -> dict:
    """The parameters of a model: `base` with an Adapted for every weight that has an adapter. base None: `adapters` are all."""
    if base is None:
        return adapters
    if not isinstance(base, dict):
        return Adapted(base, adapters["A"], adapters["B"], scale)
    return {name: beside(part, adapters[name], scale) if name in adapters else part for name, part in base.items()}


@functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
def merged(base: dict, adapters: dict, scale: float) -> dict:
    """Plain parameters that compute what `base` with its adapters does; base's memory is theirs. -scale undoes it."""
    added = lambda w: w.base + change(w) if isinstance(w, Adapted) else w
    return jax.tree.map(added, beside(base, adapters, scale), is_leaf=lambda w: isinstance(w, Adapted))
