"""Imports and exports weights: PyTorch, safetensors, npz and Hugging Face folders.

    vtp convert import --from FILE --format videomae --out DIR
    vtp convert export --checkpoint DIR --format safetensors|torch|hf --out DIR
    vtp convert formats

An import is a folder with a checkpoint, which `config.warm_start` and `export` read, and
convert.json, which records its source. An export is made from a run or an import. Both end with a
proof: the net and a reference that shares no code with it are run on the same inputs, and if they
differ by more than the format's tolerance, nothing is written. Files are never executed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.metadata
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Num

from vtp_jax import tree
from vtp_jax.convert import export, files, formats, hf_folder, rules
from vtp_jax.convert.families import FORMATS
from vtp_jax.convert.formats import Format
from vtp_jax.run import checkpoint, metrics, paths
from vtp_jax.setup import cli
from vtp_jax.types import State, UserError

Tensors = Mapping[str, Num[np.ndarray, "..."]]


def main(argv: Sequence[str]) -> None:
    commands = cli.Commands("convert", __doc__)
    bring = commands.add("import", import_file, "turn published weights into a checkpoint")
    bring.add_argument("--from", dest="source", required=True, help="a file, or its folder")
    bring.add_argument("--format", required=True, choices=FORMATS, help="listed by `formats`")
    bring.add_argument("--out", required=True, help="a new folder")
    bring.add_argument("--prefix", help="of the net's names in the file, if it holds several")
    for name in ("heads", "decoder-heads", "text-heads"):
        bring.add_argument(f"--{name}", type=int, help="if other than in the published sizes")
    take = commands.add(
        "export", export_folder, "write the weights of a run or of an import to a file"
    )
    take.add_argument("--checkpoint", required=True, help="the folder of a run or of an import")
    take.add_argument("--step", default="latest", help="a step, latest or best")
    take.add_argument("--format", required=True, choices=export.FILES)
    take.add_argument("--out", required=True, help="a new folder")
    commands.add("formats", show, "list what can be imported")
    commands.run(argv)


def show(args: argparse.Namespace) -> None:
    rows = [(name, form.about) for name, form in FORMATS.items()]
    metrics.print_table("formats", ("format", "of"), rows)


def import_file(args: argparse.Namespace) -> None:
    form, out, source = FORMATS[args.format], new_folder(args.out), Path(args.source)
    file = files.read(source)
    files.check_finite(file.tensors, source)
    given_tensors, prefix = formats.below(form, file.tensors, args.prefix)
    tensors, aside = formats.sort_out(form, given_tensors)
    aside += [name for name in file.tensors if prefix and not name.startswith(prefix)]
    config = hf_folder.read_config(source) if args.format in export.NAMES.values() else None
    given = {name: getattr(args, name.replace("-", "_")) for name in form.stacks}
    if config:
        own = {"heads": config.heads, "decoder-heads": config.decoder_heads}
        given = {name: n or own[name] for name, n in given.items()}
        if config.doubt:
            print(config.doubt)
    heads = formats.heads_of(form, tensors, given)
    params = rules.to_params(formats.table(form, heads, tensors.keys()), tensors)
    print(f"{source}: {describe(tensors)}; {list_heads(heads)}")
    print_names("left out, not part of the net", [*aside, *file.dropped])
    worst = prove(form, params, tensors, heads)

    facts = dict(
        format=args.format, heads=heads, source=source.name, sha256=dict(file.sha256),
        wrappers=[*file.wrappers, *filter(None, [prefix])], left_aside=aside,
        dtypes=dtypes(tensors),
        video=(16, 224, 224), labels=(), largest_difference=worst,
        vtp_jax=importlib.metadata.version("vtp_jax"),
    )  # fmt: skip
    if config:
        labels = config.labels
        if labels and "head" in params:
            labels = hf_folder.fit_labels(labels, len(params["head"]["bias"]))
        if len(labels) > len(config.labels):
            print(f"{source}: {len(config.labels)} of {len(labels)} classes have a name")
        facts.update(video=(config.frames, config.side, config.side), labels=labels)
    with whole(out) as new:
        # Arrays keep the dtypes of the file.
        state = State(jnp.zeros((), jnp.int32), params, {}, {})
        with checkpoint.Checkpoints(new, every=1, config=facts) as saved:
            saved.save(0, state)
        (new / "lock").unlink(missing_ok=True)
        export.write_json(new / export.FACTS, facts)
    print(f"written to {out}: {tree.size(params) / 1e6:.1f} M parameters")


def export_folder(args: argparse.Namespace) -> None:
    out = new_folder(args.out)
    source = export.find(paths.path(args.checkpoint), args.step)
    name = export.written_name(source.name, args.format)
    form, flat = FORMATS[name], tree.flatten(source.params)
    tensors = rules.to_tensors(formats.table(form, source.heads, flat.keys()), source.params)
    print(f"{args.checkpoint}, {source.origin}: {describe(tensors)}; {list_heads(source.heads)}")
    with whole(out) as new:
        path = new / export.FILES[args.format]
        wrapper = "model" if args.format == "torch" else ""
        files.write(path, form.untidy(tensors), hf_folder.METADATA, wrapper)
        # The proof is of the written file, read back.
        written, _ = formats.sort_out(form, files.read(path).tensors)
        table = formats.table(form, source.heads, written.keys())
        back = tree.flatten(rules.to_params(table, written))
        if changed := [n for n, x in flat.items() if not np.array_equal(x, back[n])]:
            raise UserError(f"{changed[0]} differs when {path.name} is read back")
        worst = prove(form, source.params, written, source.heads)
        export.furnish(new, source, name, worst)
    print(f"written to {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")


def prove(
    form: Format, params: Any, tensors: Tensors, heads: Mapping[str, int]
) -> dict[str, float]:
    """`formats.check`, printed. Raises UserError above the tolerance."""
    assert form.proof is not None
    worst, limit = formats.check(form, params, tensors, heads), form.proof.tolerance
    rows = [(name, f"{value:.1e}") for name, value in worst.items()]
    metrics.print_table(
        f"largest difference from the reference, relative to the RMS (limit {limit:.0e})",
        ("output", "difference"),
        rows,
    )
    if bad := [name for name, value in worst.items() if not value <= limit]:
        raise UserError(
            f"{bad[0]} differs from the reference by {worst[bad[0]]:.1e} of its RMS, above "
            f"{limit:.0e}; nothing is written. Are the numbers of heads right?"
        )
    return worst


def new_folder(path: str) -> Path:
    out = Path(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists and is not empty; name a new folder")
    return out


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` on success and is removed otherwise."""
    out.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield new
        new.chmod(0o755)
        new.replace(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def describe(tensors: Tensors) -> str:
    kinds = ", ".join(f"{n} {name}" for name, n in dtypes(tensors).items())
    return f"{len(tensors)} tensors ({kinds})"


def dtypes(tensors: Tensors) -> dict[str, int]:
    return dict(collections.Counter(str(x.dtype) for x in tensors.values()))


def list_heads(heads: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in heads.items()) or "no attention"


def print_names(what: str, names: Sequence[str]) -> None:
    if names:
        more = f", ... ({len(names)} in all)" if len(names) > 12 else ""
        print(f"{what}: {', '.join(names[:12])}{more}")


if __name__ == "__main__":
    cli.run(main)
