"""Speed of a config's training step on this machine, and what bounds it. Needs no data, tokenizer or run folder."""

import dataclasses
import resource
import statistics
import sys
import time

import jax
import numpy as np

from gpt4o_jax.config import RunConfig
from gpt4o_jax.data.batches import Batch
from gpt4o_jax.model import flops
from gpt4o_jax.training.peak import peak_flops, read_rate
from gpt4o_jax.training.program import build


def measure(config: RunConfig, mesh: jax.sharding.Mesh, dispatches: int) -> dict:
    """Times `dispatches` calls of the compiled step on random tokens, after one warm-up call.

    config: with model.vocab_size and compute_dtype resolved. Returns tokens/s (median), achieved FLOP/s by the 6N + 12LDT of
    flops.py, the machine's own product and read rates, compile time in seconds, peak memory in bytes, and the mean loss of the
    last dispatch.
    """
    K, B, T = config.train.steps_per_dispatch, config.train.batch_size, config.model.context_length
    device = mesh.devices.flat[0]
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_warmup_steps=0))  # whole batches only
    program = build(config, mesh)
    with jax.set_mesh(mesh):
        begin = time.perf_counter()
        compiled = program.compile(10_000, np.ones(config.model.vocab_size, np.int32))
        compile_seconds = time.perf_counter() - begin
        state = program.fresh(jax.random.key(config.seed))
        batch = jax.device_put(_random_batch(config, (K, B, T)), program.batch_sharding)
        seconds = []
        for _ in range(dispatches + 1):
            begin = time.perf_counter()
            state, metrics = compiled(state, batch)
            loss = np.asarray(metrics["loss"])  # waits for the device
            seconds.append((time.perf_counter() - begin) / K)
        peak = _peak_bytes(device)  # before the probes below use memory of their own
    step = statistics.median(seconds[1:])
    achieved = flops.train_flops_per_token(config.model, config.lora.rank > 0) * B * T / step
    ceilings = {dtype: peak_flops(device, dtype) for dtype in ("float32", "bfloat16")}
    ceiling = ceilings[config.model.compute_dtype]
    return {
        "tokens_per_second": B * T / step,
        "step_seconds": {"median": step, "fastest": min(seconds[1:]), "slowest": max(seconds[1:])},
        "achieved_gflops": achieved / 1e9,
        "product_gflops": {dtype: rate and rate / 1e9 for dtype, rate in ceilings.items()},
        "read_gigabytes_per_second": read_rate(device) / 1e9,
        "mfu": ceiling and achieved / (ceiling * (1 if device.platform == "cpu" else mesh.devices.size)),
        "attention": program.attention,
        "compute_dtype": config.model.compute_dtype,
        "parameters": flops.parameter_count(config.model),
        "compile_seconds": compile_seconds,
        "peak_bytes": peak,
        "loss": float(loss.mean()),
        "device": f"{mesh.devices.size} x {device.device_kind}",
    }


def _random_batch(config: RunConfig, shape) -> Batch:
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, dtype=np.int32)
    ones = np.ones(shape, np.int32)
    return Batch(tokens, np.roll(tokens, -1, -1), ones.astype(np.float32), np.cumsum(ones, -1, dtype=np.int32) - 1, ones)


def _peak_bytes(device: jax.Device) -> int:
    """Peak memory in bytes: the device's if it reports it, else this process's."""
    stats = device.memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
