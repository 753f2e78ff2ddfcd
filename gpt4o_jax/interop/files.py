"""The safetensors files of a Hugging Face folder: checked against their index, read in parts, written in shards.

Pickle files (.bin, .pt) are never opened: loading one runs whatever code it contains.
"""

import collections
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt4o_jax.errors import ExitCode, RunError, data_error

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16")}  # and BF16, which NumPy has from ml_dtypes
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_PICKLE_INDEX = ".bin.index.json"


def import_safetensors():
    """The library. Raises RunError, which says how to install it, if it is missing."""
    try:
        import ml_dtypes  # noqa: F401  (gives NumPy bfloat16, which safetensors asks it for)
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise RunError("convert needs safetensors: pip install -r requirements-interop.txt") from None
    return safetensors


class Entry(NamedTuple):
    file: str
    dtype: str  # as safetensors names it: F32, BF16, ...
    shape: tuple[int, ...]


class Weights:
    """The tensors of a folder, memory-mapped and read on demand. entries: by name.

    Raises RunError if there are no safetensors files, or they are damaged or do not match their index.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._open = {}
        self.entries: dict[str, Entry] = {}
        index = _read_index(folder)
        for file in dict.fromkeys(index.values()) if index else [SINGLE]:
            self._add(file, index)
        if index:
            _check_index(folder, index, self.entries)

    def _add(self, file: str, index: dict[str, str] | None) -> None:
        safetensors = import_safetensors()
        path = _inside(self.folder, file)
        _refuse_twice(path)
        try:
            handle = safetensors.safe_open(path, framework="numpy")
        except FileNotFoundError:
            raise data_error(f"{self.folder}: {INDEX} names {file}, which is not there") from None
        except (safetensors.SafetensorError, OSError) as e:
            raise data_error(f"{path}: not a whole safetensors file ({e}); is the download complete?") from None
        self._open[file] = handle
        for name in handle.keys():  # noqa: SIM118  (no mapping)
            if name in self.entries:
                raise data_error(f"{self.folder}: tensor {name} is twice, in {self.entries[name].file} and in {file}")
            if index and name not in index:
                raise data_error(f"{path}: holds {name}, of which {INDEX} knows nothing")
            part = handle.get_slice(name)
            self.entries[name] = Entry(file, part.get_dtype(), tuple(part.get_shape()))

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """A part of one tensor, copied out of the file."""
        return self._open[self.entries[name].file].get_slice(name)[slices]


def _read_index(folder: Path) -> dict[str, str] | None:
    """tensor -> file, or None if the weights are in one file. Raises RunError if there are no weights we can read."""
    if not folder.is_dir():
        raise data_error(f"{folder}: no such folder; --from takes a folder as the Hugging Face Hub lays it out")
    single, path = folder / SINGLE, folder / INDEX
    if single.exists() and path.exists():
        raise data_error(f"{folder}: holds both {SINGLE} and {INDEX}; remove the one that is not meant")
    if single.exists():
        return None
    if not path.exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES or p.name.endswith(_PICKLE_INDEX))
        if pickles:
            what = "the index of pickle files" if pickles[0].endswith(_PICKLE_INDEX) else "a pickle file"
            raise data_error(
                f"{folder}: {pickles[0]} is {what}, and loading one runs any program that it holds; save the model as"
                " safetensors (transformers: save_pretrained does) and convert that"
            )
        raise data_error(f"{folder}: neither {SINGLE} nor {INDEX}; expected a folder as the Hugging Face Hub lays it out")
    try:
        index = json.loads(path.read_text())["weight_map"]
        if not index or not all(isinstance(x, str) for item in index.items() for x in item):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        raise data_error(f"{path}: damaged; expected a JSON object with weight_map, from tensors to files") from None
    return index


def _inside(folder: Path, file: str) -> Path:
    """folder / file, if it is a file in that folder: an index is untrusted and must not lead out of it. Else raises RunError.

    The Hub's own cache has links from snapshots/REVISION to files in the blobs folder beside it: these count as inside.
    """
    path = folder / file
    if file != Path(file).name or file in ("", ".", "..") or "\\" in file or not file.endswith(".safetensors"):
        raise data_error(f"{folder / INDEX}: {file!r} is not the name of a safetensors file in this folder")
    allowed = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parent.parent / "blobs")
    try:
        place = path.resolve()
    except (OSError, ValueError, RuntimeError) as e:  # invalid characters in a file name, or a link to itself
        raise data_error(f"{folder / INDEX}: {file!r} is no file ({e})") from None
    if place.parent not in allowed:
        raise data_error(f"{path}: a link to {place}, outside the folder; copy the file here if it is meant")
    return path


def _refuse_twice(path: Path) -> None:
    """Raises RunError if a header names a tensor twice: the library would take either, or fail without saying why."""
    try:
        with path.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            names = [name for name, _ in json.loads(f.read(min(size, path.stat().st_size)), object_pairs_hook=list)]
    except (OSError, ValueError, TypeError, RecursionError):
        return  # not a safetensors file: the library says so
    again = sorted(name for name, n in collections.Counter(names).items() if n > 1)
    if again:
        raise data_error(f"{path.parent}: tensor {again[0]} is twice, both times in {path.name}")


def _check_index(folder: Path, index: dict[str, str], entries: dict[str, Entry]) -> None:
    for name, file in index.items():
        if name not in entries:
            raise data_error(f"{folder}: {INDEX} says that {file} holds {name}, which it does not")
        if entries[name].file != file:
            raise data_error(f"{folder}: {INDEX} says that {name} is in {file}, but it is in {entries[name].file}")
    metadata = json.loads((folder / INDEX).read_text()).get("metadata") or {}
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    found = sum(math.prod(e.shape) * _bits(e.dtype) // 8 for e in entries.values())
    if said is not None and said != found:
        raise data_error(f"{folder}: {INDEX} says total_size={said}, but the tensors are {found} bytes; is a file missing?")


def _bits(dtype: str) -> int:
    digits = "".join(c for c in dtype.removeprefix("BF").lstrip("FIU").split("_")[0] if c.isdigit())
    return 8 if dtype == "BOOL" else int(digits or 8)


# ---------------------------------------------------------------- writing


def write(folder: Path, tensors: Iterable[tuple[str, tuple[int, ...]]], load, dtype: np.dtype, max_bytes: int) -> None:
    """Writes one file, or several of at most `max_bytes` with an index. tensors: (name, shape); load(name) -> array of `dtype`.

    The tensors of one file at a time are in memory. Raises RunError (exit code 5) if a file cannot be written.
    """
    st = import_safetensors().numpy
    shards = list(_shards(tensors, dtype.itemsize, max_bytes))
    index, total = {}, 0
    for i, names in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        arrays = {name: load(name) for name in names}
        index |= dict.fromkeys(names, file)
        total += sum(x.nbytes for x in arrays.values())
        try:
            st.save_file(arrays, folder / file, metadata={"format": "pt"})
        except Exception as e:
            raise RunError(f"{folder / file}: cannot write ({e}); free space and run the command again", ExitCode.STORAGE) from e
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")


def _shards(tensors, itemsize: int, max_bytes: int) -> Iterator[list[str]]:
    names, size = [], 0
    for name, shape in tensors:
        more = math.prod(shape) * itemsize
        if names and size + more > max_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names
