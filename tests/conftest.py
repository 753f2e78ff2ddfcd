"""Eight fake CPU devices, one compilation cache for the whole run, small helpers."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # tests look at XLA's warnings
# Halves compile time, where the fast suite spends most of its time; the programs stay the same except for LLVM's passes.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
_CACHE = os.environ.setdefault("GPT4O_JAX_TEST_CACHE", os.path.join(tempfile.gettempdir(), f"gpt4o_jax_test_cache_{os.getuid()}"))

import jax  # noqa: E402  (the environment above must be set first)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", os.path.join(_CACHE, "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

import pytest  # noqa: E402

from gpt4o_jax import parallel  # noqa: E402


@pytest.fixture
def one_device():
    """A mesh of one device, set as the current mesh."""
    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])) as mesh:
        yield mesh
