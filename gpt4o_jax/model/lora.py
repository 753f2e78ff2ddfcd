"""LoRA adapters: which weights get one, how they are initialised, used beside the weights and merged into them.

Source: LoRA, Hu et al. 2021, arXiv:2106.09685.

Adapters are a tree like the parameters, with {"A": ..., "B": ...} in place of each adapted weight and without the others.
A [..., *summed, r] and B [..., r, *outputs] have the leading axes (layers, experts) of their weight.
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
    """The weights that can have an adapter, by path: hidden matrices except routers, whose products are always float32.

    axes: model.gpt.logical_axes.
    """
    flat = traverse_util.flatten_dict(axes, sep="/")
    found = {path: hidden_matrix(names) for path, names in flat.items() if names[-1] != "expert"}
    return {path: matrix for path, matrix in found.items() if matrix}


def chosen(c: LoraConfig, axes: dict) -> dict[str, Matrix]:
    """The weights that get an adapter, by path; axes: as for `adaptable`. Raises RunError if a pattern matches none."""
    able = adaptable(axes)
    for pattern in c.targets:
        if not fnmatch.filter(able, pattern):
            raise RunError(
                f"config.lora.targets: {pattern!r} matches no weight that can have an adapter; expected patterns such as '*' on"
                f" {', '.join(able)}"
            )
    return {path: matrix for path, matrix in able.items() if any(fnmatch.fnmatchcase(path, p) for p in c.targets)}


def logical_axes(c: LoraConfig, axes: dict) -> dict:
    """Axis names of every adapter, in a tree like theirs; axes: those of the model. Raises RunError as `chosen` does."""
    flat, made = traverse_util.flatten_dict(axes, sep="/"), {}
    for path, (rows, columns) in chosen(c, axes).items():
        names = flat[path]
        made[path] = {"A": (*names[: columns[0]], "rank"), "B": (*names[: rows[0]], "rank", *names[columns[0] :])}
    return traverse_util.unflatten_dict(made, sep="/")


def init(c: LoraConfig, axes: dict, shapes: dict, key: jax.Array) -> dict:
    """Fresh adapters, which change nothing: A random with variance 1 / inputs, B zero.

    axes, shapes: of the model's parameters. Raises RunError as `chosen` does.
    """
    flat, made = traverse_util.flatten_dict(shapes, sep="/"), {}
    for i, (path, (rows, columns)) in enumerate(chosen(c, axes).items()):
        shape = flat[path].shape
        std = math.prod(shape[axis] for axis in rows) ** -0.5
        A = std * jax.random.normal(jax.random.fold_in(key, i), (*shape[: columns[0]], c.rank), jnp.float32)
        made[path] = {"A": A, "B": jnp.zeros((*shape[: rows[0]], c.rank, *shape[columns[0] :]), jnp.float32)}
    return traverse_util.unflatten_dict(made, sep="/")


def beside(base: dict | None, adapters: dict, scale: float) -> dict:
    """The model's parameters: `base` with an Adapted for every adapted weight, or, if base is None, `adapters` as they are."""
    if base is None:
        return adapters
    if not isinstance(base, dict):
        return Adapted(base, adapters["A"], adapters["B"], scale)
    return {name: beside(part, adapters[name], scale) if name in adapters else part for name, part in base.items()}


@functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
def merged(base: dict, adapters: dict, scale: float) -> dict:
    """Plain parameters equivalent to `base` with its adapters; `base` is donated. -scale undoes it."""
    added = lambda w: w.base + change(w) if isinstance(w, Adapted) else w
    return jax.tree.map(added, beside(base, adapters, scale), is_leaf=lambda w: isinstance(w, Adapted))
