"""Paths of this machine, and of object stores: gs://BUCKET/PATH."""

import os

from etils import epath


def is_local(path) -> bool:
    return "://" not in os.fspath(path)


def absolute(path) -> epath.Path:
    """The same place, whatever folder the process changes to. One of an object store is absolute as it is."""
    return epath.Path(os.path.abspath(path) if is_local(path) else path)
