"""What can be exported, and what an exported folder contains in addition to the weights."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

import vtp_jax
from vtp_jax import tree
from vtp_jax.convert import hf_folder, nets, pytorch
from vtp_jax.convert.families import FORMATS
from vtp_jax.data import kept
from vtp_jax.data import text as tokens
from vtp_jax.methods import simvtp
from vtp_jax.nn import sizes
from vtp_jax.run import checkpoint
from vtp_jax.setup.config import plain
from vtp_jax.types import Params, UserError

FACTS = "convert.json"  # in the folder of an import
ABOUT = "vtp_jax.json"  # in the folder of an export: what `vtp_jax.load` needs
FILES = {"safetensors": "model.safetensors", "torch": "model.pth", "hf": "model.safetensors"}
# Formats of Hugging Face exports (`hf`); the other kinds keep the authors' names.
NAMES = {"videomae": "hf_videomae", "videomae_finetune": "hf_videomae_finetune"}
# (method, task) of a run -> format
RUNS = {
    ("simvtp", None): "simvtp",
    ("simvtp", "retrieve"): "simvtp_finetune",
    ("videomae", None): "videomae",
    ("videomae", "classify"): "videomae_finetune",
}

# Defaults of the nets, for values that a config lacks.
DEFAULTS: Mapping[str, Any] = {
    name: inspect.signature(simvtp.build).parameters[name].default
    for name in ("mean", "std", "pad_id", "dropout", "pool_padding")
}


class Source(NamedTuple):
    """The weights to export, and what describes them.

    params: nested numpy arrays; name: of the format; heads: of its stacks; video: (frames, height,
    width) that the net was made for; settings: fields of the method that tensors do not show;
    labels: names of classes; origin: a description in words
    sections: method, task, video and text of a run's config; empty for an import
    files: what the run has kept of its data (data/kept.py), by name
    """

    params: Params
    name: str
    heads: Mapping[str, int]
    video: tuple[int, int, int]
    settings: Mapping[str, Any]
    labels: tuple[str, ...]
    origin: str
    sections: Mapping[str, Any] = {}
    files: Mapping[str, bytes] = {}


def find(path: epath.Path, which: str) -> Source:
    """The `Source` of a folder with a run or an import. Raises UserError for nets without published
    names."""
    if (path / FACTS).exists():
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        return Source(
            checkpoint.restore_params(path),
            facts["format"],
            facts["heads"],
            tuple(facts["video"]),
            DEFAULTS,
            tuple(facts["labels"]),
            f"an import of {facts['source']}",
        )
    if not (path / "config.json").exists():
        raise UserError(f"{path} is neither a run nor an import: no config.json, no {FACTS}")
    cfg = json.loads((path / "config.json").read_text(encoding="utf-8"))
    method, task = cfg["method"], cfg.get("task") or {}
    kind = (method["name"], task.get("name"))
    if kind not in RUNS:
        known = ", ".join("+".join(filter(None, k)) for k in RUNS)
        raise UserError(f"{'+'.join(filter(None, kind))} has no PyTorch names yet; known: {known}")
    step = checkpoint.find_step(path, which)
    params = checkpoint.restore_params(path, step)
    heads = {"heads": sizes.pick(sizes.ENCODERS, method.get("size", "B"), "method.size").heads}
    if "decoder" in params:
        chosen = method.get("decoder") or method.get("size", "B")
        heads["decoder-heads"] = sizes.pick(sizes.DECODERS, chosen, "method.decoder").heads
    video, text, known = cfg["data"]["video"], cfg["data"].get("text") or {}, kept.read(path)
    names = known.labels if known else ()
    classes = tuple(
        names[i] if i < len(names) else f"class {i}" for i in range(task.get("classes", 0))
    )
    shape = (video["frames"], video["size"], video["size"])
    settings = {**DEFAULTS, **{k: v for k, v in {**method, **task}.items() if k in DEFAULTS}}
    origin = f"step {step} of a run"
    sections = dict(
        method=method,
        task=cfg.get("task"),
        video=video,
        text={k: text[k] for k in ("kind", "length") if k in text} or None,
    )
    files = kept.files(path, known)
    if known is None and text.get("path") and Path(text["path"]).is_file():
        files = {kept.TOKENIZERS[text["kind"]]: Path(text["path"]).read_bytes()}
    return Source(params, RUNS[kind], heads, shape, settings, classes, origin, sections, files)


def written_name(name: str, kind: str) -> str:
    """The format that an export of kind "safetensors", "torch" or "hf" is written in."""
    if kind == "hf":
        name = NAMES.get(name, name)
        if name not in NAMES.values():
            raise UserError(f"Hugging Face has no net for {name}; export it as safetensors")
        return name
    return {other: own for own, other in NAMES.items()}.get(name, name)


def furnish(new: Path, source: Source, name: str, worst: Mapping[str, float]) -> None:
    """Writes the files that accompany the weights of format `name`."""
    if name in ("simvtp", "simvtp_finetune"):
        config = simvtp_config(source, name)
        shutil.copy(pytorch.MODULE, new)
    elif name in NAMES.values():
        config = hf_config(source, name)
        processor = hf_folder.preprocessor_config(
            side=source.video[1], mean=source.settings["mean"], std=source.settings["std"]
        )
        write_json(new / "preprocessor_config.json", processor)
    else:
        config = dict(format=name, heads=dict(source.heads), labels=source.labels)
    write_json(new / "config.json", config)
    about = dict(format=name, heads=source.heads, video=source.video, labels=source.labels)
    write_json(
        new / ABOUT,
        {
            **about,
            "vtp_jax": vtp_jax.__version__,
            **source.sections,
        },
    )
    for file, content in source.files.items():
        (new / file).write_bytes(content)
    (new / "README.md").write_text(card(source, name, worst), encoding="utf-8")


def sizes_of(source: Source, encoder: Params) -> dict[str, sizes.Size]:
    """The sizes of the encoder, whose parameters are given, and of the decoder if there is one."""
    found = dict(encoder=nets.size_of(encoder["encoder"]["blocks"], source.heads["heads"]))
    if "decoder" in source.params:
        blocks = source.params["decoder"]["blocks"]
        found["decoder"] = nets.size_of(blocks, source.heads["decoder-heads"])
    return found


def simvtp_config(source: Source, name: str) -> dict[str, Any]:
    """config.json of the PyTorch module that accompanies the weights."""
    towers = name == "simvtp_finetune"
    video, text = (source.params[kind] if towers else source.params for kind in ("video", "text"))
    return pytorch.config(
        **{"decoder": None, **sizes_of(source, video)},
        video=source.video,
        cube=nets.cube_of(video["patch_embed"]),
        vocab_size=len(text["text_embed"]["word"]),
        text_length=len(text["text_embed"]["position"]),
        **source.settings,
    )


def hf_config(source: Source, name: str) -> dict[str, Any]:
    """config.json for transformers."""
    classifies, (frames, side, _) = name == NAMES["videomae_finetune"], source.video
    base = source.params["base"] if classifies else source.params
    common: dict[str, Any] = dict(
        **sizes_of(source, base), frames=frames, side=side, cube=nets.cube_of(base["patch_embed"])
    )
    if not classifies:
        method = source.sections.get("method", {})
        normalised = method.get("target", "normalised") == "normalised"
        return hf_folder.pretraining_config(**common, normalised=normalised)
    labels = hf_folder.fit_labels(source.labels, len(source.params["head"]["bias"]))
    return hf_folder.classification_config(labels=labels, **common)


USES = {
    "simvtp": "import simvtp                  # started in this folder\nnet = simvtp.load('.')\n"
    "video = net.encode_video(frames)    # (B, T, H, W, 3) uint8 -> (B, d)\n"
    "text = net.encode_text(ids, mask)   # (B, L), (B, L) -> (B, d)",
    "hf_videomae": "from transformers import VideoMAEForPreTraining\n"
    "net = VideoMAEForPreTraining.from_pretrained('.')",
    "hf_videomae_finetune": "from transformers import VideoMAEForVideoClassification\n"
    "net = VideoMAEForVideoClassification.from_pretrained('.')",
}
USES["simvtp_finetune"] = USES["simvtp"]


class About(NamedTuple):
    """What a model card says of a net of a format. library: that reads the folder; task: Hugging
    Face's name of what the net does; arxiv: the paper's number."""

    title: str
    library: str
    task: str
    arxiv: str


SIMVTP, VIDEOMAE = "2212.03490", "2203.12602"
ABOUTS = {
    "simvtp": About("SimVTP", "pytorch", "feature-extraction", SIMVTP),
    "simvtp_finetune": About(
        "SimVTP fine-tuned for retrieval", "pytorch", "feature-extraction", SIMVTP
    ),
    "videomae": About("VideoMAE", "vtp_jax", "feature-extraction", VIDEOMAE),
    "videomae_finetune": About(
        "VideoMAE fine-tuned to classify", "vtp_jax", "video-classification", VIDEOMAE
    ),
}
ABOUTS |= {hf: ABOUTS[own]._replace(library="transformers") for own, hf in NAMES.items()}


def card(source: Source, name: str, worst: Mapping[str, float]) -> str:
    """README.md of the folder: a model card, with the front matter that Hugging Face reads."""
    form = FORMATS[name]
    assert form.proof is not None
    count = sum(np.size(x) for x in tree.flatten(source.params).values())
    rows = "\n".join(f"| {output} | {value:.1e} |" for output, value in worst.items())
    use = f"\n```python\n{USES[name]}\n```\n" if name in USES else ""
    title = f"{ABOUTS[name].title}, trained with vtp_jax" if source.sections else form.about
    own = "With vtp_jax, from video files and words: `vtp_jax.load('.')`.\n" * (name in ABOUTS)
    front = front_matter(ABOUTS[name]) if name in ABOUTS else ""
    return f"""{front}# {title}

{count / 1e6:.1f} M parameters, exported by vtp_jax from {source.origin}. Videos of
{" x ".join(map(str, source.video))} (frames x height x width), RGB.
{use}
{own}{words_of(source)}{classes_of(source)}
## Publishing

```
pip install huggingface_hub
hf auth login
hf upload USER/NAME .          # from this folder; correct `license` above first
```

The weights have the licence of the weights and data that they were trained from.

## Check

Before this folder was written, its weights were read back and run, in fp64, through a net of
vtp_jax and through a reference that shares no code with it. Largest difference, in units of each
output's root mean square (the limit is {form.proof.tolerance:.0e}):

| output | difference |
|---|---|
{rows}
"""


def front_matter(about: About) -> str:
    """The YAML at the top of a model card."""
    method = about.title.split()[0].lower()
    return f"""---
license: other
library_name: {about.library}
pipeline_tag: {about.task}
tags:
- video
- {method}
- vtp_jax
- arxiv:{about.arxiv}
---
"""


# How ids are made in Python, by kind of tokenizer.
WORDS = {
    "sentencepiece": """A SentencePiece model, which lower-cases and normalises by itself.

```python
import sentencepiece

pieces = sentencepiece.SentencePieceProcessor(model_file="tokenizer.model")
line = [{cls_id}, *pieces.encode(text)[: {length} - 2], {sep_id}]
ids = line + [{pad_id}] * ({length} - len(line))
mask = [place < len(line) for place in range({length})]
```""",
    "wordpiece": """BERT's word pieces; tokenizer_config.json says whether words are lower-cased.

```python
from transformers import BertTokenizerFast

made = BertTokenizerFast.from_pretrained(".")(
    text, padding="max_length", truncation=True, max_length={length}
)
ids, mask = made["input_ids"], made["attention_mask"]
```""",
    "clip": "CLIP's byte pairs, of lower-cased text, between <|startoftext|> and <|endoftext|>.",
}


def words_of(source: Source) -> str:
    """How text becomes ids; empty for a net without text."""
    text = source.sections.get("text")
    if not text:
        return ""
    about = json.loads(source.files.get(kept.FILE, b"{}"))
    facts = about.get("words") or tokens.expected(text["kind"])
    special = ", ".join(f"[{n[:-3].upper()}] is {i}" for n, i in facts.items() if n[-3:] == "_id")
    how = WORDS[text["kind"]].format(length=text["length"], **facts)
    return f"""
## Words

A text is [CLS], its pieces, [SEP], and [PAD] up to {text["length"]} ids, as in training; a longer
one loses its last pieces, but not [SEP]. {special}. The file is `{kept.TOKENIZERS[text["kind"]]}`.
{how}
"""


def classes_of(source: Source) -> str:
    """The names of the classes; empty without classes."""
    if not source.labels:
        return ""
    shown = "; ".join(f"{i} {label}" for i, label in enumerate(source.labels[:20]))
    more = f"; ... ({len(source.labels)} in all, in config.json)" if source.labels[20:] else ""
    return f"""
## Classes

{shown}{more}
"""


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(plain(value), indent=1), encoding="utf-8")
