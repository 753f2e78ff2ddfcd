"""What the arithmetic runs on: one value that every op and layer is handed."""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Compute:
    """Platform of the mesh's devices, operand type of matrix products (sums are float32), type of the cache; kind of rows."""

    platform: str = "cpu"  # "cpu", "gpu" or "tpu"
    dtype: str = "float32"  # "float32" or "bfloat16"
    kv_cache: str = "float32"  # what keys and values are kept in while generating, one of model/cache.py's KINDS
    packed: bool = True  # whether a row may hold several documents; else attention compares none, and padding is at the end

    @property
    def operand(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


def resolve_dtype(name: str, platform: str) -> str:
    """'auto' -> the operand type that `platform` multiplies fastest; other names pass."""
    if name != "auto":
        return name
    if platform == "cpu":
        return "bfloat16" if _cpu_multiplies_bfloat16() else "float32"
    return "bfloat16"


def _cpu_multiplies_bfloat16() -> bool:
    try:
        with open("/proc/cpuinfo") as f:
            flags = next((line for line in f if line.startswith("flags")), "")
    except OSError:  # not Linux: no cheap way to ask
        return False
    return "avx512_bf16" in flags.split() or "amx_bf16" in flags.split()
