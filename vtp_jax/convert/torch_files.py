"""PyTorch's files: read without PyTorch and without executing anything, written with PyTorch.

Three kinds: the zip of `torch.save` since 1.6, the earlier stream of pickles, and TorchScript
archives, of which only the weights are used. All three describe their tensors by a pickle, which is
read without executing it (`vtp_jax.pickles`), within its budget: the names in it are looked up in a
table of functions below, and any other name is an error. The tensors together have at most `SHARED`
times the bytes of their storages. The formats are those of torch 2.13.
"""

from __future__ import annotations

import functools
import io
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped, UInt8

from vtp_jax import pickles
from vtp_jax.pickles import Inert, check
from vtp_jax.types import UserError

Tensor = Shaped[np.ndarray, "..."]

# Names of the storage classes of dtypes; "": only untyped storages.
STORAGES = {
    "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "float64": "Double",
    "int64": "Long", "int32": "Int", "int16": "Short", "int8": "Char", "uint8": "Byte",
    "bool": "Bool", "complex64": "ComplexFloat", "complex128": "ComplexDouble",
    "uint16": "", "uint32": "", "uint64": "", "float8_e4m3fn": "", "float8_e5m2": "",
}  # fmt: skip
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in STORAGES}
STREAM = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # in the first bytes of a stream
WRAPPERS = ("model", "module", "state_dict", "model_state", "model_state_dict", "teacher")
ARRAY = "numpy array"
PART = 1 << 22  # bytes read at once
# Bytes of all tensors of a file, of which several may share a storage, and some repeat theirs by
# strides of 0: this many times those of their storages, and so many more.
SHARED, EXPANDED = 4, 1 << 26
INSTRUCTIONS = 1 << 22  # of the pickles of a file: a tensor takes some forty
NAMES = 1 << 26  # characters of the dotted names of a TorchScript module's attributes


class Found(NamedTuple):
    """Tensors by name, the keys that wrapped them, and the names that were left out."""

    tensors: dict[str, Any]  # Tensor; before they are read, Lazy or Inert
    wrappers: tuple[str, ...]
    dropped: tuple[str, ...]


def read_zip(archive: zipfile.ZipFile, root: str) -> Found:
    """The tensors of a zip whose members are under `root`, a name that ends with a slash."""

    def member(name: str) -> UInt8[np.ndarray, "n"]:
        info = archive.getinfo(root + name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"its member {name!r:.80} is compressed, unlike any written by PyTorch")
        with archive.open(info) as f:
            return fill(f, info.file_size)  # checks its checksum

    little = root + "byteorder" not in archive.namelist() or bytes(member("byteorder")) == b"little"
    _check_order(little)
    value = unpickle(io.BytesIO(member("data.pkl").tobytes()), {})
    return _load(value, functools.cache(lambda key: member(f"data/{key}")))


def read_stream(f: io.BufferedReader, size: int) -> Found:
    """The tensors of a stream of `size` bytes: five pickles, then the raw storages."""
    storages: dict[str, Storage] = {}
    budget = pickles.Budget(INSTRUCTIONS)
    _magic, _version, system, value, keys = (unpickle(f, storages, budget) for _ in range(5))
    _check_order(system["little_endian"])
    places = {}
    for key in keys:
        count, start = int.from_bytes(f.read(8), "little"), f.tell()
        if count != storages[key].count or start + storages[key].size > size:
            raise UserError("truncated, or a storage's size is not what its tensors need")
        places[key] = start
        f.seek(start + storages[key].size)

    @functools.cache
    def load(key: str) -> np.ndarray:
        f.seek(places[key])
        return fill(f, storages[key].size)

    return _load(value, load)


def fill(f: IO[bytes], size: int) -> UInt8[np.ndarray, "n"]:
    """The next `size` bytes of a file, which memory has once. Raises UserError if there are
    fewer."""
    data = np.empty(size, np.uint8)  # takes up memory only as it is filled
    at = 0
    while at < size:
        part = f.read(min(PART, size - at))
        if not part:
            raise UserError(f"truncated: {size - at:,} of {size:,} bytes are missing")
        data[at : at + len(part)] = np.frombuffer(part, np.uint8)
        at += len(part)
    return data


def write(f: io.BufferedWriter, tensors: Mapping[str, Tensor], wrapper: str = "") -> None:
    """Writes a zip with PyTorch: a dict of tensors, under the key `wrapper` if one is given."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "PyTorch's format needs PyTorch: pip install 'vtp_jax[torch]', or write .safetensors"
        ) from None

    def tensor(x: np.ndarray) -> Any:
        bits = x.view(f"i{x.itemsize}") if x.dtype.name in vars(ml_dtypes) else x
        # torch requires writable arrays; a copy is writable.
        return torch.from_numpy(bits.copy()).view(getattr(torch, x.dtype.name))

    named = {name: tensor(x) for name, x in tensors.items()}
    torch.save({wrapper: named} if wrapper else named, f)


def _check_order(little: bool) -> None:
    if not little:
        raise UserError("written on a big-endian machine; save it again on a little-endian one")


# The value of a pickle ---------------------------------------------------------------------------


class Storage(NamedTuple):
    """A storage of the file: `count` elements, under `key`."""

    dtype: np.dtype
    key: str
    count: int

    @property
    def size(self) -> int:
        return self.count * self.dtype.itemsize


class Lazy(NamedTuple):
    """A tensor whose data have not been read. Offset and strides are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: np.dtype

    def view(self, raw: UInt8[np.ndarray, "n"], name: str) -> Tensor:
        """The tensor `name` as a view of its storage's bytes."""
        item = self.dtype.itemsize
        if self.storage.size > len(raw):
            raise UserError(f"the storage of {name!r:.80} is truncated")
        flat = raw[: self.storage.size // item * item].view(self.dtype)
        counts = (self.offset, *self.shape, *self.stride)
        whole = all(type(n) is int and 0 <= n < pickles.WORD for n in counts)
        if len(self.shape) != len(self.stride) or not whole:
            raise UserError(f"the shape, strides and offset of {name!r:.80} are not counts")
        size = multiply(self.shape)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        if size and last >= len(flat):
            raise UserError(f"{name!r:.80} reaches beyond its storage")
        if not size:
            return np.zeros(self.shape, self.dtype)
        strides = [s * item for s in self.stride]
        return np.ndarray(self.shape, self.dtype, flat, self.offset * item, strides)


def multiply(shape: tuple[int, ...] | list[int]) -> int:
    """The product of a shape. Raises UserError if it has more axes than numpy supports."""
    if len(shape) > 64:
        raise UserError(f"a tensor has {len(shape)} axes")
    return math.prod(shape)


def _load(value: Any, read: Callable[[str], np.ndarray]) -> Found:
    """The tensors of an unpickled value; `read` returns the bytes of a storage, by its key."""
    if isinstance(value, Inert) and value.name.startswith("__torch__"):
        budget = pickles.Budget(copies=NAMES)
        value = dict(_attributes(value, "", set(), budget))
    if type(value) is not dict:
        raise UserError("holds no tensors by name; save a state dict")
    found = _unwrap(value)
    tensors, seen, size, most = {}, set(), 0, EXPANDED
    for name, x in found.tensors.items():
        if isinstance(x, Lazy):
            raw, key = read(x.storage.key), x.storage.key
            tensors[name] = x.view(raw, name)
        else:
            raw, key = x.state[4], id(x.state[4])
            tensors[name] = _numpy(x)
        most += SHARED * len(raw) * (key not in seen)
        size += tensors[name].nbytes
        seen.add(key)
        if size > most:
            raise UserError(f"its tensors up to {name!r:.80} repeat their storages too often")
    return Found(tensors, found.wrappers, found.dropped)


def _unwrap(value: dict, depth: int = 4) -> Found:
    """The tensors in `value`, or in the first of its wrappers that has any; not yet read."""
    for key in WRAPPERS if depth else ():  # a dictionary may contain itself
        if type(value.get(key)) is dict and (inner := _unwrap(value[key], depth - 1)).tensors:
            others = (_plain(name) for name in value if name != key)
            return Found(inner.tensors, (key, *inner.wrappers), (*others, *inner.dropped))
    tensors = {
        name: x
        for name, x in value.items()
        if isinstance(name, str)
        and (isinstance(x, Lazy) or isinstance(x, Inert) and x.name == ARRAY)
    }
    return Found(tensors, (), tuple(_plain(name) for name in value if name not in tensors))


def _plain(name: Any) -> str:
    """A key as text. One that is a tuple may hold the same long text many times."""
    return str(name) if not isinstance(name, tuple) else "a tuple"


def _attributes(
    module: Inert, prefix: str, seen: set[int], budget: pickles.Budget
) -> Iterator[tuple[str, Any]]:
    """The attributes of a TorchScript module and of its submodules, by dotted names."""
    seen.add(id(module))  # a module may contain itself
    for name, value in (module.state or {}).items():
        budget.spend("copies", len(prefix) + len(name) + 1)
        if not isinstance(value, Inert):
            yield prefix + name, value
        elif id(value) not in seen:
            yield from _attributes(value, f"{prefix}{name}.", seen, budget)


def _numpy(array: Inert) -> Tensor:
    """A numpy array that was pickled among the tensors."""
    _version, shape, kind, fortran, raw = array.state
    dtype = np.dtype(kind.args[0]).newbyteorder(kind.state[1])
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    x = np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")
    return x.astype(dtype.newbyteorder("="), copy=False)


# The names that a pickle may use -----------------------------------------------------------------


def _dtype(kind: str, *_: Any) -> Inert:
    if not re.fullmatch(r"[biufc]\d{1,2}", kind):
        raise UserError(f"holds numpy values of type {kind!r:.20}, which are not plain numbers")
    return Inert("numpy dtype", kind)


def _tensor(x: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Lazy:
    return Lazy(x, offset, shape, stride, x.dtype)


def _tensor_of(x: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Lazy:
    _grad, _hooks, dtype, *_ = rest  # of an untyped storage
    return Lazy(x, offset, shape, stride, dtype)


def _dict(*_: Any) -> dict:
    return {}


def _first(value: Any = None, *_: Any) -> Any:
    return value


# By "module name": harmless functions of this file. Values that do not matter, such as a set among
# the training arguments, are replaced by their contents.
CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_of,
    "torch._utils _rebuild_parameter": _first,
    "torch._utils _rebuild_parameter_with_state": _first,
    "torch Size": _first,
    "torch device": _first,
    "torch.jit._pickle build_intlist": _first,
    "torch.jit._pickle build_doublelist": _first,
    "torch.jit._pickle build_boollist": _first,
    "torch.jit._pickle build_tensorlist": _first,
    "torch.jit._pickle restore_type_tag": _first,
    "collections OrderedDict": _dict,
    "collections defaultdict": _dict,
    "_codecs encode": _first,  # bytes in protocol 2: (text, "latin1")
    "builtins set": _first,
    "builtins frozenset": _first,
    "builtins bytes": _first,  # empty ones
    "builtins dict": _dict,  # these two: default factories of a defaultdict
    "builtins list": _first,
    "argparse Namespace": functools.partial(Inert, "argparse Namespace"),
    "numpy dtype": _dtype,
    "numpy ndarray": functools.partial(Inert, "numpy ndarray"),
    "numpy.core.multiarray scalar": functools.partial(Inert, "numpy scalar"),
    "numpy.core.multiarray _reconstruct": functools.partial(Inert, ARRAY),
}
TYPES = {
    **{f"torch {name}": dtype for name, dtype in DTYPES.items()},
    **{f"torch {STORAGES[name]}Storage": dtype for name, dtype in DTYPES.items() if STORAGES[name]},
    **{f"{module} UntypedStorage": DTYPES["uint8"] for module in ("torch", "torch.storage")},
}
ADMITTED = {**TYPES, **CALLS}


def _look_up(name: str) -> Any:
    name = pickles.rename(name)
    if name in ADMITTED:
        return ADMITTED[name]
    if name.startswith("__torch__"):  # a TorchScript class: only its attributes are of use
        return functools.partial(Inert, name)
    raise UserError(
        f"refers to Python's {name.replace(' ', '.')!r:.80}, which tensors do not need; rejected, "
        "nothing was executed (if you trust the file, load it and save only its state dict)"
    )


def unpickle(
    file: io.BufferedReader | io.BytesIO,
    storages: dict[str, Storage],
    budget: pickles.Budget | None = None,
) -> Any:
    """The value of one pickle, after which `file` is left; adds its storages to `storages`. The
    value consists of plain data, `Storage`, `Lazy`, `Inert` and the results of `_look_up`."""

    def storage(given: Any) -> Storage:
        kind, dtype, key, _device, count, *view = given
        plain = (
            type(key) is str and type(count) is int and 0 <= count < pickles.WORD and not any(view)
        )
        check(kind == "storage" and isinstance(dtype, np.dtype) and plain, "has odd storages")
        storages[key] = Storage(dtype, key, count)
        return storages[key]

    return pickles.unpickle(file, _look_up, storage, budget or pickles.Budget(INSTRUCTIONS))
