"""What a device can do at most: matrix products, the denominator of MFU (model FLOPs utilisation), and reads."""

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


def read_rate(device: jax.Device, size: int = 2**28) -> float:
    """Bytes a second at which `device` reads an array too large for its caches: that of a sum."""
    x = jax.device_put(jnp.ones(size // 4, jnp.float32), device)
    return size / _fastest(jax.jit(jnp.sum), x)


def _measured(device: jax.Device, dtype: str, n: int = 1024) -> float:
    x = jax.device_put(jnp.ones((n, n), dtype), device)
    dot = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
    return 2 * n**3 / _fastest(dot, x)


def _fastest(f, x, times: int = 7) -> float:
    """Seconds of the fastest of `times` calls, after one that compiles."""
    f(x).block_until_ready()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        f(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
