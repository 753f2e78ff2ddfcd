"""What the arithmetic runs on: one value that every op and layer is handed."""

import dataclasses

import jax
import jax.numpy as jnp

V5E_RAGGED = 16  # chips; in larger slices of v5e libtpu 0.0.42 refuses ragged_all_to_all ("limited ICI routing")


@dataclasses.dataclass(frozen=True)
class Compute:
    """Platform of the mesh's devices, operand type of matrix products (sums are float32), type of the cache; kind of rows."""

    platform: str = "cpu"  # "cpu", "gpu" or "tpu"
    dtype: str = "float32"  # "float32" or "bfloat16"
    kv_cache: str = "float32"  # what keys and values are kept in while generating, one of model/cache.py's KINDS
    packed: bool = True  # whether a row may hold several documents; else attention compares none, and padding is at the end
    ragged: bool = False  # whether devices can exchange rows in unequal numbers: jax.lax.ragged_all_to_all

    @classmethod
    def on(cls, mesh: jax.sharding.Mesh, dtype: str, packed: bool = True) -> "Compute":
        """On the devices of a mesh, which are of one kind. dtype: "float32" or "bfloat16"."""
        devices = mesh.devices.ravel()
        of_slice = sum(getattr(d, "slice_index", 0) == getattr(devices[0], "slice_index", 0) for d in devices)
        limited = devices[0].device_kind == "TPU v5 lite" and of_slice > V5E_RAGGED
        ragged = devices[0].platform != "cpu" and not limited  # XLA:CPU (jaxlib 0.10) has none
        return cls(devices[0].platform, dtype, packed=packed, ragged=ragged)

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
