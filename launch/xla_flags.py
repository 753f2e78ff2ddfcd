"""Prints the XLA flags that training on several machines wants, those that this XLA knows, for XLA_FLAGS.

    export XLA_FLAGS="$(python launch/xla_flags.py cuda)"

XLA aborts the process at a flag that it does not know, and flags come and go: so each is tried in a process of its own. What
XLA_FLAGS holds already stays, and stays last: the last one counts. TPUs need none.
"""

import os
import subprocess
import sys

FLAGS = {
    "cuda": {
        "--xla_gpu_enable_latency_hiding_scheduler=true": "gathers of the next layer's shards run under this layer's products",
        "--xla_gpu_all_gather_combine_threshold_bytes=134217728": "one large message a layer in the place of many small ones",
        "--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728": "the same, for gradients",
    },
    "tpu": {},
    "cpu": {},
}


def is_known(flag: str) -> bool:
    """Whether XLA starts with this flag."""
    environment = {**os.environ, "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}  # flags are read, and judged, by every backend
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0


def main(platform: str) -> int:
    if platform not in FLAGS:
        print(f"xla_flags.py: {platform!r}: expected one of {', '.join(FLAGS)}", file=sys.stderr)
        return 2
    flags = list(FLAGS[platform])
    if flags and not is_known(" ".join(flags)):  # one look where all is well
        flags = [flag for flag in flags if is_known(flag)]
        print(f"xla_flags.py: left out, unknown here: {', '.join(set(FLAGS[platform]) - set(flags))}", file=sys.stderr)
    print(" ".join([*flags, os.environ.get("XLA_FLAGS", "")]).strip())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) == 2 else ""))
