"""TensorFlow Datasets prepared as array_record, with random access and without TensorFlow."""

import contextlib
import os
import re

from gpt4o_jax.data.records import Blocks, Take, first_line
from gpt4o_jax.errors import data_error, did_you_mean

_RECORDS = 1024  # read at once
_SPEC = re.compile(r"(?P<name>[\w./*-]+(:\d[\w.*]*)?):(?P<split>\w+(\[[^\]]*\])?(\+\w+(\[[^\]]*\])?)*)")


def documents(spec: str, data_dir: str, field: str, take: Take | None = None) -> Blocks:
    """The strings of feature `field`, or what `take` makes of whole records.

    spec: NAME[/CONFIG][:VERSION]:SPLIT, such as 'lm1b:train[:90%]'. data_dir: empty for the default of TFDS. Raises RunError if
    the dataset is unknown, not prepared here, damaged, or not text.
    """
    builder, _, source = _open(spec, data_dir)
    if take is None and field not in builder.info.features:
        names = ", ".join(builder.info.features)
        raise data_error(f"tfds {spec}: no feature {field!r} (there are {names}); set data.field")

    try:
        size = len(source)
    except ValueError:  # for train[5:2], whose size is -3 records in TFDS
        size = 0

    def read(block: int) -> list[str]:
        first = block * _RECORDS
        try:
            values = [source[i] if take else source[i][field] for i in range(first, min(first + _RECORDS, size))]
        except ImportError as e:
            raise data_error(f"tfds {spec}: its features cannot be decoded without TensorFlow ({e})") from None
        except (OSError, RuntimeError, ValueError, IndexError) as e:
            raise data_error(f"tfds {spec}: damaged from record {first} on ({first_line(e)}); prepare it again") from None
        where = [f"tfds {spec}: record {first + n}" for n in range(len(values))]
        if take is not None:
            return [take(_plain(v, place), place) for v, place in zip(values, where, strict=True)]
        return [_text(v, place, field) for v, place in zip(values, where, strict=True)]

    whole, rest = divmod(size, _RECORDS)
    return Blocks([_RECORDS] * whole + [rest] * (rest > 0), read)


def files(spec: str, data_dir: str) -> tuple[str, list]:
    """("NAME/CONFIG/VERSION SPLIT RECORDS", the files of the split, sorted). Raises RunError as `documents` does."""
    builder, split, _ = _open(spec, data_dir)
    info = builder.info.splits[split]
    return f"{builder.info.full_name} {split} {info.num_examples}", sorted(info.filepaths)


def _text(value, where: str, field: str) -> str:
    if value is None:  # what array_record silently returns for records lost in a truncated file
        raise data_error(f"{where} is damaged (no {field!r} in it); prepare the dataset again")
    try:
        text = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as e:
        raise data_error(f"{where}: {field!r} is not UTF-8 (byte 0x{value[e.start]:02x} at {e.start})") from None
    if not isinstance(text, str):
        raise data_error(f"{where}: {field!r} is of type {type(value).__name__}, expected text; set data.field")
    return text


def _plain(value, where: str, name: str = "record"):
    """A TFDS record as JSON types: dicts, lists, strings, numbers."""
    if isinstance(value, dict):
        return {key: _plain(v, where, key) for key, v in value.items()}
    if value is None or isinstance(value, bytes):
        return _text(value, where, name)
    value = value.tolist() if hasattr(value, "tolist") else value
    return [_plain(v, where, name) for v in value] if isinstance(value, list) else value


def _open(spec: str, data_dir: str):
    """(builder, split, random-access source). Raises RunError."""
    import tensorflow_datasets as tfds

    parts = _SPEC.fullmatch(spec)
    if not parts:
        raise data_error(f"tfds {spec}: expected NAME/CONFIG:SPLIT, for example lm1b:train or wiki40b/en:train[:90%]")
    name, split = parts["name"], parts["split"]
    prepare = f"run `python -m gpt4o_jax data prepare --tfds={name}" + (f" --data_dir={data_dir}`" if data_dir else "`")
    builder = None
    with _quiet():
        try:
            builder = tfds.builder(name, data_dir=os.path.expanduser(data_dir) or None)
            source = builder.as_data_source(split=split)
        except tfds.core.DatasetNotFoundError:
            hint = did_you_mean(re.split("[/:]", name)[0], tfds.list_builders(with_community_datasets=False))
            where = data_dir or "TFDS's own data_dir"
            raise data_error(f"tfds {spec}: {where} holds no such dataset, and TFDS knows none{hint}; {prepare}") from None
        except (NotImplementedError, AssertionError, FileNotFoundError) as e:
            if builder is None:
                raise data_error(f"tfds {spec}: {first_line(e)}; {prepare}") from None
            kind = builder.info.file_format.value
            found = f"prepared as {kind}, expected array_record; remove it and" if builder.is_prepared() else "not prepared;"
            raise data_error(f"tfds {spec}: in {builder.data_dir} it is {found} {prepare}") from None
        except ImportError as e:
            raise data_error(f"tfds {spec}: cannot be opened without TensorFlow ({first_line(e)}); {prepare}") from None
        except (ValueError, OSError, RuntimeError) as e:
            raise data_error(f"tfds {spec}: {str(e)[:300]}") from None
    return builder, split, source


@contextlib.contextmanager
def _quiet():
    """Hides TFDS's warnings about the folders it searches."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
