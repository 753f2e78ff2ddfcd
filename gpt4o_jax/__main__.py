"""python -m gpt4o_jax COMMAND [--flag=value ...]

stdout ends with one JSON object; progress, logs and errors go to stderr.
"""

import importlib
import json
import math
import os
import signal
import sys

from gpt4o_jax.commands import flags as flag_lib
from gpt4o_jax.errors import ExitCode, RunError, did_you_mean, storage_error

COMMANDS = (
    "train", "evaluate", "generate", "chat", "convert", "tokenizer", "data", "report", "runs", "sweep", "verify", "benchmark",
    "plan",
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Runs one command; returns its exit code. RunError and failures of storage are expected, other exceptions are bugs."""
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    try:
        code = _dispatch(argv)
        sys.stdout.flush()  # here, where a closed pipe is handled
        return code
    except BrokenPipeError:  # the reader has read enough: `train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails again when it flushes at exit
        return 128 + signal.SIGPIPE
    except RunError as e:
        if debug:
            raise
        print(f"gpt4o_jax: {e}", file=sys.stderr)
        return int(e.code)
    except KeyboardInterrupt:
        print("gpt4o_jax: interrupted", file=sys.stderr)
        return int(ExitCode.SIGNAL)
    except Exception as e:
        if debug or (told := storage_error(e)) is None:
            raise
        print(f"gpt4o_jax: {told}", file=sys.stderr)
        return int(told.code)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("help", "--help", "-h"):
        print(_overview())
        return 0 if argv else int(ExitCode.USAGE)
    command, *rest = argv
    if command not in COMMANDS:
        raise RunError(f"unknown command {command!r}{did_you_mean(command, COMMANDS)}; commands: {', '.join(COMMANDS)}")
    module = importlib.import_module(f"gpt4o_jax.commands.{command}")
    table, arguments, title, about = module.FLAGS, {}, command, module.__doc__
    if isinstance(table, dict):  # a command with actions: `tokenizer train`
        if rest and rest[0] in ("--help", "-h"):
            print("\n\n".join(flag_lib.usage(f"{command} {a}", _about(module, a), table[a], False) for a in table))
            return 0
        action = rest.pop(0) if rest else ""
        if action not in table:
            raise RunError(f"{command}: expected one of {', '.join(table)}, got {action!r}{did_you_mean(action, table)}")
        table, arguments, title = table[action], {"action": action}, f"{command} {action}"
        about = _about(module, action)
    takes_config = any(f.name in ("config", "sweep") for f in table)
    if "--help" in rest or "-h" in rest:
        print(flag_lib.usage(title, about, table, takes_config))
        return 0
    values, overrides = flag_lib.parse(title, table, rest, takes_config)
    _prepare_jax()
    result = module.main(values, overrides, **arguments)
    if result is not None:  # None: the command printed lines for a program to read
        print(json.dumps(_finite(result), allow_nan=False), flush=True)
    return 0


def _about(module, action: str) -> str:
    """The text on one action in the docstring of a command: "import, export: converts ...; merge: adds ..."."""
    for part in module.__doc__.split("; "):
        actions, _, text = part.partition(": ")
        if action in actions.split(", "):
            return text
    raise ValueError(f"{module.__name__}: its docstring does not say what {action} does")


def _finite(value):
    """`value` with None for NaN and infinities, which are not JSON, though Python writes them."""
    if isinstance(value, dict):
        return {k: _finite(x) for k, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _overview() -> str:
    docs = {c: importlib.import_module(f"gpt4o_jax.commands.{c}").__doc__.strip() for c in COMMANDS}
    lines = ["usage: python -m gpt4o_jax COMMAND [--flag=value ...]", ""]
    lines += [f"  {c:<10} {doc}" for c, doc in docs.items()]
    return "\n".join([*lines, "", "`COMMAND --help` lists its flags; --debug shows tracebacks."])


def _prepare_jax() -> None:
    """Settings shared by all commands, set in the environment, since not every command imports JAX."""
    from gpt4o_jax.data.token_cache import cache_root

    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_root("") / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("EPATH_USE_TF", "0")  # otherwise epath uses TensorFlow for object stores where that is installed


def _in_large_pages() -> None:
    """Restarts this process with a setting that glibc reads only at startup. Does nothing if it is set, or not on Linux.

    XLA:CPU allocates the temporaries of every step again, and Linux clears them, 4 KiB at a time: 2.7 GB for GPT-2 124M, a
    sixth of the CPU time of a step. In pages of 2 MiB this takes a third of that time, and matrix products read their operands
    faster.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    _in_large_pages()
    sys.exit(main(sys.argv[1:]))
