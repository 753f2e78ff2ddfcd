"""Peak matrix-product rate of a device, the denominator of MFU (model FLOPs utilisation)."""

import time

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s a chip, from the vendors' datasheets (SXM parts for NVIDIA).
DATASHEET = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """FLOP/s of one device: the datasheet's, or on CPU what a 1024^3 product reaches here and now. None: unknown."""
    if device.platform == "cpu":
        return _measured(device, dtype)
    matches = [name for name in DATASHEET if device.device_kind.startswith(name)]
    return DATASHEET[max(matches, key=len)] if matches else None


def _measured(device: jax.Device, dtype: str, n: int = 1024) -> float:
    x = jax.device_put(jnp.ones((n, n), dtype), device)
    dot = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
    dot(x).block_until_ready()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        dot(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)
