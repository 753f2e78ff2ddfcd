"""Paths of this machine, and of object stores: gs://BUCKET/PATH."""

import os
from pathlib import Path

from etils import epath

from gpt4o_jax.errors import RunError


def is_local(path) -> bool:
    return "://" not in os.fspath(path)


def absolute(path) -> epath.Path:
    """The same place, whatever folder the process changes to. One of an object store is absolute as it is."""
    return epath.Path(os.path.abspath(path) if is_local(path) else path)


def of_user(path) -> epath.Path:
    """A path as it is given, ~ spelled out. Raises RunError where it is in an object store whose package is not installed."""
    found = epath.Path(path).expanduser()
    if not is_local(path):
        try:
            found.exists()  # what loads the package
        except ImportError as e:
            raise without_package(path, e) from None
    return found


def local(name: str, path: str) -> Path:
    """A path of this machine, ~ spelled out. name: the flag or knob that gives it. Raises RunError for one of an object store.

    pathlib would take gs://BUCKET for a folder `gs:` below the current one.
    """
    if not is_local(path):
        raise RunError(f"{name}={path}: an object store; expected a path of this machine")
    return Path(path).expanduser()


def without_package(path, e: ImportError) -> RunError:
    hint = "pip install gcsfs" if os.fspath(path).startswith("gs://") else "install it with pip"
    return RunError(f"{path}: this kind of storage needs another package ({e}): {hint}")
