"""SHA-256 of files; digests of large files are remembered by path, size and modification time."""

import contextlib
import hashlib
import time
from collections.abc import Iterable
from pathlib import Path

from etils import epath

from gpt4o_jax.errors import data_error
from gpt4o_jax.paths import absolute, appearing_whole

LARGE = 1 << 26  # bytes; below this, hashing takes less than a second
_SETTLED = 60.0  # seconds; a file modified more recently may change again with the same modification time


def digest(paths: Iterable, memory: Path) -> str:
    """One digest of the contents of files, in this order, whatever their paths. memory: folder for digests of large files.

    Raises RunError (exit code 3) if a file cannot be read.
    """
    whole = hashlib.sha256()
    for path in paths:
        whole.update(bytes.fromhex(_one(epath.Path(path), memory)))
    return whole.hexdigest()


def _one(path: epath.Path, memory: Path) -> str:
    try:
        stat = path.stat()
        key = hashlib.sha256(f"{absolute(path)}\0{stat.length}\0{stat.mtime}".encode()).hexdigest()
        remembered = stat.length >= LARGE and stat.mtime > 0  # some object stores report no time
        if remembered and (memory / key).exists():
            return (memory / key).read_text()
        with path.open("rb") as f:
            made = hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise data_error(f"{path}: cannot read ({e.strerror or e})") from None
    if remembered and time.time() - stat.mtime > _SETTLED:
        with contextlib.suppress(OSError), appearing_whole(memory / key) as beside:  # on a full disk only this digest is lost
            beside.write_text(made)
    return made
