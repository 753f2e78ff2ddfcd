"""Which parameters are hidden matrices, determined from the logical names of their axes."""

from typing import NamedTuple

STACKED = ("layers", "ahead")  # axes of stacked modules: layers, and multi-token prediction heads
_FIXED = ("rank", "expert")  # axes of a matrix whose size does not grow with the width of the model


class Matrix(NamedTuple):
    """The axes of a weight that its product sums over (rows) and produces (columns); the other axes are stacked."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]


def hidden_matrix(names: tuple[str, ...]) -> Matrix | None:
    """The row (summed over) and column axes of a weight's matrix; None if it is not a hidden matrix.

    A hidden matrix reads from the residual stream ("embed" first) or writes to it ("embed" last); one end of an adapter's is its
    rank. Every expert has its own.
    """
    stacked = STACKED if names[-1] == "expert" else (*STACKED, "expert")  # a router's columns are the experts
    axes = [i for i, name in enumerate(names) if name not in stacked]
    if len(axes) < 2 or {"vocab", "position"} & set(names) or not set(STACKED) & set(names):
        return None
    if names[axes[0]] in ("embed", "rank"):
        return Matrix((axes[0],), tuple(axes[1:]))
    if names[axes[-1]] in ("embed", "rank"):
        return Matrix(tuple(axes[:-1]), (axes[-1],))
    return None  # such as a bias per head: (heads, head_dim)


def grows(names: tuple[str, ...]) -> tuple[bool, bool]:
    """Whether a weight's (fan-in, fan-out) grows with the width of the model; (False, False) if it is not a hidden matrix."""
    matrix = hidden_matrix(names)
    return (False, False) if matrix is None else (names[matrix.rows[0]] not in _FIXED, names[matrix.columns[0]] not in _FIXED)


def is_names(x) -> bool:
    """Whether x is a leaf of a tree of axis names."""
    return isinstance(x, tuple)
