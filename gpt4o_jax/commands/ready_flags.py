"""Precision flags for generation."""

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
    """The run with model and parameters in the precision of these flags (see check_ready). rows: tokens computed per pass."""
    from gpt4o_jax.model.quantization import for_generation

    model, params = for_generation(run.model, run.params, flags["weights"], flags["kv_cache"], rows)
    return dataclasses.replace(run, model=model, params=params)


def check_ready(command: str, flags: dict) -> None:
    """Raises RunError if one of these flags is given with an unknown value."""
    for name, legal in (("weights", WEIGHTS), ("kv_cache", KV_CACHE)):
        value = flags.get(name, legal[0])
        if value not in legal:
            raise RunError(f"{command}: --{name}={value}: expected one of {', '.join(legal)}{did_you_mean(value, legal)}")
