"""Imported and exported folders as nets to use: what `vtp_jax.load` reads in addition to runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vtp_jax.convert import export, files, formats, hf_folder, nets, rules
from vtp_jax.convert.families import FORMATS
from vtp_jax.data import kept, pipeline
from vtp_jax.run import checkpoint, sharding
from vtp_jax.setup import build, config
from vtp_jax.types import Data, Params, State, UserError

VIDEO: Mapping[str, Any] = dict(stride=4, crop="centre")  # of a net that only its weights describe
PLAIN = {hf: own for own, hf in export.NAMES.items()}


class Found(NamedTuple):
    """A net in a folder. method, task: sections of a config; video, text: of its `data`; labels:
    names of classes."""

    params: Params
    method: Mapping[str, Any]
    task: Mapping[str, Any] | None
    video: Mapping[str, Any]
    text: Mapping[str, Any] | None
    labels: tuple[str, ...]


def load(
    folder: Path, text: Mapping[str, Any] | None = None, video: Mapping[str, Any] | None = None
) -> build.Run:
    """The net of an imported or exported folder, with its parameters on every device.

    text: `config.data.text`, for a folder without a tokenizer; video: changes of
    `config.data.video`. Raises UserError if the folder is neither, or of a net that no method here
    has.
    """
    found = find(folder)
    known = kept.read(folder)
    data: Mapping[str, Any] = dict(
        kind="files", train={}, video={**found.video, **(video or {})}, text=text or found.text
    )
    if known and text is None:
        data = kept.with_own_words(data, known)
    empty = dict.fromkeys(("optim", "mesh", "evals", "checkpoint", "log"), {})
    cfg = config.make(
        dict(seed=0, steps=0, batch=1, sharding=[], data=data, method=found.method, **empty)
        | dict(task=found.task)
    )
    if known is None:
        known = kept.Kept(1, False, {"data.train": 0}, {}, None, found.labels)
    words = pipeline.words_of(data)
    facts = words.tokenizer.facts if words else known.words
    pieces, most = facts.get("vocab_size", 0), found.method.get("vocab_size")
    if most and pieces > most:
        raise UserError(f"the tokenizer has {pieces} pieces, the net {most}; give the net's own")
    loaded: Data = pipeline.reopen(cfg.data, known._replace(words=facts), batch=1)
    made, mesh = build.method(cfg, loaded.facts), build.mesh_here(cfg)
    params = jax.tree.map(wide, dict(found.params))
    extra = made.start(jax.random.key(0), loaded.spec, params)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with sharding.activate(mesh):
        params, extra = jax.device_put((params, extra), everywhere)
    return build.Run(cfg, loaded, made, mesh, State(jnp.zeros((), jnp.int32), params, {}, extra))


def wide(x: Any) -> Any:
    """In fp32, as nets hold their parameters, whatever the file has."""
    return x.astype(np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def find(folder: Path) -> Found:
    if (folder / export.FACTS).exists():
        facts = json.loads((folder / export.FACTS).read_text(encoding="utf-8"))
        params = checkpoint.restore_params(folder)
        return describe(facts["format"], params, facts["heads"], facts["video"], facts["labels"])
    if (folder / export.ABOUT).exists():
        about = json.loads((folder / export.ABOUT).read_text(encoding="utf-8"))
        params = read_params(folder, about["format"], about["heads"])
        if "method" not in about:  # an export of an import
            return describe(
                about["format"], params, about["heads"], about["video"], about["labels"]
            )
        method, task, video, text = (about[name] for name in ("method", "task", "video", "text"))
        if text:  # of a run of an older version, which has kept no facts
            text = {**text, "path": str(folder / kept.TOKENIZERS[text["kind"]])}
        return Found(params, method, task, video, text, tuple(about["labels"]))
    if (folder / "config.json").exists():
        facts = hf_folder.read_config(folder)
        finetuned = facts.architecture == hf_folder.CLASSIFICATION
        name = export.NAMES["videomae_finetune" if finetuned else "videomae"]
        heads = {"heads": facts.heads, "decoder-heads": facts.decoder_heads}
        heads = {stack: heads[stack] for stack in FORMATS[name].stacks}
        size = (facts.frames, facts.side, facts.side)
        return describe(name, read_params(folder, name, heads), heads, size, facts.labels)
    raise UserError(
        f"{folder} is no run, import or export: it has no checkpoints, no {export.FACTS}, "
        f"no {export.ABOUT}"
    )


def read_params(folder: Path, name: str, heads: Mapping[str, int]) -> Params:
    """The parameters in the file of weights of format `name`."""
    form = FORMATS[name]
    file = files.read(folder)
    files.check_finite(file.tensors, folder)
    tensors, _ = formats.sort_out(form, file.tensors)
    return rules.to_params(formats.table(form, heads, tensors.keys()), tensors)


def describe(name: str, params: Params, heads: Mapping[str, int], video: Any, labels: Any) -> Found:
    """The sections of a net of which only the format, the weights and the size of its videos are
    known. Raises UserError if no method here has it."""
    name = PLAIN.get(name, name)
    frames, side, _ = video
    look = dict(VIDEO, frames=frames, size=side)
    if name not in export.RUNS.values():
        raise UserError(
            f"a net of format '{name}' is a part, not a method; start a run from it (warm_start). "
            f"These can be used as they are: {', '.join(export.RUNS.values())}"
        )
    method, task = next(kind for kind, one in export.RUNS.items() if one == name)
    part = {"retrieve": "video", "classify": "base"}.get(task or "")
    net = params[part] if part else params
    sizes: dict[str, Any] = dict(size=tuple(nets.size_of(net["encoder"]["blocks"], heads["heads"])))
    sizes["decoder"] = "tiny"  # unless there is one
    if "decoder" in params:
        sizes["decoder"] = tuple(nets.size_of(params["decoder"]["blocks"], heads["decoder-heads"]))
    if method == "simvtp":
        words = (params["text"] if part else params)["text_embed"]
        sizes |= dict(vocab_size=len(words["word"]), text_length=len(words["position"]))
    section = dict(name=method, cube=tuple(nets.cube_of(net["patch_embed"])), dtype="float32")
    more = {"classify": dict(classes=len(params["head"]["bias"]))} if task == "classify" else {}
    if labels and more:
        labels = hf_folder.fit_labels(labels, more["classify"]["classes"])
    return Found(
        params,
        {**section, **sizes},
        dict(name=task, **more.get(task, {})) if task else None,
        look,
        None,
        tuple(labels),
    )
