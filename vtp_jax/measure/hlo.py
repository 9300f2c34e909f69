"""Analyses the text of a compiled program: its collectives, and the time of its parts.

XLA's own cost analysis counts the body of a loop once, whatever its length. Here it counts once per
iteration, because scans over layers are most of a training step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter",
)  # fmt: skip
BYTES = dict(pred=1, s4=1, u4=1, s8=1, u8=1, s16=2, u16=2, bf16=2, f16=2, s32=4, u32=4, f32=4) | (
    dict(s64=8, u64=8, f64=8, c64=8, c128=16)
)

_BEGIN = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_CALL = re.compile(r" = (.*?) ([a-z][a-z-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_PLACED = re.compile(_SHAPE.pattern + r"(\{[^}]*\})?")


class Use(NamedTuple):
    """A line of the program, and the number of times it runs in one call."""

    line: str
    times: int


def traffic(text: str) -> dict[str, int]:
    """Bytes that each device receives from collectives in one call of the program, by kind."""
    found: dict[str, int] = {}
    for line, times in _walk(text, fused=True):
        result, kind = _operation(line)
        started = kind.endswith("-start")
        kind = kind.removesuffix("-start")
        if kind in COLLECTIVES:
            sizes = [_bytes(*shape) for shape in _SHAPE.findall(result) if shape[1]]
            if started and kind != "all-reduce":  # (operands, results)
                sizes = sizes[len(sizes) // 2 :]
            found[kind] = found.get(kind, 0) + times * sum(sizes)
    return found


def seconds(text: str, clock: float, bandwidth: float) -> float:
    """Estimated seconds of a TPU for one call of the program, one part after the other; 0 for
    programs of other compilers. clock: cycles per second; bandwidth: of the chip's memory, in bytes
    per second.

    The TPU compiler estimates the cycles of every part. Its estimates are good for products. For
    parts that only read and write memory they are up to ten times too high, so the time that the
    bandwidth implies is used if it is lower.
    """
    computations, _ = _split(text)
    lines = [line for part in computations.values() for line in part]
    results = {_name(line): _operation(line)[0] for line in lines}

    def multiplies(line: str) -> bool:
        inner = [each for name in _named(line, "calls") for each in computations[name]]
        return _operation(line)[1] == "convolution" or any(map(multiplies, inner))

    def moved(line: str) -> int:
        result, kind = _operation(line)
        given = line.split(f" {kind}(", 1)[1].split(")", 1)[0]
        used = [results.get(name, "") for name in re.findall(r"%([\w.-]+)", given)]
        return sum(_bytes(*shape) for shape in _in_memory(result, *used))

    found = 0.0
    for line, times in _walk(text, fused=False):
        if estimate := re.search(r'"estimated_cycles":"(\d+)"', line):
            took = int(estimate[1]) / clock
            found += times * (took if multiplies(line) else min(took, moved(line) / bandwidth))
    return found


def _walk(text: str, fused: bool) -> Iterator[Use]:
    """Every line that runs, with its count; the lines inside fusions only if `fused`."""
    computations, entry = _split(text)

    def visit(name: str, times: int) -> Iterator[Use]:
        for line in computations[name]:
            yield Use(line, times)
            _, kind = _operation(line)
            if kind == "while":
                condition, body = (_named(line, key)[0] for key in ("condition", "body"))
                yield from visit(body, times * _length(line, computations[condition]))
            elif kind != "fusion" or fused:
                called = _named(line, "calls") + _named(line, "branch_computations")
                # `to_apply` is a scalar function in reductions, but a computation in calls.
                called += _named(line, "to_apply") if kind == "call" else []
                for inner in called:
                    yield from visit(inner, times)

    return visit(entry, 1)


def _split(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation by name, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if begun := _BEGIN.match(line):
            lines = computations[begun[2]] = []
            entry = begun[2] if begun[1] else entry
        elif " = " in line:
            lines.append(line)
    return computations, entry


def _name(line: str) -> str:
    return line.split(" = ", 1)[0].split("%")[-1].strip()


def _in_memory(*results: str) -> Iterator[tuple[str, str]]:
    """(dtype, dims) of the arrays in the chip's main memory; S(1) is the memory next to its
    units."""
    for text in results:
        for dtype, dims, layout in _PLACED.findall(text):
            if dims and "S(1)" not in layout:
                yield dtype, dims


def _operation(line: str) -> tuple[str, str]:
    """The text of the result's shapes, and the name of the operation."""
    found = _CALL.search(line)
    return (found[1], found[2]) if found else ("", "")


def _named(line: str, key: str) -> list[str]:
    """The computations that a line lists under `key`: one, or several in braces."""
    found = re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|%?([\w.-]+))", line)
    return re.findall(r"[\w.-]+", found[1] or found[2] or "") if found else []


def _length(line: str, condition: list[str]) -> int:
    """Iterations of a loop: XLA's own count, or else the bound that its counter is compared
    with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    bounds = [int(n) for c in condition for n in re.findall(r" s32\[\]\S* constant\((\d+)\)", c)]
    return max(bounds, default=1)


def _bytes(dtype: str, dims: str) -> int:
    return BYTES.get(dtype, 1) * math.prod(int(n) for n in dims.split(","))
