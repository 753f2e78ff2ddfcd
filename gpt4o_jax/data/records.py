"""Documents in JSONL and Parquet files, one per line or row, read in blocks and never all at once."""

import bisect
import codecs
import functools
import itertools
import json
from collections.abc import Callable, Sequence

from gpt4o_jax.errors import data_error, lone_surrogate

_LINES = 1024  # of a JSONL file, read at once


class Blocks(Sequence[str]):
    """Documents stored in blocks that are read whole; the two read last stay in memory."""

    def __init__(self, sizes: Sequence[int], read: Callable[[int], list[str]]):
        """sizes: documents in each block. read(block): its documents."""
        self._ends = list(itertools.accumulate(sizes))
        self.largest = max(sizes, default=0)
        self._read = functools.lru_cache(maxsize=2)(read)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(i)
        block = bisect.bisect_right(self._ends, i)
        return self._read(block)[i - (self._ends[block - 1] if block else 0)]


# ---------------------------------------------------------------- JSONL


Take = Callable[[dict, str], str]  # (record, its location) -> document; raises RunError


def jsonl(paths: Sequence, field: str, take: Take | None = None) -> Blocks:
    """The strings under key `field`, one JSON object per line; blank lines give ''. take: makes documents of whole records.

    Raises RunError if a file cannot be read and, when a block is read, for an invalid line, with file and line number.
    """
    blocks = [block for path in paths for block in _line_blocks(path)]

    def read(i: int) -> list[str]:
        path, begin, end, first, _ = blocks[i]
        with path.open("rb") as f:
            f.seek(begin)
            lines = f.read(end - begin).split(b"\n")
        return [_json_text(path, first + n, line, field, take) for n, line in enumerate(lines[: blocks[i][-1]])]

    return Blocks([lines for *_, lines in blocks], read)


def _line_blocks(path):
    """(path, first byte, end, number of its first line from 1, line count) of each block of a file."""
    begin = end = lines = first = 0
    try:
        with path.open("rb") as f:
            for line in f:
                end, lines = end + len(line), lines + 1
                if lines == _LINES:
                    yield path, begin, end, first + 1, lines
                    begin, first, lines = end, first + lines, 0
    except OSError as e:
        raise data_error(f"{path}: cannot read ({e.strerror or e})") from None
    if lines:
        yield path, begin, end, first + 1, lines


def _json_text(path, number: int, line: bytes, field: str, take: Take | None) -> str:
    line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as e:
        raise data_error(f"{path}:{number}: not UTF-8 (byte 0x{line[e.start]:02x}); expected one JSON object a line") from None
    except (ValueError, RecursionError) as e:
        raise data_error(f"{path}:{number}: not JSON ({e}); expected one JSON object a line") from None
    if not isinstance(record, dict):
        raise data_error(f"{path}:{number}: a JSON {type(record).__name__}, expected an object with the key {field!r}")
    if take is not None:
        return take(record, f"{path}:{number}")
    if field not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "no keys"
        raise data_error(f"{path}:{number}: no key {field!r} (there are {keys}); set data.field")
    if not isinstance(record[field], str):
        raise data_error(f"{path}:{number}: {field!r} is {json.dumps(record[field])[:40]}, expected a string")
    if lone := lone_surrogate(record[field]):
        raise data_error(f"{path}:{number}: {field!r} is not valid Unicode: {lone}; leave it out")
    return record[field]


# ---------------------------------------------------------------- Parquet


def parquet(paths: Sequence, field: str, take: Take | None = None) -> Blocks:
    """The strings of column `field`, one row group at a time. take: makes documents of whole rows.

    Raises RunError if a file is damaged, the column is missing or does not hold strings, and, when a block is read, for
    damaged pages and null values.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def opened(path) -> pq.ParquetFile:
        try:
            raw = path.open("rb")
        except OSError as e:
            raise data_error(f"{path}: cannot read ({e.strerror or e})") from None
        try:
            return pq.ParquetFile(raw)
        except (pa.ArrowException, OSError) as e:
            raise data_error(f"{path}: not a whole Parquet file ({first_line(e)})") from None

    blocks = []
    for path in paths:
        with opened(path) as file:
            names = file.schema_arrow.names
            if take is not None:
                blocks += [(path, g, file.metadata.row_group(g).num_rows) for g in range(file.num_row_groups)]
                continue
            if field not in names:
                raise data_error(f"{path}: no column {field!r} (there are {', '.join(names)}); set data.field")
            if names.count(field) > 1:
                raise data_error(f"{path}: {names.count(field)} columns are named {field!r}, expected one; rename the others")
            kind = file.schema_arrow.field(field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise data_error(f"{path}: column {field!r} is of {kind}, expected strings")
            blocks += [(path, g, file.metadata.row_group(g).num_rows) for g in range(file.num_row_groups)]

    def read(i: int) -> list[str]:
        path, group, _ = blocks[i]
        try:
            with opened(path) as file:
                table = file.read_row_group(group, columns=None if take else [field])
                # Selected again by name: for "a.text" pyarrow also reads the field `text` of a column `a`.
                values = table.to_pylist() if take else table.column(field).to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
            raise data_error(f"{path}: row group {group} is damaged ({first_line(e)})") from None
        if take is not None:
            return [take(row, f"{path}: row {n} of row group {group}") for n, row in enumerate(values)]
        if None in values:
            raise data_error(f"{path}: row {values.index(None)} of row group {group}: {field!r} is null, expected a string")
        return values

    return Blocks([rows for *_, rows in blocks], read)


def first_line(e: Exception) -> str:
    """The first line of another library's error message."""
    return (str(e).splitlines() or [type(e).__name__])[0]
