"""What a compiled program sends between devices, and what a device holds."""

import re

import numpy as np

KINDS = r" (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def most_moved(hlo: str) -> int:
    """The most numbers that one collective of the program gives back to a device."""
    lines = [line for line in hlo.splitlines() if re.search(KINDS, line)]
    results = [re.split(KINDS, line.split(" = ", 1)[1])[0] for line in lines]
    assert results, "nothing moves: is anything split over devices?"
    return max(map(largest, results))


def largest(hlo: str) -> int:
    """The most numbers that one array of the program has, on one device."""
    shapes = re.findall(r"\w+\[([\d,]*)\]", hlo)
    return max(int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes)
