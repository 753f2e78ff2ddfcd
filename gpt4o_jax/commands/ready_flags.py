"""The flags that say in what numbers a model generates."""

import dataclasses

from gpt4o_jax.commands.flags import Flag
from gpt4o_jax.errors import RunError, did_you_mean

WEIGHTS = ("float32", "bfloat16", "int8", "int4")
KV_CACHE = ("float32", "bfloat16", "int8")

READY = (
    Flag("weights", str, "float32", f"type of the weight matrices: {', '.join(WEIGHTS)}; fewer bits are faster and less exact"),
    Flag("kv_cache", str, "float32", f"type of the KV cache: {', '.join(KV_CACHE)}"),
)


def ready(run, flags: dict, rows: int = 1):
    """The run with its model and parameters as these flags, checked before, want them. rows: tokens computed at once."""
    from gpt4o_jax.model.quantization import for_generation

    model, params = for_generation(run.model, run.params, flags["weights"], flags["kv_cache"], rows)
    return dataclasses.replace(run, model=model, params=params)


def check_ready(command: str, flags: dict) -> None:
    """Raises RunError where one of these flags, if it is there, has a value that is none."""
    for name, legal in (("weights", WEIGHTS), ("kv_cache", KV_CACHE)):
        value = flags.get(name, legal[0])
        if value not in legal:
            raise RunError(f"{command}: --{name}={value}: expected one of {', '.join(legal)}{did_you_mean(value, legal)}")
