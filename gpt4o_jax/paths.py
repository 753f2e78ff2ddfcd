"""Paths of this machine, and of object stores: gs://BUCKET/PATH."""

import contextlib
import fcntl
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


class Hold(contextlib.AbstractContextManager):
    """The right to write in a folder, of one process at a time. It ends with the process, however that ends.

    The folder itself is locked: no file is left behind. Object stores have no locks, nor have folders on some file systems, as
    on NFS, where that of a machine that was lost would keep its successor waiting; nothing is held there.
    """

    def __init__(self):
        self._fd: int | None = None

    def __exit__(self, *_) -> None:
        if self._fd is not None:
            os.close(self._fd)

    def take(self, folder: epath.Path) -> None:
        """Does nothing where it is taken already. Raises RunError where another process has it."""
        if self._fd is not None or not is_local(folder):
            return
        fd = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(fd)
            if isinstance(e, BlockingIOError):
                raise RunError(
                    f"--workdir={folder}: in use by another training; wait for its end, or give a new folder"
                ) from None
        else:
            self._fd = fd
