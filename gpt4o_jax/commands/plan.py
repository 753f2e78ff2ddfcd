"""compiles a config's training step for a TPU slice you do not have: memory, communication, upper bound on speed"""

import json
import subprocess
import sys

from gpt4o_jax.commands.flags import Flag

FLAGS = (
    Flag("config", str, "", "config file: FILE[:ARG], a Python file with get_config()", required=True),
    Flag("topology", str, "", "TPU slice, such as v5e:16x16, v5p:8x8x8, v6e:16x16 or tpu7x:4x4x4", required=True),
    Flag(
        "slices",
        int,
        1,
        "number of slices connected by the data-centre network; without mesh sizes in the config, each gets the config's batch",
        low=1,
        high=64,
    ),
    Flag("try_seconds", int, 300, "if it does not fit: seconds to compile each alternative; 0: try none", low=0),
    Flag("show", str, "", "sharding: print shape, axes and bytes per device of every parameter, without compiling"),
)

# What an objective needs in addition to training steps (finetuning/).
_BESIDE = {
    "dpo": "before the first step the weights of init.from score all pairs, once",
    "grpo": "the keys and values of the answers that are sampled are not counted; the weights that it starts from are",
}


def main(flags: dict, overrides: dict[str, str]) -> dict:
    import os

    # Read when jax is imported: libtpu must not look for a TPU, nor for the metadata servers of a TPU machine.
    from gpt4o_jax.errors import RunError

    if flags["show"] not in ("", "sharding"):
        raise RunError(f"plan: --show={flags['show']}: expected sharding")
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is attached, so processes need no lock
    }
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")  # any value: the topology is given by name
    from gpt4o_jax.commands import config_file

    config = config_file.read(flags["config"], overrides)
    return _plan(config, flags, overrides)


def _plan(config, flags: dict, overrides: dict[str, str]) -> dict:
    import dataclasses

    from gpt4o_jax.config_rules import validate_sizes
    from gpt4o_jax.console import say
    from gpt4o_jax.data.corpus import expected_vocab_size
    from gpt4o_jax.model import flops
    from gpt4o_jax.parallel.mesh import axis_between, make_mesh
    from gpt4o_jax.training import plan, topology

    family, chips = topology.parse_topology(flags["topology"])
    chip, slices = topology.CHIPS[family], flags["slices"]
    size = expected_vocab_size(config)
    dtype = "bfloat16" if config.model.compute_dtype == "auto" else config.model.compute_dtype
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size, compute_dtype=dtype))
    everything = chips * chip.devices * slices
    config, spread = topology.along_slices(config, slices, chips * chip.devices, "train.batch_size" in overrides)
    if spread:
        overrides = overrides | spread  # for the remedies too
        whole, rest = divmod(config.train.batch_size, slices)
        each = f"batch_size={config.train.batch_size}" + ("" if rest else f": {whole} a slice")
        say(f"{slices} slices along data, each with the mesh of the config; {each} ({_knobs(spread)})")
    sizes = config.mesh.sizes(everything)
    axis_between(slices, sizes)
    validate_sizes(config, sizes)
    facts = {
        "topology": flags["topology"],
        "slices": slices,
        "chips": chips * slices,
        "batch_size": config.train.batch_size,
        "parameters": flops.parameter_count(config.model),
        "flops_per_token": flops.train_flops_per_token(config.model, config.lora.rank > 0),
    }
    planned, devices, facts["estimate"] = _devices(config, flags, everything)
    mesh = make_mesh(planned.mesh, devices)
    if config.objective.method != "next_token":
        facts["planned_as"] = "next_token"
        say(f"planned as ordinary training on rows of as many tokens: {_BESIDE[config.objective.method]}")
    if flags["show"]:
        return facts | _show_sharding(planned, mesh)
    say(f"{facts['parameters']:,} parameters, {facts['flops_per_token']:,.0f} FLOP a token; compiling for {mesh.size} devices")
    result = facts | plan.compile_step(planned, mesh, None if facts["estimate"] else chip)
    if "pipeline" in result:
        p = result["pipeline"]
        say(f"{p['stages']} stages, repeats: {p['repeats']}, {p['micro_batches']} micro-batches: bubble {p['bubble']:.1%}")
    _say_memory(result)
    if result.get("fits") is False:
        result |= _try_remedies(planned, sizes, flags, overrides) if flags["try_seconds"] else {"fits_with": None, "tried": []}
    elif not facts["estimate"]:
        result["rates"] = chip._asdict() | {"source": topology.source(family)}
        _say_roofline(result)
    for c in result.get("collectives", ()):
        say(f"{c['kind']:<18} over {c['axes']:<12} {c['count']:>6} x, {c['bytes'] / 1e9:,.3f} GB a step")
    return result


def _devices(config, flags: dict, everything: int):
    """(config, devices, estimate): the devices of the slices, by libtpu.

    Without libtpu CPU devices, and estimate is True: at most 8, with a config whose mesh has their number; with --show=sharding,
    as many as the slices have.
    """
    import jax

    from gpt4o_jax.console import say
    from gpt4o_jax.training import topology

    try:
        return config, topology.described_devices(flags["topology"], flags["slices"]), False
    except ImportError:
        n = everything
        if not flags["show"]:  # the shards per device are then larger, and the compiler is a different one
            config, n = topology.stand_in(config, everything)
        jax.config.update("jax_num_cpu_devices", n)
        if n < everything:
            say(f"ESTIMATE: libtpu is not installed (requirements-tpu.txt), so {n} CPU devices stand in for {everything}")
        return config, jax.local_devices(backend="cpu")[:n], True


def _show_sharding(config, mesh) -> dict:
    import jax

    from gpt4o_jax.training import plan

    program = plan.build(config, mesh)
    with jax.set_mesh(mesh):
        rows = plan.show_sharding(program)
    _print_table([[name.replace("_", " ") for name in rows[0]], *([_plain(cell) for cell in row.values()] for row in rows)])
    return {"mesh": dict(mesh.shape), "sharding": rows}


def _knobs(overrides: dict) -> str:
    return " ".join(f"--config.{name}={value}" for name, value in overrides.items())


def _plain(cell) -> str:
    """The text of a cell: names of axes (dash: not sharded), digits in groups of three, yes or a dash, a note or a dash."""
    if isinstance(cell, bool):
        return "yes" if cell else "-"
    if isinstance(cell, list):
        return " ".join("+".join(c) if isinstance(c, list) else "-" if c is None else str(c) for c in cell)
    return f"{cell:,}" if isinstance(cell, int) else cell or "-"


def _print_table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1].rjust(widths[-1]))


def _say_roofline(result: dict) -> None:
    from gpt4o_jax.console import say

    rates, r = result["rates"], result["roofline"]
    say(
        f"rates of a chip: {rates['flops'] / 1e12:g} TFLOP/s in bfloat16; GB/s: HBM {rates['hbm_rate'] / 1e9:g},"
        f" ICI {rates['ici'] / 1e9:g}, DCN {rates['dcn'] / 1e9:g} ({rates['source']})"
    )
    say(
        f"a step takes at least {r['step_seconds_at_least']:.3f} s ({r['bound_by']}), MFU at most {r['mfu_at_most']:.1%}"
        f" ({r['mfu_causal_at_most']:.1%} without masked keys)"
    )


def _say_memory(result: dict) -> None:
    from gpt4o_jax.console import say

    sizes = {name: f"{name} {size / 1e9:.2f}" for name, size in result["bytes"].items() if size is not None}
    if "arguments" in sizes:  # which include these two
        sizes["arguments"] += f" ({sizes.pop('parameters')}, {sizes.pop('optimizer')})"
    parts = ", ".join(sizes.values())
    if "fits" not in result:
        say(f"GB a device: {parts}; no verdict without libtpu")
    elif result["fits"]:
        say(f"fits: GB a device: {parts}, of {result['hbm'] / 1e9:.1f}")
    else:
        say(f"does not fit: GB a device: {parts}, of {result['hbm'] / 1e9:.1f}")
    if "saved_activations_estimate" in result:
        where = "the host's memory" if result["remat"] == "offload" else "the temporaries"
        size = result["saved_activations_estimate"] / 1e9
        say(
            f"activations for the backward pass (remat={result['remat']}), in {where}: an estimate of {size:.3f};"
            " compilers keep less where they fuse"
        )


def _try_remedies(config, sizes: dict[str, int], flags: dict, overrides: dict[str, str]) -> dict:
    """{"fits_with": {"knobs", "bytes", "roofline"} of the first remedy that fits, or None, "tried": [{"knobs", "fits", ...}]}.

    "fits": True or False, with "total", the bytes per device (None: not reported by the compiler); or None if it was not
    compiled, with the "reason".
    Each is compiled in a separate process: a compiler short of memory may search for hours, and nothing else stops it.
    """
    from gpt4o_jax.console import say
    from gpt4o_jax.training.plan import remedies

    tried = []
    open_ones = lambda: sum(t["fits"] is None for t in tried)
    for knobs in remedies(config, sizes):
        told = _knobs(knobs)
        say(f"trying {told}")
        result = _tried(flags, overrides | knobs)
        if isinstance(result, str):
            tried.append({"knobs": knobs, "fits": None, "reason": result})
            say(result)
            continue
        tried.append({"knobs": knobs, "fits": result["fits"], "total": result["bytes"]["total"]})
        if result["fits"]:
            milder = f"; of {len(tried) - 1} milder ones {n} were not compiled, and may fit too" if (n := open_ones()) else ""
            say(f"fits with {told}{milder}")
            return {"fits_with": {"knobs": knobs, "bytes": result["bytes"], "roofline": result["roofline"]}, "tried": tried}
        _say_memory(result)
    if n := open_ones():
        say(f"nothing that was compiled fits; {n} of {len(tried)} remedies were not compiled, and may: raise --try_seconds")
    else:
        say(f"none of {len(tried)} remedies fits; take a larger slice, or several (--slices)")
    return {"fits_with": None, "tried": tried}


def _tried(flags: dict, overrides: dict) -> dict | str:
    """The result of `plan` with these overrides, or one line that says why there is none."""
    command = [sys.executable, "-m", "gpt4o_jax", "plan", "--try_seconds=0"]
    command += [f"--{name}={flags[name]}" for name in ("config", "topology", "slices")]
    command += [f"--config.{name}={value}" for name, value in overrides.items()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=flags["try_seconds"])
    except subprocess.TimeoutExpired:
        return f"not compiled within {flags['try_seconds']} s (--try_seconds)"
    if done.returncode:
        return f"not possible: {(done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]}"
    return json.loads(done.stdout.splitlines()[-1])
