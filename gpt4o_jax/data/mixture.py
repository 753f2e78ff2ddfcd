"""Mixtures: the sources of a run, and the text that their common tokenizer is trained on."""

import dataclasses
from collections.abc import Iterator, Sequence
from fractions import Fraction

from gpt4o_jax import config_mixture
from gpt4o_jax.config import DataConfig
from gpt4o_jax.errors import data_error


def members(config: DataConfig) -> list[tuple[Fraction, DataConfig]]:
    """(share of the rows, config of that source alone) for each source; shares add up to 1."""
    if config.source != "mixture":
        return [(Fraction(1), config)]
    parsed = config_mixture.parse_all(config.mixture, config.field)
    total = sum(m.weight for m in parsed)
    alone = [_alone(config, m) for m in parsed]
    return [(m.weight / total, c) for m, c in zip(parsed, alone, strict=True)]


def _alone(config: DataConfig, m: config_mixture.Member) -> DataConfig:
    chosen = {"field": m.field} if m.field else {}
    if m.field.startswith(config_mixture.READER):
        chosen = {"reader": m.field.removeprefix(config_mixture.READER)}
    return dataclasses.replace(config, source=m.source, path=m.path, mixture=(), **chosen)


def fair_text(parts: Sequence[Sequence[str]], shares: Sequence[Fraction], limit: int) -> Iterator[str]:
    """Documents of all parts, with the bytes per part in proportion to the shares.

    As many bytes in total as the parts have, at most `limit`. A part with more than its share gives evenly spaced documents and a
    piece of its longest; a part with less is repeated. Raises RunError if a part is empty.
    """
    sizes = [sum(len(d.encode()) for d in part) for part in parts]
    if 0 in sizes:
        raise data_error("the hold-out leaves no text to train on; use more text, or a smaller data.holdout_fraction")
    total = min(limit, sum(sizes))
    for part, share, size in zip(parts, shares, sizes, strict=True):
        copies, rest = divmod(share * total / size, 1)
        for _ in range(int(copies)):
            yield from part
        owed, longest = 0.0, ""  # characters; never more than the longest document has
        for d in part if rest else ():
            owed, longest = owed + float(rest) * len(d), max(longest, d, key=len)
            if owed >= len(d):
                yield d
                owed -= len(d)
        if round(owed) > 0:
            yield longest[: round(owed)]  # otherwise a part of few long documents might give nothing
