"""First-fit packing: which pieces of which documents share a row.

T row length in tokens (a row also holds the token after its last, as a target)
"""

import heapq
import math

import numpy as np


def pieces(lengths: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts documents of these lengths into pieces of at most T + 1 tokens: (document, first token, length) of each piece.

    Consecutive pieces of a document share one token: the last target of one is the first input of the next.
    """
    count = -(-(lengths - 1) // T)
    document = np.repeat(np.arange(len(lengths)), count)
    first = (np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)) * T
    return document, first, np.minimum(lengths[document] - first, T + 1)


def first_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Puts each piece, in order, into the first row with room for it. Returns (row of each piece, number of rows).

    About 5 microseconds a piece: the rows with the same free room form a heap, and minima of the heap tops over blocks of
    sqrt(capacity) amounts of room find the first row with enough.
    """
    rows = np.empty(len(lengths), np.int64)
    whole = lengths == capacity  # fill a row alone: left out of the search, their rows come last
    side = math.isqrt(capacity) + 1
    none = len(lengths)
    heaps: list[list[int]] = [[] for _ in range(capacity + 1)]
    tops, block_tops = [none] * (side * side), [none] * side  # by free room; by block of it
    free: list[int] = []  # room in each row
    found = []
    for need in lengths[~whole].tolist():
        block = need // side
        row = min(min(tops[need : (block + 1) * side]), min(block_tops[block + 1 :], default=none))
        if row == none:
            row = len(free)
            free.append(capacity - need)
        else:
            room = free[row]
            heapq.heappop(heaps[room])
            tops[room] = heaps[room][0] if heaps[room] else none
            block = room // side
            block_tops[block] = min(tops[block * side : (block + 1) * side])
            free[row] = room - need
        room = free[row]
        heapq.heappush(heaps[room], row)
        if row < tops[room]:
            tops[room] = row
            block_tops[room // side] = min(block_tops[room // side], row)
        found.append(row)
    rows[~whole] = found
    n_whole = int(np.count_nonzero(whole))
    rows[whole] = len(free) + np.arange(n_whole)
    return rows, len(free) + n_whole
