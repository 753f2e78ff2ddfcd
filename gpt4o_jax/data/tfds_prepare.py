"""Prepares a TFDS dataset, with TensorFlow in a separate environment if the builder needs it."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from gpt4o_jax.data import token_cache
from gpt4o_jax.errors import ExitCode, RunError, data_error
from gpt4o_jax.paths import Hold

_SCRIPT = Path(__file__).with_name("tfds_builder.py")
REQUIREMENTS = Path(__file__).parents[2] / "requirements-prepare.txt"


def prepare(spec: str, data_dir: str, say: Callable[[str], None]) -> dict:
    """Runs the builder of `spec` (NAME/CONFIG, or FILE.py/CONFIG for your own) and writes array_record.

    The builder first runs in this environment. Only if it fails because a package listed in requirements-prepare.txt (TensorFlow)
    cannot be imported does it run again, in an environment made from that file; downloads are kept. Returns dataset, data_dir,
    splits, and needed: that package, or "". Raises RunError if the builder fails or the environment cannot be made.
    """
    result = _run(sys.executable, spec, data_dir)
    needed = result.get("missing", "")
    if needed and REQUIREMENTS.exists() and needed in REQUIREMENTS.read_text().replace("-", "_"):
        say(f"{spec}: the builder needs {needed}, which is not in this environment")
        result = _run(_environment(say), spec, data_dir)
    if "error" in result:
        hint = ""
        if result["missing"]:
            hint = f"; its builder needs the package {result['missing']}, which {REQUIREMENTS.name} does not name: add it there"
        elif "DatasetNotFound" in result["error"]:
            hint = "; see https://www.tensorflow.org/datasets/catalog/overview, or give a FILE.py with a builder of your own"
        elif "Connection" in result["error"] or "resolve" in result["error"]:
            hint = "; preparing it downloads the original files: check the network"
        raise data_error(f"--tfds={spec}: {result['error'][:300]}{hint}")
    return {**result, "needed": needed}


def _run(python: str, spec: str, data_dir: str) -> dict:
    """The result that the script prints last. Its progress goes to stderr."""
    # The builder's environment need not have gcsfs; TensorFlow reaches gs:// by itself.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k != "EPATH_USE_TF"}
    arguments = [python, "-P", str(_SCRIPT), spec, os.path.expanduser(data_dir)]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise data_error(f"--tfds={spec}: its builder printed no result (exit code {done.returncode})") from None


def _environment(say: Callable[[str], None]) -> str:
    """The Python of an environment with TensorFlow, made once per Python version and content of requirements-prepare.txt."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    name = hashlib.sha256(f"{version}\0{REQUIREMENTS.read_text()}".encode()).hexdigest()[:16]
    folder = token_cache.cache_root("") / "prepare" / name
    python, finished = folder / "bin" / "python", folder / "finished"
    if finished.exists():
        return str(python)
    say(f"making {folder} from {REQUIREMENTS.name} (1.8 GB, once)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with Hold() as hold:  # two commands would install into one folder
            hold.take(folder, where=str(folder))
            if finished.exists():  # since we looked: the other command may already use it
                return str(python)
            _call([sys.executable, "-m", "venv", "--clear", str(folder)])  # what an interrupted call left is cleared
            _call([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(REQUIREMENTS)])
            finished.touch()
    except OSError as e:
        raise RunError(f"{folder}: cannot make it ({e.strerror or e})", ExitCode.STORAGE) from None
    return str(python)


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = next(iter(reversed((done.stderr or done.stdout).strip().splitlines())), f"exit code {done.returncode}")
        raise data_error(f"{' '.join(command[1:4])}: {why}; preparing with TensorFlow needs the network once")
