"""Whether a config fits hardware that is not present: its training step, compiled ahead of time, and what that shows.

libtpu compiles for slices by name on any machine (topology.py). Without it, eight CPU devices stand in.
"""

import collections
import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gpt4o_jax.config import OptimizerConfig, RunConfig
from gpt4o_jax.config_rules import validate_moments
from gpt4o_jax.data.batches import Batch
from gpt4o_jax.errors import RunError
from gpt4o_jax.model import flops, gpt, lora
from gpt4o_jax.model.block import REMAT_POLICIES
from gpt4o_jax.parallel.pipeline import Schedule
from gpt4o_jax.parallel.rules import RULES, collisions
from gpt4o_jax.training.collectives import collectives
from gpt4o_jax.training.program import Program, build
from gpt4o_jax.training.state import HOST_MEMORY
from gpt4o_jax.training.topology import Chip, slice_count, spread


def show_sharding(program: Program) -> list[dict]:
    """For each parameter: shape, logical axes, mesh axes, a note, whether it is frozen, and bytes per device.

    The note names mesh axes that two of its axes want; the first gets them, the later goes without.

    Adapters come before the weights that they belong to. Needs the mesh set.
    """
    c, axes = program.config.lora, gpt.logical_axes(program.model)
    trained = lora.logical_axes(c, axes) if c.rank else axes
    return [
        *_rows(program.shapes.params, program.shardings.params, trained, False),
        *(_rows(program.shapes.base, program.shardings.base, axes, True) if c.rank else ()),
    ]


def _rows(shapes, shardings, axes, frozen: bool):
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    names = jax.tree.leaves(axes, is_leaf=lambda n: isinstance(n, tuple))
    for (path, leaf), sharding, logical in zip(leaves, jax.tree.leaves(shardings), names, strict=True):
        yield {
            "parameter": "/".join(str(k.key) for k in path),
            "shape": list(leaf.shape),
            "logical": list(logical),
            "mesh": [list(e) if isinstance(e, tuple) else e for e in sharding.spec],
            "note": "; ".join(f"{axis} taken by {by}" for axis, by in collisions(logical) if sharding.mesh.shape[axis] > 1),
            "frozen": frozen,
            "bytes_a_device": _shard_bytes(leaf, sharding),
        }


def _shard_bytes(leaf, sharding) -> int:
    if _is_key(leaf.dtype):
        return 16
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _tree_bytes(shapes, shardings, host: bool = False) -> int:
    """Bytes in the memory of a device, or, if `host`, in that of its host."""
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(_shard_bytes(x, s) for x, s in leaves if (s.memory_kind == HOST_MEMORY) == host)


def compile_step(config: RunConfig, mesh: Mesh, chip: Chip | None) -> dict:
    """Compiles one training step for `mesh`; returns what it needs and sends. config: vocab_size and compute_dtype resolved.

    Bytes are per device (per chip where that is one device). "parameters" is what is trained: with adapters those, and the
    weights are "frozen"; "reference" is GRPO's copy of its initial weights. chip: None if the devices only stand in: then there
    is no verdict and no roofline. Raises RunError as `build` does.
    """
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps_per_dispatch=1))
    program = build(config, mesh)
    state = {
        "parameters": _tree_bytes(program.shapes.params, program.shardings.params),
        "optimizer": _tree_bytes(program.shapes.opt_state, program.shardings.opt_state),
    }
    if config.lora.rank:
        state["frozen"] = _tree_bytes(program.shapes.base, program.shardings.base)
    if config.objective.method == "grpo" and config.objective.beta and not config.lora.rank:  # kept by finetuning/reinforced.py
        state["reference"] = state["parameters"]
    if config.optimizer.offload:
        state["optimizer_in_host"] = _tree_bytes(program.shapes.opt_state, program.shardings.opt_state, host=True)
    result = {"attention": program.attention, "mesh": dict(mesh.shape), "bytes": state, "remat": config.model.remat}
    if program.order.stages > 1:
        result["pipeline"] = program.order._asdict() | {"bubble": program.order.bubble}
    with jax.set_mesh(mesh):
        lowered = program.lower(10_000, np.ones(config.model.vocab_size, np.int32))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as e:
            if chip is None or "RESOURCE_EXHAUSTED" not in str(e):
                raise
            state["total"] = _refused(str(e))
            return result | {"fits": False, "hbm": chip.hbm, "compiler": str(e).splitlines()[0]}
    result["saved_activations_estimate"] = saved_activations(program)
    memory = compiled.memory_analysis()
    state["arguments"] = memory.argument_size_in_bytes
    # Activations, gradients and other temporaries: the compiler packs them into one pool and reports its size.
    state["temporaries"] = memory.temp_size_in_bytes
    state["code"] = memory.generated_code_size_in_bytes
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    state["total"] = state["arguments"] + state["temporaries"] + state["code"] + new + state.get("reference", 0)
    ids = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    result["collectives"] = collectives(compiled.as_text(), dict(mesh.shape), ids)
    if chip is not None:
        result |= {"fits": state["total"] <= chip.hbm, "hbm": chip.hbm}
        if result["fits"]:
            found, frozen = result["collectives"], state.get("frozen", 0)
            result["roofline"] = roofline(config, chip, mesh, found, state["arguments"], program.order, frozen)
    return result


def saved_activations(program: Program) -> int:
    """Estimated bytes per device that a micro-batch's forward pass saves for the backward pass, as traced.

    A compiler saves less if it fuses, uses fewer bits or recomputes; arrays that no mesh axis splits count as split over all
    devices. Measured on eight CPU devices (8 layers, float32): estimates of 53 MB for 51 MB of temporaries without remat, 12 for
    19 with save_mlp, 4 for 12 with full.
    With remat=offload they are in host memory. Parameters, which are saved too, are not counted. Needs no mesh set.
    """
    c = program.config
    shape = (c.train.batch_size // c.train.accumulate, c.model.context_length)
    ints, floats = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32))
    batch = Batch(ints, ints, floats, ints, ints, dict.fromkeys(program.objective.beside, floats))

    def kept(params, base, batch, key):
        whole = lambda p: lora.beside(base, p, c.lora.scale)
        return jax.vjp(lambda p: program.objective.loss(program.model, whole(p), batch, c.train, key)[0], params)[1]

    with jax.set_mesh(program.mesh):
        arguments = program.shapes.params, program.shapes.base, batch
        found = jax.tree.leaves(jax.eval_shape(kept, *arguments, program.shapes.rng))
    of = lambda x: (x.shape, x.dtype)
    parameters = collections.Counter(map(of, jax.tree.leaves(arguments[:2])))
    others = collections.Counter(map(of, found)) - parameters
    size = sum(math.prod(shape) * dtype.itemsize * n for (shape, dtype), n in others.items() if not _is_key(dtype))
    return size // program.mesh.size


def _is_key(dtype) -> bool:
    return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _refused(message: str) -> float | None:
    """Bytes that a program would need per device, from the compiler's RESOURCE_EXHAUSTED; None if it does not say."""
    said = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    said = said or re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM", message)
    return float(said[1]) * 2 ** (10 * " KMGT".index(said[2] or " ")) if said else None


def roofline(
    config: RunConfig, chip: Chip, mesh: Mesh, found: list[dict], arguments: int, order: Schedule, frozen: int = 0
) -> dict:
    """Lower bounds on a step's seconds and the MFU that they allow: compute, HBM, and links between chips and slices.

    compute: what a causal kernel must compute, at the peak rate; with remat=full or offload, the blocks' forward pass twice.
    Pipelines add their bubble and, with repeats, one more forward pass of the blocks; the head is shared by the stages if rows
    divide, else each computes it. Frozen weights get no gradient; the products of adapters are not counted.
    hbm: the arguments (parameters and optimizer state) read and written once, except the `frozen` bytes, which are only read.
    ici, dcn: the part of the collectives' arrays that must come from other chips of the slice and from other slices, over all
    links of a chip. A step takes at least the longest of these.
    mfu_at_most: by 6N + 12LDT, with adapters 4N + 12LDT, which counts all T keys; mfu_causal_at_most: by the keys that tokens
    see.
    """
    model, tokens = config.model, config.train.batch_size * config.model.context_length
    peak = mesh.devices.size / chip.devices * chip.flops
    masked, whole = flops.masked_flops_per_token(model), flops.train_flops_per_token(model)
    useful = flops.train_flops_per_token(model, config.lora.rank > 0)
    seen = useful - masked
    heads = 2 * model.d_model * model.vocab_size * (1 + model.mtp_heads)
    blocks = (whole - masked) / 3 - heads  # forward
    no_gradient = heads if config.lora.rank else 0  # of the head; of all frozen weights: whole - useful
    passes = 3 + (model.remat in ("full", "offload")) + (order.repeats > 1)
    shards = math.prod(mesh.shape[axis] for axis in RULES["staged_batch"])
    each = order.stages if config.train.batch_size // config.train.accumulate % shards else 1  # that compute the same head
    computed = (passes * blocks - (whole - useful - no_gradient)) / (1 - order.bubble) + (3 * heads - no_gradient) * each
    moved = (2 * arguments - frozen) * chip.devices
    seconds = {"compute": computed * tokens / peak, "hbm": moved / chip.hbm_rate, "ici": 0, "dcn": 0}
    for c in found:
        ici, dcn = _received(c, mesh, chip.devices)
        seconds["ici"] += ici / chip.ici
        seconds["dcn"] += dcn / chip.dcn
    bound = max(seconds.values())
    return {
        "seconds": seconds,
        "bound_by": max(seconds, key=seconds.get),
        "step_seconds_at_least": bound,
        "mfu_at_most": useful * tokens / peak / bound,
        "mfu_causal_at_most": seen * tokens / peak / bound,
    }


def _received(collective: dict, mesh: Mesh, devices: int) -> tuple[float, float]:
    """Bytes that a chip of `devices` devices must at least receive over (ICI, DCN) in a step."""
    kind, size, axes = collective["kind"], collective["bytes"], collective["axes"]
    if kind == "ragged-all-to-all":  # the array has room for all rows; routers may send none
        return 0.0, 0.0
    if axes == "slices":
        groups, parts = devices, slice_count(mesh)
    else:
        n, parts = spread(mesh, axes.split("+"))
        # Data that a chip's devices share arrives once; in an all-to-all each wants its own.
        groups = devices if kind == "all-to-all" else devices * parts / n
    share = float(parts > 1) if kind == "collective-permute" else (parts - 1) / parts
    received = groups * size * share * (2 if kind == "all-reduce" else 1)
    return (0.0, received) if axes == "slices" else (received, 0.0)


def remedies(config: RunConfig, sizes: dict[str, int]):
    """Knobs by dotted name that save memory, each set including those before it, mildest first.

    sizes: of the mesh, by axis. In order: later remat policies; experts on chunks of the tokens; fsdp instead of data; fsdp
    instead of tensor while rows divide, so that a device has fewer; more micro-batches; more tensor than at first, with one row
    per device and micro-batch; moments in bfloat16; optimizer state in host memory; and, the only one that changes what is
    learned by more than rounding, a smaller batch.
    """
    knobs, train = {}, config.train

    def also(more: dict):
        knobs.update(more)
        return dict(knobs)

    order = ("none", *REMAT_POLICIES)
    for policy in order[order.index(config.model.remat) + 1 :]:
        yield also({"model.remat": policy})
    model, chunk = config.model, 1024  # tokens: enough rows for products at full speed
    if model.n_experts and model.expert_chunk is None and model.context_length > chunk:
        yield also({"model.expert_chunk": chunk})
    data, fsdp, first = sizes["data"], sizes["fsdp"], sizes["tensor"]
    if data > 1 and model.d_model % (data * fsdp) == 0:
        data, fsdp = 1, data * fsdp
        yield also({"mesh.data": 1, "mesh.fsdp": fsdp})
    tensor, ways, micro = first, data * fsdp * sizes["expert"], train.accumulate
    while tensor % 2 == 0 and train.batch_size % (2 * micro * ways) == 0 and model.d_model % (2 * fsdp) == 0:
        fsdp, ways, tensor = fsdp * 2, ways * 2, tensor // 2
        yield also({"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor})
    while train.batch_size % (2 * micro * ways) == 0:
        micro *= 2
        yield also({"train.accumulate": micro})
    rest, odd = divmod(train.batch_size, micro * ways)  # rows per device that halving does not reach
    if rest > 1 and not odd:
        micro *= rest
        yield also({"train.accumulate": micro})
    while fsdp % 2 == 0 and model.kv_heads % (2 * tensor) == 0:
        fsdp, ways, tensor = fsdp // 2, ways // 2, tensor * 2
        micro = max(1, train.batch_size // ways)
        if tensor > first:
            yield also({"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor, "train.accumulate": micro})
    if config.optimizer.moment_dtype != "bfloat16" and _may_round_moments(config.optimizer):
        yield also({"optimizer.moment_dtype": "bfloat16"})
    if not config.optimizer.offload:
        yield also({"optimizer.offload": True})
    if micro > 1:
        yield also({"train.accumulate": 1, "train.batch_size": ways})


def _may_round_moments(optimizer: OptimizerConfig) -> bool:
    try:
        validate_moments(optimizer)
    except RunError:
        return False
    return True
