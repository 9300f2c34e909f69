"""The goldens of official code: weights and inputs, which their rules make from names and seeds.

tests/golden/*.json hold numbers that the authors' code computed in fp64, without dropout; each
file states its rule. Neither weights nor inputs are stored. A `Golden` has both under official
names, as `python -m vtp_jax.parity` takes them, and the numbers to compare with.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from vtp_jax import masking
from vtp_jax.convert import formats, rules
from vtp_jax.convert.families import STEPS
from vtp_jax.methods import snclr as snclrs
from vtp_jax.methods import tvtsv2 as tvtsv2s

FOLDER = Path(__file__).parent / "golden"
TOLERANCE = 1e-9
CLS, SEP, MASK, PAD = 101, 102, 103, 0
IMAGENET = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

Shapes = dict[str, tuple[int, ...]]
Arrays = dict[str, np.ndarray]


class Golden(NamedTuple):
    """case: the golden's own part of its file. format, heads: arguments of `formats.run_step`.
    losses: output -> its value. norms, probes: official name -> a gradient's norm, and its product
    with a fixed draw. scale: below this times 1e-9 a gradient is zero."""

    case: Mapping[str, Any]
    format: str
    heads: Mapping[str, int]
    weights: Arrays
    inputs: Arrays
    losses: Mapping[str, float]
    norms: Mapping[str, float] = {}
    probes: Mapping[str, float] = {}
    scale: float = 0.0

    def run(self, grads: bool = True) -> Arrays:
        form = STEPS[self.format]
        return formats.run_step(form, self.weights, self.inputs, heads=self.heads, grads=grads)


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


# The rules.


def make_tensor(
    name: str, shape: tuple[int, ...], small: tuple[str, ...] = ("mask_token", "_embeddings.weight")
) -> np.ndarray:
    """fp32 values drawn from a tensor's official name: a norm's scales around 1; vectors, and names
    that end in `small`, around 0; other tensors with a variance of 1 / their inputs."""
    draw = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
    if name.endswith(".weight") and len(shape) == 1:
        value = 1 + 0.1 * draw
    elif len(shape) == 1 or name.endswith(small):
        value = 0.05 * draw
    else:
        value = draw / np.sqrt(np.prod(shape[1:]))
    return value.astype(np.float32)


def make_tensors(shapes: Mapping[str, tuple[int, ...]], **more: Any) -> Arrays:
    return {name: make_tensor(name, shape, **more) for name, shape in shapes.items()}


def shapes_of(names: list[rules.Rule], init: Callable[..., Any], spec: Any) -> Shapes:
    """Official names and shapes of the parameters that init makes."""
    params = jax.eval_shape(lambda key: init(key, spec), jax.random.key(0))
    empty = rules.to_tensors(names, jax.tree.map(lambda x: np.empty(x.shape), params))
    return {name: x.shape for name, x in empty.items()}


def linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, d: int) -> Shapes:
    return {f"{name}.weight": (d,), f"{name}.bias": (d,)}


def blocks(prefix: str, size: Mapping[str, int]) -> Shapes:
    """VideoMAE's blocks."""
    d, found = size["width"], {}
    for i in range(size["depth"]):
        block = f"{prefix}.{i}"
        found |= norm(f"{block}.norm1", d) | norm(f"{block}.norm2", d)
        found[f"{block}.attn.qkv.weight"] = (3 * d, d)
        found[f"{block}.attn.q_bias"] = found[f"{block}.attn.v_bias"] = (d,)
        found |= linear(f"{block}.attn.proj", d, d)
        found |= linear(f"{block}.mlp.fc1", size["mlp"], d) | linear(
            f"{block}.mlp.fc2", d, size["mlp"]
        )
    return found


def autoencoder(case: Mapping[str, Any]) -> Shapes:
    """VideoMAE's pretraining net."""
    wide, narrow = case["encoder"]["width"], case["decoder"]["width"]
    cube = case.get("cube", (2, 16, 16))
    return {
        "mask_token": (1, 1, narrow),
        "encoder.patch_embed.proj.weight": (wide, 3, *cube),
        "encoder.patch_embed.proj.bias": (wide,),
        **blocks("encoder.blocks", case["encoder"]),
        **norm("encoder.norm", wide),
        "encoder_to_decoder.weight": (narrow, wide),
        **blocks("decoder.blocks", case["decoder"]),
        **norm("decoder.norm", narrow),
        **linear("decoder.head", int(3 * np.prod(cube)), narrow),
    }


def classifier(case: Mapping[str, Any]) -> Shapes:
    """VideoMAE's encoder under a head."""
    parts = ("encoder.patch_embed.", "encoder.blocks.")
    encoder = autoencoder({"decoder": case["encoder"], **case})
    d = case["encoder"]["width"]
    return {
        **{n.removeprefix("encoder."): s for n, s in encoder.items() if n.startswith(parts)},
        **norm("fc_norm", d),
        **linear("head", case["classes"], d),
    }


def words(case: Mapping[str, Any], prefix: str) -> Shapes:
    d, found = case["encoder"]["width"], norm(f"{prefix}.LayerNorm", case["encoder"]["width"])
    tables = dict(word=case["vocab"], position=case["positions"], token_type=2)
    return found | {f"{prefix}.{n}_embeddings.weight": (rows, d) for n, rows in tables.items()}


def captions(case: Mapping[str, Any]) -> Arrays:
    """ids between [CLS] and [SEP], then padding, and their mask."""
    ids = np.random.RandomState(2).randint(*case["ids"], (case["batch"], case["text_len"]))
    for row, length in zip(ids, case["lens"], strict=True):
        row[0], row[length - 1], row[length:] = CLS, SEP, PAD
    mask = np.arange(case["text_len"]) < np.array(case["lens"])[:, None]
    return dict(ids=ids, attention_mask=mask.astype(np.int64))


def normal_video(case: Mapping[str, Any]) -> np.ndarray:
    shape = (case["batch"], 3, case["frames"], *case["size"])
    return np.random.RandomState(1).standard_normal(shape).astype(np.float32)


def tubes(case: Mapping[str, Any]) -> np.ndarray:
    """A mask that hides the same places in every slot."""
    sides = (case["frames"], *case["size"])
    t, h, w = (a // b for a, b in zip(sides, case.get("cube", (2, 16, 16)), strict=True))
    mask = np.zeros((case["batch"], t, h * w), bool)
    for i, row in enumerate(mask):
        order = np.random.RandomState(10 + i).permutation(h * w)
        row[:, order[: case["masked_per_frame"]]] = True
    return mask.reshape(len(mask), -1)


# SimVTP.

# What the tiny golden leaves out: ViT-B's widths with two and one blocks.
RELEASED = dict(
    encoder=dict(width=768, depth=2, mlp=3072), decoder=dict(width=384, depth=1, mlp=1536),
    frames=16, vocab=30522, positions=512, ids=[1000, 30000],
)  # fmt: skip


def simvtp_case(name: str) -> dict[str, Any]:
    (golden,) = load(name).values()
    case = RELEASED | golden
    if isinstance(case["size"], int):
        case["size"] = [case["size"]] * 2
    case.setdefault("negatives", [(i + 1) % case["batch"] for i in range(case["batch"])])
    return case


def simvtp_shapes(case: Mapping[str, Any]) -> Shapes:
    d = case["encoder"]["width"]
    return {
        **autoencoder(case),
        **words(case, "text_embeddings"),
        **linear("text_cls", case["vocab"], d),
        **linear("vtm_head", 2, d),
    }


def simvtp_inputs(case: Mapping[str, Any]) -> Arrays:
    found = captions(case)
    ids, low = found["ids"], case["ids"][0]
    asked = (np.random.RandomState(3).uniform(size=ids.shape) < 0.75) & (ids >= low)
    return dict(
        video=normal_video(case),
        mask=tubes(case),
        ids=np.where(asked, MASK, ids),
        labels=np.where(asked, ids, -100),
        attention_mask=found["attention_mask"],
        negatives=np.array(case["negatives"]),
    )


def simvtp(name: str) -> Golden:
    case = simvtp_case(name)
    losses = {n: case[n] for n in ("loss_v", "loss_t", "loss_vtc", "loss_vtm", "loss")}
    norms, probes = case["grad_norms"], case.get("grad_probes", {})
    weights = make_tensors(simvtp_shapes(case))
    return Golden(case, "simvtp", {}, weights, simvtp_inputs(case), losses, norms, probes)


def simvtp_finetune(name: str) -> Golden:
    case = load("simvtp_finetune_tiny")["cases"][name]
    case["encoder"] = {n: case[n] for n in ("width", "depth", "mlp")}
    tower = {
        **{n: s for n, s in classifier({**case, "classes": 1}).items() if "head." not in n},
        **words(case, "text_embeddings"),
    }
    shapes = {f"{kind}_encoder.{n}": s for kind in ("video", "text") for n, s in tower.items()}
    inputs = dict(video=normal_video(case), **captions(case))
    norms, probes = case["grad_norms"], case.get("grad_probes", {})
    losses = dict(loss=case["loss"])
    return Golden(case, "simvtp_finetune", {}, make_tensors(shapes), inputs, losses, norms, probes)


# VideoMAE.


def videomae_case(name: str, part: str) -> dict[str, Any]:
    """name: videomae or videomae_v2; part: pretrain or finetune."""
    case = load(f"{name}_steps")[part]
    for kind in {"encoder", "decoder"} & case.keys():
        case[kind]["mlp"] = int(case[kind]["width"] * case["mlp_ratio"])
    return case


def unit_video(case: Mapping[str, Any]) -> np.ndarray:
    """Pixels of 0 to 255 over 255, "b t h w 3"."""
    shape = (case["batch"], case["frames"], *case["size"], 3)
    return np.random.RandomState(1).randint(0, 256, shape) / 255


def normalised(pixels: np.ndarray) -> np.ndarray:
    """With ImageNet's statistics, channels first."""
    mean, std = IMAGENET
    return np.moveaxis((pixels - mean) / std, -1, 1)


def row_of_phase(dropped: np.ndarray, phase: int) -> int:
    """In frame 0 of phase p, place i of a cell is dropped if (p + 1 + i) % 4 < 2 (ratio .5)."""
    wanted = [(phase + 1 + i) % 4 < 2 for i in (0, 1)]
    return int(np.flatnonzero((dropped[:, :2] == wanted).all(axis=1))[0])


def videomae(name: str) -> Golden:
    case = videomae_case(name, "pretrain")
    inputs = dict(video=normalised(unit_video(case)), mask=tubes(case))
    if "phases" in case:  # among the rows of a large draw
        sides = (case["frames"], *case["size"])
        grid = tuple(a // b for a, b in zip(sides, case["cube"], strict=True))
        many = masking.running_cells(jax.random.key(0), 64, grid, case["decoder_ratio"])
        dropped = np.asarray(many.dropped)
        inputs["decode_mask"] = np.stack(
            [dropped[row_of_phase(dropped, p)] for p in case["phases"]]
        )
    heads = {"heads": case["encoder"]["heads"], "decoder-heads": case["decoder"]["heads"]}
    weights, losses = make_tensors(autoencoder(case)), dict(loss=case["loss"])
    return Golden(
        case, name, heads, weights, inputs, losses, case["grad_norms"], case["grad_probes"]
    )


def videomae_finetune(name: str) -> Golden:
    """Rows mixed with those of the reversed batch, and their smoothed labels with them."""
    case = videomae_case(name, "finetune")
    smoothed = case["smoothing"] / case["classes"]
    target = np.eye(case["classes"])[case["labels"]] * (1 - case["smoothing"]) + smoothed
    pixels, share = unit_video(case), case["share"]
    pixels, target = (share * x + (1 - share) * x[::-1] for x in (pixels, target))
    weights, losses = make_tensors(classifier(case)), dict(loss=case["loss"])
    return Golden(
        case, "videomae_finetune", {"heads": case["encoder"]["heads"]}, weights,
        dict(video=normalised(pixels), target=target), losses, case["grad_norms"],
        case["grad_probes"],
    )  # fmt: skip


# CoCa, TVTSv2, SNCLR, OmniVL.


def coca() -> Golden:
    golden = load("coca_tiny")
    c, lengths = golden["config"], np.array(golden["lengths"])[:, None]
    b, side, length = c["batch"], c["side"], c["length"]
    image = np.random.RandomState(1).randint(0, 256, (b, side, side, 3)) / 255
    place, drawn = np.arange(length), np.random.RandomState(2).randint(3, c["vocab"], (b, length))
    text = np.where(place == 0, c["start"], np.where(place < lengths - 1, drawn, c["end"]))
    weights = make_tensors({n: tuple(s) for n, s in golden["parameters"].items()})
    weights["logit_scale"] = np.array(np.log(1 / 0.07))
    losses = dict(
        loss=golden["loss"], loss_contrast=golden["contrast"], loss_caption=golden["caption"]
    )
    return Golden(
        golden, "coca", {"heads": c["heads"], "text-heads": c["heads"]}, weights,
        dict(
            image=normalised(image), ids=np.where(place < lengths, text, 0),
            attention_mask=place < lengths,
        ),
        losses, golden["grad_norms"], golden["grad_probes"],
    )  # fmt: skip


@cache
def tvtsv2_weights() -> Arrays:
    """The same for every kind, whose names are the same too."""
    c = load("tvtsv2_tiny")["case"]
    b, t, side = (c[x] for x in ("batch", "frames", "size"))
    net, recipe = tvtsv2s.build(
        size=[c[x] for x in ("width", "depth", "heads", "mlp")],
        text_size=[c[f"text_{x}"] for x in ("width", "depth", "heads", "mlp")],
        features=c["features"], side=side, patch=c["patch"], frames=c["table"], turns=c["turns"],
        vocab_size=c["vocab"], text_length=c["length"],
    )  # fmt: skip
    spec = dict(
        video=jax.ShapeDtypeStruct((b, t, side, side, 3), np.float32),
        text=jax.ShapeDtypeStruct((b, c["turns"], c["length"]), np.int32),
    )
    names = STEPS["tvtsv2"].rules(c["heads"], c["sorter_heads"], c["text_heads"])
    return make_tensors(shapes_of(names, partial(tvtsv2s.init, net, recipe), spec))


def tvtsv2(kind: str) -> Golden:
    """kind: four texts a row, "one", or "patches", which is H/14's code."""
    golden = load("tvtsv2_tiny")
    c, numbers = golden["case"], golden[kind]
    b, t, side, k, n = (c[x] for x in ("batch", "frames", "size", "turns", "length"))
    video = np.random.RandomState(1).standard_normal((b, t, 3, side, side)).astype(np.float32)
    ids = np.random.RandomState(2).randint(1, 48, (b, k, n))
    ends = np.random.RandomState(3).randint(3, n, (b, k, 1))
    ids = np.where(np.arange(n) < ends, ids, np.where(np.arange(n) == ends, 49, 0))
    keep = np.zeros((b, (side // c["patch"]) ** 2), bool)
    for i, row in enumerate(keep):
        row[np.random.RandomState(10 + i).permutation(len(row))[: c["kept"]]] = True
    heads = dict(heads=c["heads"])
    heads |= {"decoder-heads": c["sorter_heads"], "text-heads": c["text_heads"]}
    losses = dict(loss_vtc=numbers["loss_vtc"], loss=numbers["loss"])
    if "loss_sort_times_two" in numbers:
        losses["loss_sort"] = numbers["loss_sort_times_two"]
    return Golden(
        numbers, "tvtsv2_h14" if kind == "patches" else "tvtsv2", heads, tvtsv2_weights(),
        dict(video=video.swapaxes(1, 2), keep=keep, ids=ids[:, 0] if kind == "one" else ids),
        losses, numbers.get("grad_norms", {}), numbers.get("grad_probes", {}),
    )  # fmt: skip


def snclr() -> Golden:
    golden = load("snclr_tiny")
    c, numbers = golden["case"], golden["step"]
    views = [
        np.random.RandomState(i).standard_normal((c["batch"], 3, c["size"], c["size"]))
        for i in (1, 2)
    ]
    bank = np.random.RandomState(3).standard_normal((c["bank"], c["features"]))
    net, recipe = snclrs.build(
        size=(c["width"], c["depth"], c["heads"], c["mlp"]), cube=(1, c["patch"], c["patch"]),
        hidden=c["hidden"], features=c["features"], neighbours=numbers["topk"], queue=c["bank"],
    )  # fmt: skip
    spec = dict(video=jax.ShapeDtypeStruct((2, 2, 1, c["size"], c["size"], 3), np.float32))

    def init(key: Any, spec: Any) -> Any:
        params = snclrs.init(net, recipe, key, spec)
        return dict(params=params, twin={k: v for k, v in params.items() if k != "predictor"})

    shapes = shapes_of(STEPS["snclr"].rules(c["heads"]), init, spec)
    inputs = dict(first=views[0], second=views[1], bank=bank, pointer=np.array(c["pointer"]))
    inputs |= {n: np.array(numbers[n]) for n in ("topk", "threshold")}
    inputs |= {n: np.array(c[n]) for n in ("temperature", "momentum")}
    # Gradients of key biases, and of what batch norm cancels, are rounding only.
    scale = max(numbers["grad_norms"].values())
    return Golden(
        numbers, "snclr", {"heads": c["heads"]}, make_tensors(shapes, small=("cls_token",)), inputs,
        dict(loss=numbers["loss"]), numbers["grad_norms"], numbers["grad_probes"], scale,
    )  # fmt: skip


def omnivl() -> Golden:
    """The negatives are BLIP's most likely ones instead of being drawn."""
    golden, draw = load("omnivl_blip_tiny"), np.random.RandomState(3)
    image = draw.uniform(0, 1, (4, 16, 16, 3))
    ids = draw.randint(5, 20, (4, 7))
    ids[:, 0] = 2
    mask = np.arange(7) < np.array([7, 5, 6, 4])[:, None]
    past = draw.standard_normal((2, 8, 6)).swapaxes(1, 2)
    weights = make_tensors({n: tuple(s) for n, s in golden["shapes"].items()})
    weights["temp"] = np.array(0.07)
    inputs = dict(
        image=normalised(image), ids=np.where(mask, ids, 0), attention_mask=mask,
        image_queue=past[0], text_queue=past[1], queue_ptr=np.array(4), alpha=np.array(0.4),
        momentum=np.array(0.995),
    )  # fmt: skip
    terms = dict(ita="contrast", itm="match", lm="words")
    losses = {f"loss_{a}": golden["losses"][b] for a, b in terms.items()}
    losses["loss"] = sum(golden["losses"].values())
    norms, probes = ({n: g[x] for n, g in golden["grads"].items()} for x in ("norm", "probe"))
    heads = {"heads": 2, "text-heads": 2}
    # Gradients of key biases are rounding only.
    return Golden(golden, "omnivl", heads, weights, inputs, losses, norms, probes, scale=1e-3)


# Rows of the table of docs/parity.md: name -> (format, the golden).
GOLDENS: dict[str, tuple[str, Callable[[], Golden]]] = {
    "SimVTP, released widths": ("simvtp", lambda: simvtp("simvtp_tiny")),
    "SimVTP, other sizes": ("simvtp", lambda: simvtp("simvtp_small")),
    "SimVTP fine-tuned": ("simvtp_finetune", lambda: simvtp_finetune("small")),
    "VideoMAE": ("videomae", lambda: videomae("videomae")),
    "VideoMAE, classifier": ("videomae_finetune", lambda: videomae_finetune("videomae")),
    "VideoMAE V2": ("videomae_v2", lambda: videomae("videomae_v2")),
    "VideoMAE V2, classifier": ("videomae_finetune", lambda: videomae_finetune("videomae_v2")),
    "CoCa": ("coca", coca),
    "TVTSv2": ("tvtsv2", lambda: tvtsv2("four")),
    "TVTSv2, one text": ("tvtsv2", lambda: tvtsv2("one")),
    "TVTSv2, H/14": ("tvtsv2_h14", lambda: tvtsv2("patches")),
    "SNCLR": ("snclr", snclr),
    "OmniVL on images: BLIP": ("omnivl", omnivl),
}


# Comparing.


def close(value: Any, scale: float = 0.0) -> Any:
    """Equal to 1e-9 of the value, or of the scale of the tensor it is taken from."""
    return pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE * scale)


def check_output(x: np.ndarray, golden: Mapping[str, Any], scale: float = 0.0) -> None:
    """An array against its statistics and its first and last entries. scale: of entries that may
    be near 0, in units of the standard deviation."""
    near = scale * golden["std"]
    assert list(x.shape) == golden["shape"]
    assert float(x.std()) == close(golden["std"])
    assert float(x.mean()) == close(golden["mean"], golden["std"])
    assert x.ravel()[:4].tolist() == close(golden["first"], near)
    assert x.ravel()[-4:].tolist() == close(golden["last"], near)


def probe(x: np.ndarray) -> float:
    """A norm does not detect a transposed or reordered tensor; a product with a fixed draw does."""
    return float(x.ravel() @ np.random.RandomState(4).standard_normal(x.size))


def gradients(golden: Golden, out: Arrays) -> Iterator[tuple[str, float, float, float]]:
    """(name, found, expected, scale) of every recorded gradient's norm and probe."""
    for name, expected in golden.norms.items():
        x = out[f"grad/{name}"]
        yield name, float(np.linalg.norm(x)), expected, golden.scale
        if name in golden.probes:
            yield name, probe(x), golden.probes[name], max(expected, golden.scale)


def check_losses(golden: Golden, out: Arrays) -> None:
    for name, expected in golden.losses.items():
        assert out[name].shape == () and float(out[name]) == close(expected), name


def check_gradients(golden: Golden, out: Arrays) -> None:
    """Every gradient that the golden records, and no other."""
    assert {n.removeprefix("grad/") for n in out if n.startswith("grad/")} == golden.norms.keys()
    for name, found, expected, scale in gradients(golden, out):
        assert found == close(expected, scale), name
    if total := golden.case.get("global_grad_norm"):
        square = sum(float(np.sum(x**2)) for n, x in out.items() if n.startswith("grad/"))
        assert square**0.5 == close(total)
