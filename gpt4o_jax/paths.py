"""Paths on this machine and in object stores: gs://BUCKET/PATH."""

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

_SCHEMES = ("gs", "s3", "az", "hf")  # known to etils.epath
_SECONDS = 90.0  # limit for an object store's first answer; gcsfs gives up after 50 if a host name is unknown


def is_local(path) -> bool:
    return "://" not in os.fspath(path)


def absolute(path) -> epath.Path:
    """The path, independent of the current folder. Those of object stores already are."""
    return epath.Path(os.path.abspath(path) if is_local(path) else path)


def of_user(path) -> epath.Path:
    """A path given by the user, with ~ expanded.

    Raises RunError for an object store of an unknown kind (2), whose package is not installed (2), or that cannot be reached (5).
    """
    if is_local(path):
        return epath.Path(os.path.expanduser(path))  # Path.expanduser would raise its own error for an unknown ~NAME
    scheme = os.fspath(path).partition("://")[0]
    if scheme not in _SCHEMES:
        known = ", ".join(f"{s}://" for s in _SCHEMES)
        raise RunError(f"{path}: {scheme}:// is not a known storage scheme{did_you_mean(scheme, _SCHEMES)}; there are {known}")
    found = epath.Path(path)
    _reach(found)
    return found


def entries(folder: epath.Path) -> list[epath.Path]:
    """What is in a folder. Without the empty object by which Google's console shows a new folder: epath lists it as a member."""
    return [p for p in folder.iterdir() if is_local(folder) or p.name != folder.name or p.exists()]


def run_folder(name: str, path) -> epath.Path:
    """`of_user` for a folder with checkpoints. name: the flag or knob that gives it.

    Also raises RunError for object stores other than gs://: Orbax cannot write checkpoints there, and would only say so at the
    first one, hours later.
    """
    scheme = None if is_local(path) else os.fspath(path).partition("://")[0]
    if scheme in _SCHEMES and scheme != "gs":
        raise RunError(f"{name}={path}: no checkpoints at {scheme}://; expected a folder of this machine or at gs://")
    return of_user(path)


def _reach(path: epath.Path) -> None:
    """Looks up a path that need not exist. `exists` would answer no for storage that cannot be reached; this raises RunError."""
    for noisy in ("gcsfs", "google.auth"):  # they also log, as tracebacks, what they raise
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    failed: list[Exception] = []

    def ask():
        try:
            # gcsfs keeps listings, and would not see what other processes and TensorStore write or delete.
            from fsspec.config import conf

            conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
            path.stat()
        except FileNotFoundError:
            return
        except Exception as e:  # the storage libraries' exceptions have no class in common
            failed.append(e)

    asking = threading.Thread(target=ask, daemon=True)  # some libraries wait forever on a network that drops packets
    asking.start()
    asking.join(_SECONDS)
    if asking.is_alive():
        raise unreachable(os.fspath(path), f"no answer within {_SECONDS:.0f} s")
    if failed:
        e = failed[0]
        raise (without_package(path, e) if isinstance(e, ImportError) else unreachable(os.fspath(path), e)) from None


def local(name: str, path: str) -> Path:
    """A path on this machine, with ~ expanded. name: the flag or knob that gives it. Raises RunError for one in an object store.

    pathlib would read gs://BUCKET as a folder `gs:` below the current one.
    """
    if not is_local(path):
        raise RunError(f"{name}={path}: an object store; expected a path of this machine")
    return Path(os.path.expanduser(path))


@contextlib.contextmanager
def appearing_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` for a file or folder: renamed to `path` if the block succeeds, removed if it fails.

    The name is unique to the call: machines that share a disk may have equal process ids. Raises OSError.
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


def upload(here: Path, there: epath.Path) -> None:
    """Copies the files below a folder of this machine to another folder, perhaps of an object store."""
    for path in sorted(p for p in here.rglob("*") if p.is_file()):
        target = there / path.relative_to(here).as_posix()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())


def without_package(path, e: ImportError) -> RunError:
    hint = "pip install gcsfs" if os.fspath(path).startswith("gs://") else "install it with pip"
    return RunError(f"{path}: this kind of storage needs another package ({e}): {hint}")


class Hold(contextlib.AbstractContextManager):
    """The right to write in a folder, held by one process at a time, and released when the process ends, however it ends.

    The folder itself is locked, so no file is left behind. Nothing is held in object stores, which have no locks, nor on file
    systems without them, such as NFS, where the lock of a lost machine would block its successor.
    """

    def __init__(self):
        self._fd: int | None = None

    def __exit__(self, *_) -> None:
        if self._fd is not None:
            os.close(self._fd)

    def take(self, folder: os.PathLike, where: str = "") -> bool:
        """Takes the lock; whether it is held now, including from before. Raises RunError if another process holds it.

        where: start of the message; "": the folder, as a --workdir.
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
