"""Tensors of a Hugging Face folder <-> our tree of parameters, by a family's table.

Our layers are stacked, theirs are separate; see `layers` in model/block.py for where each one is.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from gpt4o_jax import parallel
from gpt4o_jax.config import ModelConfig
from gpt4o_jax.errors import data_error
from gpt4o_jax.interop.families import Family
from gpt4o_jax.interop.files import DTYPES, Weights
from gpt4o_jax.interop.layout import Tensor
from gpt4o_jax.model import gpt

CHUNK = 1 << 24  # bytes read from a file at once


class Leaf(NamedTuple):
    """One of our parameters, its row in the family's table, and the layers stacked in it (None: it belongs to no layer)."""

    shape: tuple[int, ...]
    row: Tensor
    layers: range | None
    prefix: str

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of our axes, by letter."""
        return dict(zip(self.row.our_axes, self.shape[1:] if self.layers else self.shape, strict=True))

    def pieces(self, index: tuple[slice, ...]) -> Iterator[tuple[str, tuple[int, ...], dict[str, slice]]]:
        """(name of their tensor, its place in the leading axes of the part `index` of ours, slices of the other axes)."""
        inner = dict(zip(self.row.our_axes, index[1:] if self.layers else index, strict=True))
        leading = []
        if self.layers:
            leading.append([(i, self.layers[n]) for i, n in enumerate(range(index[0].start, index[0].stop))])
        if self.row.expert:
            experts = inner.pop("E")
            leading.append(list(enumerate(range(experts.start, experts.stop))))
        for place in itertools.product(*leading):
            numbers = [n for _, n in place]
            layer = numbers.pop(0) if self.layers else None
            expert = numbers.pop(0) if self.row.expert else None
            yield self.their_name(layer, expert), tuple(i for i, _ in place), inner

    def their_name(self, layer: int | None, expert: int | None) -> str:
        name = self.row.name(layer, expert)
        return name[1:] if name.startswith(".") else self.prefix + name


def leaves(family: Family, shapes, c: ModelConfig, prefix: str) -> dict:
    """The tree `shapes` with a Leaf in place of every array. Raises KeyError if the family has no row for one."""
    rows = {row.ours: row for row in family.tensors}
    whole = c.periods * len(c.period)  # layers in whole periods

    def leaf(path, x):
        keys = [k.key for k in path]
        layers, P = None, len(c.period)
        if keys[0] in ("layers", "last_layers"):
            begin, end = (0, whole) if keys[0] == "layers" else (whole, c.n_layers)
            block = int(keys.pop(1).removeprefix("block_")) if keys[1].startswith("block_") else 0
            layers, keys[0] = range(begin + block, end, P), "layers"
        return Leaf(x.shape, rows["/".join(keys)], layers, prefix)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def expected(tree) -> dict[str, tuple[int, ...]]:
    """Names and shapes of their tensors, in our order."""
    out = {}
    for leaf in _list(tree):
        whole = tuple(slice(0, n) for n in leaf.shape)
        for name, _, _ in leaf.pieces(whole):
            out[name] = leaf.row.their_shape(leaf.sizes)
    return out


def _list(tree) -> list[Leaf]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Leaf))


# ---------------------------------------------------------------- import


def load(weights: Weights, family: Family, model: gpt.GPT, mesh: jax.sharding.Mesh) -> dict:
    """Parameters, float32, each shard read straight from the files to its device. Needs an active mesh.

    The host holds at most two shards of parameters (JAX frees arrays late) and CHUNK bytes; a CPU device uses the host's
    arrays without a copy. Raises RunError if a tensor is missing, unexpected, or of another shape or type.
    """
    shapes = gpt.shapes(model)
    bare = not any(name.startswith(family.prefix) for name in weights.entries)  # as GPT-2 was first published
    tree = leaves(family, shapes, model.config, "" if bare else family.prefix)
    _check(weights, family, tree, model.config.n_layers, "" if bare else family.prefix)
    shardings = parallel.shardings(gpt.logical_axes(model), mesh)
    place = lambda leaf, sharding: _place(weights, leaf, sharding)
    return jax.tree.map(place, tree, shardings, is_leaf=lambda x: isinstance(x, Leaf))


def _place(weights: Weights, leaf: Leaf, sharding: jax.sharding.NamedSharding) -> jax.Array:
    # jax.make_array_from_callback would hold every device's shard on the host before it sends the first.
    devices: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, holders in devices.items():
        shard = _read(weights, leaf, tuple(slice(*b) for b in bounds))
        arrays += [jax.device_put(shard, device) for device in holders]
        jax.block_until_ready(arrays)
        del shard
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _read(weights: Weights, leaf: Leaf, index: tuple[slice, ...]) -> np.ndarray:
    """The slice `index` of a parameter, float32."""
    out = np.empty([s.stop - s.start for s in index], np.float32)
    row, sizes = leaf.row, leaf.sizes
    for name, place, inner in leaf.pieces(index):
        target = out[place]
        axes = [a for a in row.our_axes if a in inner]
        first = row.their_axes[0].lstrip("0123456789")[0]
        step = _step(row, inner, first)
        for start in range(inner[first].start, inner[first].stop, step):
            part = inner | {first: slice(start, min(start + step, inner[first].stop))}
            here = slice(start - inner[first].start, part[first].stop - inner[first].start)
            theirs = weights.read(name, row.their_slices(part, sizes))
            target[tuple(here if a == first else slice(None) for a in axes)] = row.to_ours(theirs, part)
    return out


def _step(row: Tensor, inner: dict[str, slice], first: str) -> int:
    """How many entries of their first axis are read at once."""
    others = math.prod(s.stop - s.start for a, s in inner.items() if a != first)
    return max(1, CHUNK // (4 * others))


def _check(weights: Weights, family: Family, tree, n_layers: int, prefix: str) -> None:
    """Raises RunError unless the files hold the tensors of the table, no others, each of its shape and a type we read."""
    wanted, found, where = expected(tree), weights.entries, weights.folder
    buffers = {prefix + b.format(l=layer) for b in family.buffers for layer in range(n_layers)}
    tied = "lm_head.weight" not in wanted
    missing = [n for n in wanted if n not in found]
    extra = [n for n in found if n not in wanted and n not in buffers and not (tied and n == "lm_head.weight")]
    if missing:
        raise data_error(f"{where}: {_some(missing)} missing; config.json describes a {family.name} that has them")
    if extra:
        raise data_error(f"{where}: {_some(extra)} unexpected; a {family.name} as config.json describes it has no such tensor")
    readable = (*DTYPES, "BF16")
    for name, shape in wanted.items():
        entry = found[name]
        if entry.dtype not in readable:
            raise data_error(f"{where}: {name} in {entry.file} is {entry.dtype}, expected one of {', '.join(readable)}")
        if entry.shape != shape:
            turned = "; it lies transposed" if entry.shape == shape[::-1] else ""
            raise data_error(f"{where}: {name} in {entry.file} is {list(entry.shape)}, expected {list(shape)}{turned}")
    if tied and "lm_head.weight" in found:
        _check_copy(weights, prefix, family)


def _check_copy(weights: Weights, prefix: str, family: Family) -> None:
    """A tied model may store its embedding twice, but not two different ones. Raises RunError."""
    table = prefix + next(row.theirs for row in family.tensors if row.ours == "embedding")
    first, second = weights.entries[table], weights.entries["lm_head.weight"]
    step = max(1, CHUNK // (4 * first.shape[1]))
    same = first[1:] == second[1:] and all(
        np.array_equal(
            *(weights.read(n, (slice(i, min(i + step, first.shape[0])), slice(None))) for n in (table, "lm_head.weight"))
        )
        for i in range(0, first.shape[0], step)
    )
    if not same:
        raise data_error(
            f"{weights.folder}: tie_word_embeddings is true, but lm_head.weight is not {table}; set it to false in config.json"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more are" if len(names) > 3 else " are" if len(names) > 1 else " is")


# ---------------------------------------------------------------- export


class Theirs:
    """Our parameters as their tensors, converted one at a time. shapes: by name, in our order."""

    def __init__(self, family: Family, params, c: ModelConfig, dtype: np.dtype):
        self.dtype = dtype
        tree = leaves(family, params, c, family.prefix)
        self.shapes = expected(tree)
        self._sources: dict[str, list] = {}
        for leaf, x in zip(_list(tree), jax.tree.leaves(params), strict=True):
            for name, place, _ in leaf.pieces(tuple(slice(0, n) for n in leaf.shape)):
                self._sources.setdefault(name, []).append((leaf.row, x, place))

    def load(self, name: str) -> np.ndarray:
        """One tensor of theirs, gathered from the devices."""
        parts = sorted(self._sources[name], key=lambda source: source[0].part)
        arrays = [row.to_theirs(np.asarray(x[place]).astype(self.dtype)) for row, x, place in parts]
        if len(arrays) == 1:
            return arrays[0]
        return np.concatenate(arrays, axis=parts[0][0].joined_axis)
