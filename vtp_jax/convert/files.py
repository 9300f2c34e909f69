"""Reading and writing files of named tensors, without ever executing their contents.

Read: `.npz`, safetensors, PyTorch's files of every version (`torch_files`) and folders of Hugging
Face and DeepSpeed; by content, not by suffix. Memory has the tensors of a file once, and a
compressed one expands to `RATIO` times its size at most. PyTorch is needed only to write its own
format. The formats are those of the safetensors specification, as safetensors 0.8 and numpy 2.4
write them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from vtp_jax import lines
from vtp_jax.convert import torch_files
from vtp_jax.convert.torch_files import DTYPES, multiply
from vtp_jax.types import UserError

Tensor = Shaped[np.ndarray, "..."]

# Bytes of a safetensors header; a hundred thousand tensors need less. The format allows six times
# as many, which could take gigabytes of memory as they are parsed.
MAX_HEADER = 1 << 24
# Bytes to which a zip may expand: so many times its own, and so many more. Trained weights are
# compressed to nine tenths, half-empty ones to a half.
RATIO, SMALL = 8, 1 << 26
CODES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32",
    "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
IN_FOLDER = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "mp_rank_00_model_states.pt",
)  # fmt: skip
METADATA = "__metadata__"


class File(NamedTuple):
    """The contents of a file.

    tensors:  by flat name; dtypes as in the file; may be read-only, and may share memory where
              they share storage in the file
    wrappers: removed wrappers, outermost first: keys ("model"), then prefixes ("module.")
    dropped:  names that were left out: not tensors, or next to a wrapper ("optimizer")
    metadata: the strings that safetensors and npz store with the tensors
    sha256:   of each file read, by file name
    """

    tensors: dict[str, Tensor]
    wrappers: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    metadata: Mapping[str, str] = {}
    sha256: Mapping[str, str] = {}


def read(path: str | os.PathLike) -> File:
    """The tensors of a file, of a sharded file (its `.index.json`), or of a folder with such files.

    Raises UserError, with the path, if the file is missing, damaged, of unknown format or unsafe.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "mp_rank_01_model_states.pt").exists():
            raise UserError(f"{path} is split over several model-parallel ranks; merge them first")
        found = [path / name for name in IN_FOLDER if (path / name).exists()]
        if not found:
            raise UserError(f"{path} has none of {', '.join(IN_FOLDER)}; name the file itself")
        path = found[0]
    file = _guard(_read_shards if path.name.endswith(".index.json") else _read_file, path)
    tensors, wrappers = file.tensors, file.wrappers
    if not tensors:
        other = f"; it holds {', '.join(map(repr, file.dropped[:8]))}" if file.dropped else ""
        raise UserError(f"{path} holds no tensors by name{other}")
    if odd := [name for name in tensors if not name.isprintable()]:
        raise UserError(f"{path} has a tensor with the unprintable name {odd[0]!r:.80}")
    while prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in tensors)), None):
        tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
        wrappers += (prefix,)
    return file._replace(tensors=tensors, wrappers=wrappers)


def check_finite(tensors: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Raises UserError, with their names, if tensors of `path` contain a NaN or an infinity."""
    bad = [n for n, x in tensors.items() if x.dtype.kind not in "biu" and not np.isfinite(x).all()]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise UserError(f"{path} has NaN or infinite values in {', '.join(bad[:5])}{more}")


def write(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    wrapper: str = "",
) -> None:
    """Writes `.safetensors`, `.npz` or PyTorch's `.pth`, `.pt`, `.bin`, chosen by the suffix.

    The file is written atomically. `metadata`: strings that safetensors and npz store; `wrapper`:
    the key of the tensors in a PyTorch file, such as "model". Raises UserError on a suffix, name or
    dtype that the format lacks, and if writing fails.
    """
    path = Path(path)
    match path.suffix:
        case ".safetensors":
            fill = functools.partial(_write_safetensors, metadata=metadata or {})
        case ".npz":
            fill = functools.partial(_write_npz, metadata=metadata or {})
        case ".pth" | ".pt" | ".bin":
            fill = functools.partial(torch_files.write, wrapper=wrapper)
        case _:
            raise UserError(f"cannot write '{path}': name it .safetensors, .npz, .pth, .pt or .bin")
    arrays = {}
    for name, x in tensors.items():
        if x.dtype.name not in DTYPES or name == METADATA:
            raise UserError(f"cannot write {path}: '{name}' of dtype {x.dtype} is not a tensor")
        arrays[name] = np.asarray(x, DTYPES[x.dtype.name], order="C")  # native byte order
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(new, "wb") as f:
            fill(f, arrays)
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, path)
    except (OSError, UserError) as error:
        raise UserError(f"cannot write {path}: {_first_line(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            new.unlink()


def _guard(reader: Callable[[Path], File], path: Path) -> File:
    try:
        return reader(path)
    except (OSError, UserError) as error:
        raise UserError(f"cannot read {path}: {_first_line(error)}") from error
    except Exception as error:  # anything that parsers raise on hostile bytes, even MemoryError
        text = f"{type(error).__name__}: {_first_line(error)}".removesuffix(": ")
        raise UserError(f"cannot read {path}: it is truncated or damaged ({text})") from error


def _first_line(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:300]


def _read_file(path: Path) -> File:
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
        size = f.tell()
        f.seek(0)
        head = f.read(64)
        f.seek(0)
        if head[8:9] == b"{":
            file = _read_safetensors(f, size)
        elif head[:2] == b"PK":
            file = _read_zip(f, size)
        elif head[:1] == b"\x80" and torch_files.STREAM in head:
            file = File(*torch_files.read_stream(f, size))
        else:
            start = f"begins with {head[:16]!r}" if head else "is empty"
            raise UserError(f"it {start}, which is not safetensors, npz or a PyTorch file")
    return file._replace(sha256={path.name: digest})


def _read_shards(path: Path) -> File:
    index = lines.read_object(path)["weight_map"]
    shards = sorted({lines.name(path, shard) for shard in index.values()})
    parts = {shard: _guard(_read_file, path.with_name(shard)) for shard in shards}
    found = sorted((name, shard) for shard, part in parts.items() for name in part.tensors)
    if wrong := sorted({name for name, _ in set(found) ^ set(index.items())}):
        raise UserError(f"it and its shards disagree on where {', '.join(wrong[:5])} is")
    return File(
        {name: x for part in parts.values() for name, x in part.tensors.items()},
        tuple(dict.fromkeys(w for part in parts.values() for w in part.wrappers)),
        tuple(dict.fromkeys(d for part in parts.values() for d in part.dropped)),
        {k: v for part in parts.values() for k, v in part.metadata.items()},
        {k: v for part in parts.values() for k, v in part.sha256.items()},
    )


def _read_safetensors(f: io.BufferedReader, size: int) -> File:
    length = int.from_bytes(f.read(8), "little")
    if length > min(MAX_HEADER, size - 8):
        raise UserError(
            f"it claims a header of {length:,} bytes; the file has {size:,}, the limit is "
            f"{MAX_HEADER:,}"
        )
    header = json.loads(f.read(length), object_pairs_hook=_unique)
    metadata = _strings(header.pop(METADATA, {}))
    tensors, start = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, offsets = entry["shape"], entry["data_offsets"]
        if entry["dtype"] not in CODES:
            raise UserError(f"{name!r:.80} has the unknown dtype {entry['dtype']!r:.20}")
        if not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):
            raise UserError(f"the shape or offsets of {name!r:.80} are not counts")
        dtype = DTYPES[CODES[entry["dtype"]]]
        stop = start + multiply(shape) * dtype.itemsize
        if offsets != [start, stop] or 8 + length + stop > size:
            raise UserError(
                f"{name!r:.80} should be at {start:,} to {stop:,}; the header has {offsets}, "
                f"the data end at {size - 8 - length:,}"
            )
        tensors[name] = torch_files.fill(f, stop - start).view(dtype).reshape(shape)
        start = stop
    if 8 + length + start != size:
        raise UserError(f"it has {size - 8 - length - start:,} bytes that belong to no tensor")
    return File({name: tensors[name] for name in header}, metadata=metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises UserError on repeated names, which readers resolve differently."""
    if len(entries := dict(pairs)) < len(pairs):
        raise UserError("its header has a name twice")
    return entries


def _strings(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError("its metadata are not strings by name")
    return metadata


def _read_zip(f: io.BufferedReader, size: int) -> File:
    with zipfile.ZipFile(f) as archive:
        members = archive.infolist()
        names = [m.filename for m in members]
        if len(set(names)) < len(names) or sum(m.compress_size for m in members) > size:
            raise UserError("its zip members overlap")
        f.seek(max(0, size - 2**16 - 22))  # the directory's end; damage before it can hide members
        counted = int.from_bytes(f.read().rpartition(b"PK\5\6")[2][6:8], "little")
        if counted not in (len(members), 2**16 - 1):
            raise UserError(
                f"it has {len(members)} zip members, but its directory counts {counted}; it is "
                "damaged"
            )
        expanded = sum(m.file_size for m in members)
        if expanded > RATIO * size + SMALL:
            raise UserError(
                f"it would expand to {expanded:,} bytes, more than {RATIO} times its size; if you "
                "trust it, save it uncompressed (numpy.savez)"
            )
        if roots := [n.removesuffix("data.pkl") for n in names if n.endswith("/data.pkl")]:
            return File(*torch_files.read_zip(archive, min(roots, key=len)))
        if not all(name.endswith(".npy") for name in names):
            raise UserError("it is a zip file, but neither numpy nor PyTorch wrote it")
        arrays = {m.filename.removesuffix(".npy"): _read_npy(archive, m) for m in members}
    note = arrays.pop(METADATA, None)
    metadata = {} if note is None else _strings(json.loads(note.item()))
    tensors = {name: x for name, x in arrays.items() if x.dtype.name in DTYPES}
    return File(tensors, (), tuple(name for name in arrays if name not in tensors), metadata)


def _read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{member.filename!r:.80} is compressed in a way that numpy does not use")
    with archive.open(member) as f:
        old = np.lib.format.read_magic(f) == (1, 0)
        header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(f)
        if dtype.hasobject:
            raise UserError(f"{member.filename!r:.80} holds Python objects, which are never loaded")
        size = multiply(shape) * dtype.itemsize
        here = 0 <= size <= member.file_size
        data = torch_files.fill(f, size) if here else b""
        if len(data) != size or f.read(1):  # reading to the end verifies the checksum
            raise UserError(f"{member.filename!r:.80} is not as long as its shape requires")
    if dtype.str == "|V2":  # how numpy stores a bfloat16
        dtype = DTYPES["bfloat16"]
    x = np.ndarray(shape, dtype, data, order="F" if fortran else "C")
    return x.astype(dtype.newbyteorder("="), copy=False)


def _write_safetensors(
    f: io.BufferedWriter, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    # Wide dtypes first, so that each tensor is aligned when the file is memory-mapped.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    codes = {name: code for code, name in CODES.items()}
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    header |= dict.fromkeys(tensors)  # names keep their given order
    start = 0
    for name in names:
        x = tensors[name]
        if x.dtype.name not in codes:
            raise UserError(f"safetensors has no dtype {x.dtype}, which '{name}' has")
        stop = start + x.nbytes
        header[name] = dict(
            dtype=codes[x.dtype.name], shape=list(x.shape), data_offsets=[start, stop]
        )
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    f.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        f.write(tensors[name].tobytes())


def _write_npz(
    f: io.BufferedWriter, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    note = {METADATA: np.array(json.dumps(dict(metadata)))} if metadata else {}
    with zipfile.ZipFile(f, "w") as archive:
        for name, x in {**tensors, **note}.items():
            if x.dtype.name.startswith("float8"):
                raise UserError(f"npz has no dtype {x.dtype}, which '{name}' has")
            # A ZipInfo has a fixed date: equal tensors give equal files.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(
                    member, x.view("V2") if x.dtype.name == "bfloat16" else x, allow_pickle=False
                )
