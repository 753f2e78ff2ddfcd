"""Platform and number formats of the arithmetic: one value, passed to every op and layer."""

import dataclasses

import jax
import jax.numpy as jnp

V5E_RAGGED = 16  # chips; on larger v5e slices libtpu 0.0.42 refuses ragged_all_to_all ("limited ICI routing")


@dataclasses.dataclass(frozen=True)
class Compute:
    """Platform of the mesh's devices, operand type of products (accumulation is float32), KV cache type, kind of rows."""

    platform: str = "cpu"  # "cpu", "gpu" or "tpu"
    dtype: str = "float32"  # "float32" or "bfloat16"
    kv_cache: str = "float32"  # type of cached keys and values in generation, one of model/cache.py's KINDS
    packed: bool = True  # whether rows may hold several documents; if not, attention ignores segments and padding is last
    ragged: bool = False  # whether devices can exchange unequal numbers of rows (jax.lax.ragged_all_to_all)

    @classmethod
    def on(cls, mesh: jax.sharding.Mesh, dtype: str, packed: bool = True) -> "Compute":
        """For the devices of a mesh, which are all of one kind. dtype: "float32" or "bfloat16"."""
        devices = mesh.devices.ravel()
        of_slice = sum(getattr(d, "slice_index", 0) == getattr(devices[0], "slice_index", 0) for d in devices)
        limited = devices[0].device_kind == "TPU v5 lite" and of_slice > V5E_RAGGED
        ragged = devices[0].platform != "cpu" and not limited  # XLA:CPU (jaxlib 0.10) does not support it
        return cls(devices[0].platform, dtype, packed=packed, ragged=ragged)

    @property
    def operand(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


def precision(dtype) -> jax.lax.Precision | None:
    """Precision of a product whose operands have this type.

    By default GPUs round float32 operands to TensorFloat-32, and TPUs to bfloat16. CPUs do not, whatever the precision.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def resolve_dtype(name: str, platform: str) -> str:
    """'auto' -> the operand type that `platform` multiplies fastest; other names pass through."""
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
