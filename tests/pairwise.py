"""A few cases instead of a full product: any two values of two options occur together in one of them."""

import itertools


def product(options: dict[str, list]) -> list[dict]:
    """Every combination of one value of each option."""
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def pairwise(options: dict[str, list]) -> list[dict]:
    """Cases of the full product, each the one with the most pairs not yet covered, until all are."""
    cases = product(options)
    pairs = [{(a, str(case[a]), b, str(case[b])) for a, b in itertools.combinations(options, 2)} for case in cases]
    unseen, chosen = set().union(*pairs), []
    while unseen:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & unseen))
        unseen -= pairs[best]
        chosen.append(cases[best])
    return chosen
