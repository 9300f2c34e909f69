"""Pickles, read without executing them.

A pickle is a program. Here it is interpreted, instruction by instruction, by a machine that handles
only data: a name in the pickle is looked up in a table of this project's functions, or rejected; no
Python name is imported or called. The reader of each kind of file supplies the table:
`convert.torch_files` for tensors, `read` below for plain data, such as captions.

A few bytes of a pickle can ask for a lot of work, since anything in it can be referred to again. So
there is a `Budget`, of which every instruction takes what it costs.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from vtp_jax.types import UserError

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
    "INT", "LONG", "FLOAT", "STRING", "UNICODE",  # Python 2's, written as text
}  # fmt: skip
# What Python raises for instructions that make no sense.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)
KEYS = (str, int, float, bool, bytes, type(None))
WORD = 2**63  # integers that are keys, sizes or counts are smaller
LONGEST = 1000  # characters of a Python name

INSTRUCTIONS = 1 << 24  # of a pickle, some 20 s; a list of ten million words has as many
COPIES = 1 << 24  # values, and characters of names, that are copied from one place to another
TUPLES = 1 << 13  # values in keys that are tuples, whose hashes a file can choose to be equal


class Inert:
    """A placeholder for an object that is not created: its class's name, arguments and state."""

    def __init__(self, name: str, *args: Any):
        self.name, self.args = name, args
        self.state: Any = None


class Budget:
    """What reading may still cost; UserError beyond it. instructions, copies: as the constants
    above."""

    def __init__(self, instructions: int | None = None, copies: int = COPIES):
        instructions = INSTRUCTIONS if instructions is None else instructions
        self.left = dict(instructions=instructions, copies=copies, tuples=TUPLES)

    def spend(self, what: str, count: int = 1) -> None:
        self.left[what] -= count
        check(self.left[what] >= 0, f"needs more {NEEDS[what]} than any data do")


NEEDS = dict(instructions="instructions", copies="copies of values", tuples="keys that are tuples")


def unpickle(
    file: io.BufferedReader | io.BytesIO,
    look_up: Callable[[str], Any],
    persistent: Callable[[Any], Any] | None = None,
    budget: Budget | None = None,
) -> Any:
    """The value of one pickle; leaves `file` at the end of that pickle.

    look_up: "module name" -> the function or value that replaces it; raises UserError otherwise
    persistent: persistent id -> the value that replaces it; None rejects such ids
    budget: what reading may cost; for several pickles together, the same for each

    A machine over `pickletools.genops`, which only disassembles, with the instructions that data
    need. Its stack holds plain data, `Inert` and the results of `look_up` and `persistent`, but no
    other function or class, so nothing else can be called. Raises UserError for anything it
    rejects, and Python's own errors for instructions that make no sense.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    budget = Budget() if budget is None else budget
    left = budget.left

    def take(start: int) -> list[Any]:
        items = stack[start:]
        del stack[start:]
        return items

    for op, arg, _ in pickletools.genops(file):
        name: str = op.name
        left["instructions"] -= 1
        if left["instructions"] < 0:
            budget.spend("instructions")
        match name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case _ if name in LITERALS:
                stack.append(arg)
            case _ if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE" | "FROZENSET":
                stack.append(tuple(take(marks.pop())))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(take(len(stack) - int(name[-1]))))
            case "LIST":
                stack.append(take(marks.pop()))
            case "DICT":
                items = take(marks.pop())
                stack.append({})
                _set_items(stack[-1], items, budget)
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = take(len(stack) - 1 if name == "APPEND" else marks.pop())
                top = stack[-1]
                check(type(top) is list, "adds to what is not a list")
                top.extend(items)
            case "SETITEM" | "SETITEMS":
                items = take(len(stack) - 2 if name == "SETITEM" else marks.pop())
                _set_items(stack[-1], items, budget)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(look_up(str(arg)))
            case "STACK_GLOBAL":
                module, attribute = take(len(stack) - 2)
                check(len(module) + len(attribute) < LONGEST, "has a name that is too long")
                stack.append(look_up(f"{module} {attribute}"))
            case "REDUCE" | "NEWOBJ":
                function, args = take(len(stack) - 2)
                # All that a function copies: itself, its arguments, and the first one's items.
                first = args[0] if type(args) is tuple and args else ()
                copied = len(first) if isinstance(first, (list, tuple, str, bytes)) else 0
                budget.spend("copies", len(args) + copied)
                stack.append(function(*args))
            case "BUILD":
                state = stack.pop()
                top = stack[-1]
                if isinstance(top, Inert):
                    top.state = state
                else:  # a state dict has the versions of its modules as its state
                    check(type(top) is dict, "gives a state to what has none")
            case "BINPERSID" if persistent is not None:
                stack.append(persistent(stack.pop()))
            case _:
                raise UserError(
                    f"uses the pickle instruction {name}, which data do not need; rejected"
                )
    raise EOFError("a pickle without an end")


def check(holds: bool, wrong: str) -> None:
    """Raises UserError, its pickle `wrong`, unless `holds`."""
    if not holds:
        raise UserError(f"its pickle {wrong}; rejected")


def _set_items(top: Any, items: list[Any], budget: Budget) -> None:
    check(type(top) is dict, "sets an item of what is not a dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        parts = (key,)
        if type(key) is tuple:  # hashed anew each time, and forever if they are deeply nested
            budget.spend("tuples", len(key))
            parts = key
        for part in parts:
            check(type(part) in KEYS, "has keys that are not plain data")
            # Python gives equal hashes to integers that are a multiple of 2^61 - 1 apart.
            check(type(part) is not int or -WORD < part < WORD, "has keys of more than 64 bits")
        top[key] = value


# Plain data --------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> Any:
    """The plain data of a pickle file: text, numbers (numpy's too), lists, tuples, dictionaries,
    and sets as lists. Raises UserError, in one line, for anything else."""
    try:
        with open(path, "rb") as f:
            return unpickle(f, _look_up)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except DAMAGE as error:
        raise UserError(f"{path} is not a pickle, or is damaged: {error}") from None


def _first(value: Any = None, *_: Any) -> Any:
    return value


def _list(items: Any = (), *_: Any) -> list[Any]:
    check(isinstance(items, (list, tuple)), "makes a list of something else")
    return list(items)


def _dict(*_: Any) -> dict:
    return {}


def _dtype(kind: Any = "", *_: Any) -> Inert:
    plain = type(kind) is str and re.fullmatch(r"[iuf][1-8]|b1", kind) is not None
    check(plain, "has numpy values other than numbers")
    return Inert("numpy dtype", kind)


def _scalar(dtype: Any, raw: Any) -> Any:
    check(isinstance(dtype, Inert), "has numpy values without a type")
    check(len(raw) <= 8, "has numpy values that are longer than their type")
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    order = dtype.state[1] if dtype.state else "="
    return np.frombuffer(raw, np.dtype(dtype.args[0]).newbyteorder(order))[0].item()


PLAIN: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _dict,
    "collections defaultdict": _dict,
    "builtins list": _list,  # this and the next: default factories of a defaultdict
    "builtins dict": _dict,
    "builtins set": _list,
    "builtins frozenset": _list,
    "_codecs encode": _first,  # bytes in protocol 2: (text, "latin1")
    "numpy dtype": _dtype,
    "numpy.core.multiarray scalar": _scalar,
}
RENAMED = {"__builtin__ ": "builtins ", "numpy._core.": "numpy.core."}  # Python 2's, numpy 2's


def rename(name: str) -> str:
    """ "module name" as Python 3 and numpy 1 call it."""
    for new, old in RENAMED.items():
        name = name.replace(new, old) if name.startswith(new) else name
    return name


def _look_up(name: str) -> Any:
    if function := PLAIN.get(rename(name)):
        return function
    raise UserError(
        f"refers to Python's {name.replace(' ', '.')!r:.80}, which plain data do not need; "
        "rejected, nothing was executed (if you trust the file, load it and save it as JSON)"
    )
