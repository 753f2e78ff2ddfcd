"""train: times the training step of a config on random tokens"""

from gpt4o_jax.commands.flags import Flag

FLAGS = {
    "train": (
        Flag("config", str, "", "FILE[:ARG], a Python file with get_config()", required=True),
        Flag("dispatches", int, 5, "calls of the compiled step that are timed, after one that is not", low=1),
    ),
}


def main(flags: dict, overrides: dict[str, str], action: str) -> dict:
    from gpt4o_jax.commands import config_file

    config = config_file.read(flags["config"], overrides)

    import dataclasses

    from gpt4o_jax import parallel
    from gpt4o_jax.console import say
    from gpt4o_jax.ops.compute import resolve_dtype
    from gpt4o_jax.training.throughput import measure

    mesh = parallel.make_mesh(config.mesh)
    dtype = resolve_dtype(config.model.compute_dtype, mesh.devices.flat[0].platform)
    size = config.model.vocab_size or config.tokenizer.vocab_size
    model = dataclasses.replace(config.model, compute_dtype=dtype, vocab_size=size)
    result = measure(dataclasses.replace(config, model=model), mesh, flags["dispatches"])
    say(
        f"{result['tokens_per_second']:,.0f} tokens/s, {result['achieved_gflops']:,.0f} GFLOP/s in {dtype}"
        f" (products alone reach {result['product_gflops'][dtype] or float('nan'):,.0f}), attention by {result['attention']},"
        f" {result['peak_bytes'] / 2**30:.2f} GiB at most"
    )
    return result
