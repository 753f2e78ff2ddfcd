"""Prints the XLA flags for training on several devices that this XLA knows, or runs a command with them.

    export XLA_FLAGS="$(python launch/xla_flags.py cuda)"
    python launch/xla_flags.py cuda COMMAND...

XLA aborts the process on an unknown flag, and flags come and go, so each is tried in a separate process. What XLA_FLAGS already
holds is kept, and kept last: the last one wins. TPUs get no flags here: libtpu has its own, in LIBTPU_INIT_ARGS, and XLA does
not know --xla_tpu_ flags in XLA_FLAGS.
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
    environment = {**os.environ, "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}  # every backend parses and checks the flags
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0


def main(platform: str, *command: str) -> int:
    if platform not in FLAGS:
        print(f"xla_flags.py: {platform!r}: expected one of {', '.join(FLAGS)}", file=sys.stderr)
        return 2
    flags = list(FLAGS[platform])
    if flags and not is_known(" ".join(flags)):  # one try if all are known
        flags = [flag for flag in flags if is_known(flag)]
        print(f"xla_flags.py: left out, unknown here: {', '.join(set(FLAGS[platform]) - set(flags))}", file=sys.stderr)
    told = " ".join([*flags, os.environ.get("XLA_FLAGS", "")]).strip()
    if not command:
        print(told)
        return 0
    try:
        os.execvpe(command[0], command, {**os.environ, "XLA_FLAGS": told})  # replaces this process, so signals reach the command
    except OSError as e:
        print(f"xla_flags.py: {command[0]}: {e.strerror}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:] or [""]))
