"""Sizes in a compiled program: of its collectives, and of the arrays on a device."""

import re

import numpy as np

KINDS = r" (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def most_moved(hlo: str) -> int:
    """The number of elements in the largest result of a collective, on one device."""
    lines = [line for line in hlo.splitlines() if re.search(KINDS, line)]
    results = [re.split(KINDS, line.split(" = ", 1)[1])[0] for line in lines]
    assert results, "no collectives: is anything split over devices?"
    return max(map(largest, results))


def largest(hlo: str) -> int:
    """The number of elements in the largest array of the program, on one device."""
    shapes = re.findall(r"\w+\[([\d,]*)\]", hlo)
    return max(int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes)
