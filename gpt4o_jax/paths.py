"""Paths of this machine, and of object stores: gs://BUCKET/PATH."""

import contextlib
import fcntl
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from gpt4o_jax.errors import RunError, did_you_mean, unreachable

_SCHEMES = ("gs", "s3", "az", "hf")  # that etils.epath knows
_SECONDS = 90.0  # in which an object store must answer its first question; gcsfs gives up after 50 where a name is not known


def is_local(path) -> bool:
    return "://" not in os.fspath(path)


def absolute(path) -> epath.Path:
    """The same place, whatever folder the process changes to. One of an object store is absolute as it is."""
    return epath.Path(os.path.abspath(path) if is_local(path) else path)


def of_user(path) -> epath.Path:
    """A path as it is given, ~ spelled out.

    Raises RunError where it is in an object store whose kind is not known (2), whose package is not installed (2), or that cannot
    be reached (5).
    """
    if is_local(path):
        return epath.Path(path).expanduser()
    scheme = os.fspath(path).partition("://")[0]
    if scheme not in _SCHEMES:
        known = ", ".join(f"{s}://" for s in _SCHEMES)
        raise RunError(f"{path}: {scheme}:// is not a known storage scheme{did_you_mean(scheme, _SCHEMES)}; there are {known}")
    found = epath.Path(path)
    _reach(found)
    return found


def run_folder(name: str, path) -> epath.Path:
    """`of_user` of a folder with checkpoints. name: the flag or knob that gives it.

    Raises RunError where it is in an object store other than gs://: Orbax writes checkpoints to no other, and would tell so
    at the first one, hours later.
    """
    scheme = None if is_local(path) else os.fspath(path).partition("://")[0]
    if scheme in _SCHEMES and scheme != "gs":
        raise RunError(f"{name}={path}: no checkpoints at {scheme}://; expected a folder of this machine or at gs://")
    return of_user(path)


def _reach(path: epath.Path) -> None:
    """Asks for a path that need not exist: whether one does is answered with no where the storage cannot be reached."""
    for noisy in ("gcsfs", "google.auth"):  # they log as tracebacks what they also raise
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    failed: list[Exception] = []

    def ask():
        try:
            path.stat()
        except FileNotFoundError:
            return
        except Exception as e:  # those of Google's, Amazon's and others' libraries have no class in common
            failed.append(e)

    asking = threading.Thread(target=ask, daemon=True)  # some of them wait for ever for a network that drops what is sent
    asking.start()
    asking.join(_SECONDS)
    if asking.is_alive():
        raise unreachable(os.fspath(path), f"no answer within {_SECONDS:.0f} s")
    if failed:
        e = failed[0]
        raise (without_package(path, e) if isinstance(e, ImportError) else unreachable(os.fspath(path), e)) from None


def local(name: str, path: str) -> Path:
    """A path of this machine, ~ spelled out. name: the flag or knob that gives it. Raises RunError for one of an object store.

    pathlib would take gs://BUCKET for a folder `gs:` below the current one.
    """
    if not is_local(path):
        raise RunError(f"{name}={path}: an object store; expected a path of this machine")
    return Path(os.path.expanduser(path))  # pathlib's raises an error of its own where ~NAME is nobody


@contextlib.contextmanager
def appearing_whole(path: Path) -> Iterator[Path]:
    """A name beside `path` for a file or folder, which becomes `path` where the block ends well, and goes where it does not.

    Every call has a name of its own: machines that share a disk may have the same process numbers. Raises OSError.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield beside
        beside.replace(path)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)


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

    def take(self, folder: os.PathLike, where: str = "") -> bool:
        """Whether it is held now, also where it was before. Raises RunError where another process has it.

        where: what the message begins with; "": the folder, as a --workdir.
        """
        if self._fd is not None or not is_local(folder):
            return self._fd is not None
        fd = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(fd)
            if isinstance(e, BlockingIOError):
                where = where or f"--workdir={folder}"
                raise RunError(f"{where}: in use by another process; wait for its end, or give a new folder") from None
        else:
            self._fd = fd
        return self._fd is not None
