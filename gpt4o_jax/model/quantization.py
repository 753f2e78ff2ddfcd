"""A model prepared for generation: unstacked layers, quantised matrices."""

import dataclasses
import functools

import jax

from gpt4o_jax.model.gpt import GPT
from gpt4o_jax.ops.weights import rounded

WEIGHTS = ("float32", "bfloat16", "int8", "int4")
# Matrices by the last two names of their path: the number of leading axes summed over. The embedding, handled in `_converted`, is
# stored transposed, as a tied head uses it.
MATRICES = {
    ("attention", "query"): 1,
    ("attention", "key"): 1,
    ("attention", "value"): 1,
    ("attention", "output"): 2,
    ("mlp", "up"): 1,
    ("mlp", "gate"): 1,
    ("mlp", "down"): 1,
    ("shared", "up"): 1,
    ("shared", "gate"): 1,
    ("shared", "down"): 1,
}
EXPERTS = (("moe", "up"), ("moe", "gate"), ("moe", "down"))  # one matrix per expert, summed over its first axis


def for_generation(model: GPT, params, weights: str = "float32", kv_cache: str = "float32", rows: int = 1) -> tuple[GPT, dict]:
    """(model, parameters) that compute the same, or nearly, in less time. weights: one of WEIGHTS; kv_cache: one of cache.KINDS.

    rows: the number of tokens, over all rows of the batch, that will mostly be computed together; others work too.

    Layers are unstacked, so that no step slices their matrices out of the stack. int8: one scale per output; int4: one per 128
    inputs of an output, with int8 for embedding and head; norms, biases, positions and routers stay float32.
    """
    model = GPT(model.config, dataclasses.replace(model.compute, kv_cache=kv_cache))
    rows = rows if model.compute.dtype == "bfloat16" else 1  # only bfloat16 products read bfloat16 weights directly
    convert = lambda tree: tree if weights == "float32" else _converted(tree, weights, rows)
    return _unstacked(model, params, convert)


def _unstacked(model: GPT, params, convert) -> tuple[GPT, dict]:
    """The same model with its whole depth as one period.

    convert(parameters): applied to one layer at a time, so that the whole stack is never duplicated before conversion.
    """
    c = model.config
    if c.n_layers == 1:
        return model, convert(params)
    P, whole = len(c.period), c.periods * len(c.period)
    blocks = {}
    for layer in range(c.n_layers):
        stack, at = (params["layers"], layer // P) if layer < whole else (params["last_layers"], 0)
        block = stack if P == 1 else stack[f"block_{layer % P}"]
        blocks[f"block_{layer}"] = convert(jax.tree.map(lambda leaf, at=at: leaf[at : at + 1], block))
    rest = {name: value for name, value in params.items() if name not in ("layers", "last_layers")}
    pattern = (c.layer_pattern * c.n_layers)[: c.n_layers]
    config = dataclasses.replace(c, layer_pattern=pattern, scan_unroll=1)
    return GPT(config, model.compute), convert(rest) | {"layers": blocks}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _converted(params, weights: str, rows: int) -> dict:
    def convert(path, leaf):
        names = tuple(key.key for key in path)
        if names[-2:] in MATRICES:  # has a leading layers axis
            return jax.vmap(lambda w: rounded(w, MATRICES[names[-2:]], weights, rows))(leaf)
        if names[-2:] in EXPERTS:
            return jax.vmap(jax.vmap(lambda w: rounded(w, 1, weights)))(leaf)
        at_ends = "int8" if weights == "int4" else weights
        if names == ("unembedding",):
            return rounded(leaf, 1, at_ends, rows)
        return rounded(leaf.T, 1, at_ends, rows) if names == ("embedding",) else leaf

    return jax.tree_util.tree_map_with_path(convert, params)
