"""A device's peak rates: matrix products, the denominator of MFU (model FLOPs utilisation), and memory reads."""

import time

import jax
import jax.numpy as jnp

from gpt4o_jax.ops.compute import precision
from gpt4o_jax.training.topology import CHIPS

_a_device = lambda family: CHIPS[family].flops / CHIPS[family].devices
# Dense bfloat16 FLOP/s of one device, from the vendors' datasheets (SXM parts for NVIDIA), by prefix of JAX's device_kind.
DATASHEET = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": _a_device("v5e"),
    "TPU v5e": _a_device("v5e"),
    "TPU v5": _a_device("v5p"),
    "TPU v5p": _a_device("v5p"),
    "TPU v6 lite": _a_device("v6e"),
    "TPU v6e": _a_device("v6e"),
    "TPU7x": _a_device("tpu7x"),
}


def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """FLOP/s of one device: the datasheet's (None if unknown) for bfloat16 on accelerators, else that of a large product."""
    if device.platform == "cpu":
        return _measured(device, dtype, 1024)
    if dtype != "bfloat16":
        return _measured(device, dtype, 8192)
    matches = [name for name in DATASHEET if device.device_kind.startswith(name)]
    return DATASHEET[max(matches, key=len)] if matches else None


def read_rate(device: jax.Device, size: int = 2**28) -> float:
    """Bytes per second at which `device` reads an array too large for its caches, measured with a sum."""
    x = jax.device_put(jnp.ones(size // 4, jnp.float32), device)
    return size / _fastest(jax.jit(jnp.sum), x)


def _measured(device: jax.Device, dtype: str, n: int) -> float:
    x = jax.device_put(jnp.ones((n, n), dtype), device)
    dot = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32, precision=precision(x.dtype)))
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
