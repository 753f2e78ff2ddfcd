"""train: measures a config's training speed on random tokens; generate: measures the generation speed of its model"""

from gpt4o_jax.commands.flags import Flag
from gpt4o_jax.commands.ready_flags import READY, check_ready

CONFIG = Flag("config", str, "", "config file: FILE[:ARG], a Python file with get_config()", required=True)
FLAGS = {
    "train": (
        CONFIG,
        Flag("dispatches", int, 5, "timed calls of the compiled step, after one untimed call", low=1),
    ),
    "generate": (
        CONFIG,
        Flag("batch", int, 1, "batch size", low=1),
        Flag("prompt_tokens", int, 128, "tokens of each prompt", low=1),
        Flag("new_tokens", int, 128, "new tokens for each prompt", low=2),
        Flag("repeats", int, 3, "timed generations, after one untimed", low=1),
        *READY,
    ),
}


def main(flags: dict, overrides: dict[str, str], action: str) -> dict:
    if action == "generate":
        check_ready("benchmark generate", flags)
    from gpt4o_jax.commands import config_file

    config = config_file.read(flags["config"], overrides)

    import dataclasses

    from gpt4o_jax import parallel
    from gpt4o_jax.data.corpus import expected_vocab_size
    from gpt4o_jax.ops.compute import resolve_dtype

    mesh = parallel.make_mesh(config.mesh)
    dtype = resolve_dtype(config.model.compute_dtype, mesh.devices.flat[0].platform)
    size = expected_vocab_size(config)
    model = dataclasses.replace(config.model, compute_dtype=dtype, vocab_size=size)
    config = dataclasses.replace(config, model=model)
    return _train(config, mesh, flags) if action == "train" else _generate(config, mesh, flags)


def _train(config, mesh, flags: dict) -> dict:
    from gpt4o_jax.console import say
    from gpt4o_jax.training.throughput import measure

    result, dtype = measure(config, mesh, flags["dispatches"]), config.model.compute_dtype
    say(
        f"{result['tokens_per_second']:,.0f} tokens/s, {result['achieved_gflops']:,.0f} GFLOP/s in {dtype}"
        f" (products alone reach {result['product_gflops'][dtype] or float('nan'):,.0f}), attention by {result['attention']},"
        f" {result['peak_bytes'] / 2**30:.2f} GiB at most"
    )
    return result


def _generate(config, mesh, flags: dict) -> dict:
    import functools

    import jax

    from gpt4o_jax.config_rules import validate_model_sizes
    from gpt4o_jax.console import say
    from gpt4o_jax.errors import RunError
    from gpt4o_jax.model import gpt
    from gpt4o_jax.model.quantization import for_generation
    from gpt4o_jax.ops.compute import Compute
    from gpt4o_jax.sampling.throughput import measure
    from gpt4o_jax.training.peak import read_rate

    T, wanted = config.model.context_length, flags["prompt_tokens"] + flags["new_tokens"]
    if wanted > T:
        raise RunError(
            f"benchmark generate: --prompt_tokens and --new_tokens are {wanted} together, but model.context_length={T};"
            f" nearest: --config.model.context_length={wanted}"
        )
    validate_model_sizes(config, dict(mesh.shape))
    device = mesh.devices.flat[0]
    model = gpt.GPT(config.model, Compute.on(mesh, config.model.compute_dtype))
    with jax.set_mesh(mesh):
        params = jax.jit(functools.partial(gpt.init, model))(jax.random.key(config.seed))
        model, params = for_generation(model, params, flags["weights"], flags["kv_cache"], flags["batch"])
        result = measure(model, params, *(flags[name] for name in ("batch", "prompt_tokens", "new_tokens", "repeats")))
    result |= {"read_gigabytes_per_second": read_rate(device) / 1e9, "device": f"{mesh.devices.size} x {device.device_kind}"}
    decoding = result["decode_tokens_per_second"]
    told = f"{decoding:,.1f}" if decoding else "cannot be told from the noise (--new_tokens: more take longer)"
    say(
        f"{result['tokens_per_second']:,.1f} new tokens/s; decoding alone {told}, prompts"
        f" {result['prompt_tokens_per_second']:,.0f}; weights {result['weight_bytes'] / 1e6:,.0f} MB, reads"
        f" {result['read_gigabytes_per_second']:.0f} GB/s"
    )
    return result
