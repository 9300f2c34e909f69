"""A small net of every file format, and its tensors under the published names."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tests.arrays import fill
from vtp_jax import masking, tree
from vtp_jax.convert import formats, rules
from vtp_jax.convert.families import FORMATS
from vtp_jax.methods import simvtp, tvtsv2, videomae
from vtp_jax.nn import mae, text, vit
from vtp_jax.nn.sizes import Size
from vtp_jax.nn.transformer import CLIP
from vtp_jax.tasks import classify, retrieve

TINY = Size(128, 2, 2, 256)
SPEC = dict(
    valid=jax.ShapeDtypeStruct((2,), bool),
    video=jax.ShapeDtypeStruct((2, 4, 16, 16, 3), np.uint8),
    text=jax.ShapeDtypeStruct((2, 6), np.int32),
    text_mask=jax.ShapeDtypeStruct((2, 6), bool),
    label=jax.ShapeDtypeStruct((2,), np.int32),
)
NET = dict(size=TINY, decoder="tiny", cube=(2, 8, 8), dtype="float32")


def words(**changes):
    return simvtp.make(**NET, **{**dict(vocab_size=40, text_length=16), **changes})


def image(places, **more):
    return vit.ViT(TINY, places, cube=(1, 8, 8), **more)


def make_vit(key, pooling="class", classes=5, places=9):
    params = image(places, pooling=pooling).init(key, cubes(places))["params"]
    head = dict(kernel=np.zeros((128, classes)), bias=np.zeros(classes))
    return {**params, **({"head": head} if classes else {})}


def cubes(n):
    return jnp.zeros((1, n, 192))


def make_mae(key, places=9):
    encoder = image(places).init(key, cubes(places))["params"]
    mask = masking.tokens(key, 1, places, 0.5)
    decoder, seen = mae.Decoder(Size(64, 1, 1, 128), places, 192), 1 + mask.keep.shape[1]
    return dict(
        encoder=encoder,
        decoder=decoder.init(key, jnp.zeros((1, seen, 128)), mask)["params"],
    )


def make_clip(key, places=9, length=8):
    visual = image(places, style=CLIP, first_norm=True, features=32)
    tower = text.CausalText(TINY, 32, 40, length)
    ids = jnp.zeros((1, min(6, length)), jnp.int32)
    return dict(
        visual=visual.init(key, cubes(places))["params"],
        text=tower.init(key, ids)["params"],
        logit_scale=np.float32(2.6),
    )


def make_tvtsv2(key, side=16, **changes):
    """At side 8 there is one patch, and the spec is of one frame."""
    frames = 4 if side == 16 else 1
    sizes = dict(frames=5, text_length=8, turns=4)
    method = tvtsv2.make(
        size=TINY, text_size=TINY, features=64, side=side, patch=8, vocab_size=40,
        **{**sizes, **changes},
    )  # fmt: skip
    video = jax.ShapeDtypeStruct((2, frames, side, side, 3), np.uint8)
    text = jax.ShapeDtypeStruct((2, min(6, changes.get("text_length", 6))), np.int32)
    return method.init(key, {**SPEC, "video": video, "text": text})


def make_classifier(key, classes=7):
    return classify.make(base=videomae.make(**NET), classes=classes, drop=[DROP]).init(key, SPEC)


DROP = r"decoder.*|encoder_norm.*|mask_token|encoder_to_decoder.*"
TOWERS = dict(
    video=[DROP, "text_embed/.*", "text_cls/.*", "vtm_head/.*"],
    text=[DROP, "patch_embed/.*", "text_cls/.*", "vtm_head/.*"],
)
# format -> key -> parameters
CASES = {
    "simvtp": lambda key: words().init(key, SPEC),
    "simvtp_finetune": lambda key: retrieve.make(base=words(), drop=TOWERS).init(key, SPEC),
    "videomae": lambda key: videomae.make(**NET).init(key, SPEC),
    "videomae_finetune": make_classifier,
    "bert_embeddings": lambda key: {"text_embed": words().init(key, SPEC)["text_embed"]},
    "vit": make_vit,
    "vit_mean": partial(make_vit, pooling="mean", classes=0),
    "mae": make_mae,
    "clip": make_clip,
    "open_clip": make_clip,
    "tvtsv2": make_tvtsv2,
    "tvtsv2_h14": make_tvtsv2,
}
CASES["hf_videomae"] = CASES["videomae"]
CASES["hf_videomae_finetune"] = CASES["videomae_finetune"]
HEADS = {"heads": 2, "decoder-heads": 1, "text-heads": 2}


def tensors_of(name, dtype="float32", make=None):
    """Tensors under the format's names, none of which is zero."""
    params = fill(make or CASES[name], jax.random.key(0), seed=1)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    form = FORMATS[name]
    heads = {n: HEADS[n] for n in form.stacks}
    flat = tree.flatten(params)
    table = formats.table(form, heads, flat.keys())
    return rules.to_tensors(table, params), params, heads
