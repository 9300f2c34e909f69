"""SNCLR: Soft Neighbors are Positive Supporters in Contrastive Visual Representation Learning
(Ge et al., ICLR 2023, arXiv 2303.17142).

Code:      ChongjianGE/SNCLR @b95c7e5, MIT; not copied. Its memory bank does not run as committed
           (the class body is dedented); it was run as it reads.
Data:      images or videos, two crops of each decode
Parity:    official code, fp64, 1e-9: loss, gradients, moving average, queue; its processes are
           groups
Idea:      MoCo v3, whose every key brings along its K nearest neighbours from a queue of past keys.
           They count as positives too, each by how near it is to the query:

               L = 2 t mean_i ( - log p(key_i) - sum_k w_ik log p(neighbour_ik) )

           with p the softmax of cosines / t over the keys and neighbours of all rows, w a softmax
           of the query's cosines (before the predictor) with its K neighbours; both views in turn.
           Keys come from a moving average of encoder and projector: they get no gradient.
Command:   python -m vtp_jax.train --config configs/snclr/pretrain_imagenet.py --workdir DIR
Published: linear classification, detection and segmentation "on par or better" than its time's;
           no figures are known to us.

Views: the pipeline decodes a clip once and crops it twice (data.video.repeats=2, crop="resized":
video "b 2 t h w c"); colours, blur and flips are drawn on the device. A batch of single clips is
seen twice and only changes in those. A picture is a video of one frame; clips are ours, and so is
where their frames stand (`embed.plane`).

Deviations, each with its reason and the switch that brings the reference's back:
- One queue for all rows. The reference's is one per GPU, of that GPU's rows.            groups=N
- A batch that does not divide the queue wraps around; the reference drops what is left over.
- Keys stand in the queue with length one: all that reads them normalises them.
- The jitter's four changes come in one order, torchvision's in a random one; the blur is a true
  Gaussian, PIL's an approximation.
- Batch norm has no running statistics, for only training reads the heads.
- The paper's formula has the weights inside of the logarithm; its code has them before it, and so
  have we; weighted="inside" is the formula, with its unknown gamma as 1.
Left out: linear classification of frozen features; `evals.probe` asks nearest neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vtp_jax import augment, schedules, tree
from vtp_jax.nn import embed, norm, sizes
from vtp_jax.nn.transformer import VIT, Linear, Stack, layer_norm
from vtp_jax.objectives import neighbours, queue
from vtp_jax.objectives.contrastive import normalise
from vtp_jax.types import Batch, Encoded, Extra, Mean, Method, Out, Params, Spec, UserError


class Head(nn.Module):
    """Linear layers without bias; batch norm and ReLU between them, batch norm without scale and
    bias after the last. PyTorch's default weights."""

    widths: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b d"], where: Bool[Array, " b"]) -> Float[Array, "b e"]:
        for i, width in enumerate(self.widths):
            if i:
                x = nn.relu(norm.BatchNorm(name=f"norm{i}")(x, where))
            init = embed.torch_conv_init(x.shape[1])
            x = Linear(width, False, init, self.dtype, name=f"fc{i + 1}")(x)
        return norm.batch_norm(x, where)


class SNCLR(nn.Module):
    """The net: a ViT with fixed positions, and two heads on its class token."""

    size: sizes.Size
    cube: tuple[int, int, int]
    hidden: int
    features: int
    dtype: Any
    remat: str | None
    unroll: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def setup(self):
        d, dtype = self.size.width, jnp.dtype(self.dtype)
        self.patch_embed = embed.CubeEmbed(d, self.cube, len(self.mean), dtype)
        self.class_token = self.param("class_token", nn.initializers.normal(1e-6), (d,))
        self.encoder = Stack(self.size, 0.0, VIT, dtype, self.remat, self.unroll)
        self.norm = layer_norm(dtype, VIT.eps)
        self.projector = Head((self.hidden, self.hidden, self.features), dtype)
        self.predictor = Head((self.hidden, self.features), dtype)

    def embed(self, video: Float[Array, "b t h w c"]) -> Float[Array, "b n d"]:
        """Tokens of all cubes (pixels in [0, 1]), the class token first, which has no position."""
        cubes = embed.standardise(embed.cut(video, self.cube), self.mean, self.std)
        x = self.patch_embed(cubes)
        b, _, d = x.shape
        x += jnp.asarray(embed.plane(embed.grid_of(video.shape, self.cube), d), x.dtype)
        first = jnp.broadcast_to(self.class_token.astype(x.dtype), (b, 1, d))
        return jnp.concatenate([first, x], axis=1)

    def project(
        self, video: Float[Array, "b t h w c"], where: Bool[Array, " b"]
    ) -> Float[Array, "b e"]:
        return self.projector(self.norm(self.encoder(self.embed(video))[:, 0]), where)

    def predict(self, z: Float[Array, "b e"], where: Bool[Array, " b"]) -> Float[Array, "b e"]:
        return self.predictor(z, where)

    def __call__(
        self, video: Float[Array, "b t h w c"], where: Bool[Array, " b"]
    ) -> Float[Array, "b e"]:
        return self.predict(self.project(video, where), where)


class Recipe(NamedTuple):
    """How the net is trained; see `make`."""

    neighbours: int
    places: int  # of all queues together
    groups: int
    temperature: float
    momentum: schedules.Schedule
    weighted: str
    threshold: float
    detach_weights: bool
    views: tuple[augment.View, augment.View]


class Seen(NamedTuple):
    """One view, to the net and to its average."""

    z: Float[Array, "b e"]  # projected
    query: Float[Array, "b e"]  # predicted from z
    key: Float[Array, "b e"]  # the average's projection, of length one
    near: Float[Array, "b k e"]  # the key's neighbours
    real: Bool[Array, "b k"]  # which of them there are


def loss(
    net: SNCLR, recipe: Recipe, params: Params, extra: Extra, batch: Batch, rng: Array, step: Array
) -> tuple[Array, Out]:
    """Both views ask for each other's keys; the second one's keys enter the queue."""
    where, groups = batch["valid"], recipe.groups
    online, average = (net.bind({"params": p}) for p in (params, extra["twin"]))

    def look(video: Float[Array, "b t h w c"]) -> Seen:
        z = online.project(video, where)
        key = normalise(jax.lax.stop_gradient(average.project(video, where)))
        past = extra["queue"]
        near = neighbours.nearest(key, past["key"], past["real"], recipe.neighbours, groups)
        return Seen(z, online.predict(z, where), key, *near)

    def ask(a: Seen, b: Seen) -> Mean:
        support = jax.lax.stop_gradient(a.z) if recipe.detach_weights else a.z
        weight = neighbours.positiveness(support, b.near, b.real, recipe.threshold)
        return neighbours.soft_info_nce(
            a.query,
            jnp.concatenate([b.key[:, None], b.near], axis=1),
            jnp.pad(b.real, ((0, 0), (1, 0)), constant_values=True) & where[:, None],
            jnp.pad(weight, ((0, 0), (1, 0)), constant_values=1.0),
            where,
            temperature=recipe.temperature,
            weighted=recipe.weighted,
        )

    one, two = (look(video) for video in draw_views(recipe, rng, batch["video"]))
    there, back = ask(one, two), ask(two, one)
    scale = 2 * recipe.temperature  # as in MoCo v3
    found = Mean(scale * (there.total + back.total), there.count)
    # Batch norm leaves nothing of a row that is alone: its key has no direction.
    several = where & (where.sum() > 1)
    past = queue.push(extra["queue"], dict(key=two.key), several, groups)
    return found.value(), Out(dict(loss_contrast=found), {**extra, "queue": past})


def draw_views(
    recipe: Recipe, rng: Array, video: Any
) -> tuple[Float[Array, "b t h w c"], Float[Array, "b t h w c"]]:
    """Two views of "b 2 t h w c", or of one clip "b t h w c" seen twice, in [0, 1]."""
    if video.ndim == 5:
        video = jnp.stack([video, video], axis=1)
    if video.shape[1] != 2:
        raise UserError(f"snclr sees two views of a clip, not {video.shape[1]}: data.video.repeats")
    one, two = (
        augment.view(key, embed.to_unit(video[:, i]), recipe.views[i])
        for i, key in enumerate(jax.random.split(rng))
    )
    return one, two


def init(net: SNCLR, rng: Array, spec: Spec) -> Params:
    """As MoCo v3: q, k and v are drawn by Xavier's rule one by one, and so is the embedding of
    cubes, with biases of 0."""
    shape = spec["video"].shape
    params: Any = net.init(rng, jnp.zeros((1, *shape[-4:])), jnp.ones(1, bool))["params"]
    kernel, pixels = params["patch_embed"]["kernel"], math.prod(net.cube) * shape[-1]
    bound = math.sqrt(6 / (pixels + net.size.width))
    drawn = {
        "encoder/blocks/attn/qkv": params["encoder"]["blocks"]["attn"]["qkv"] * math.sqrt(2),
        "patch_embed/kernel": kernel * (bound * math.sqrt(pixels)),  # from 1 / sqrt(pixels)
        "patch_embed/bias": jnp.zeros_like(params["patch_embed"]["bias"]),
    }
    return tree.replace(params, drawn)


def start(net: SNCLR, recipe: Recipe, rng: Array, spec: Spec, params: Params) -> Extra:
    """The average is a copy of what it averages, the queue full of random directions."""
    twin = queue.twin({name: part for name, part in params.items() if name != "predictor"})
    keys = normalise(jax.random.normal(rng, (recipe.places, net.features)))
    past = queue.init(recipe.places, key=jax.ShapeDtypeStruct(keys.shape[1:], keys.dtype))
    return dict(twin=twin, queue={**past, "key": keys, "real": jnp.ones(recipe.places, bool)})


def after_update(
    recipe: Recipe, params: Params, extra: Extra, step: Int[Array, ""]
) -> tuple[Params, Extra]:
    """The reference moves the average before it is used, which is here after the step before."""
    old = extra["twin"]
    decay = recipe.momentum(step + 1)
    new = queue.moving_average(old, {name: params[name] for name in old}, decay)
    return params, {**extra, "twin": new}


# What the trained net is used for.


def encode_video(
    net: SNCLR, params: Params, extra: Extra, batch: Batch, rng: Array | None = None
) -> Encoded:
    """The encoder alone: embedding is its class token. memory: the tokens before it. Tasks that go
    on from `raw` may drop the last norm."""
    bound = net.bind({"params": params})
    memory = bound.embed(embed.to_unit(batch["video"]))
    raw = bound.encoder(memory)
    found = dict(raw=raw, mask=jnp.ones(raw.shape[:2], bool), memory=memory)
    if "norm" in params:
        tokens = bound.norm(raw)
        found.update(embedding=tokens[:, 0].astype(jnp.float32), tokens=tokens)
    return found


def make(
    *,
    size: str | Sequence[int] = (384, 12, 12, 1536),
    cube: Sequence[int] = (1, 16, 16),
    hidden: int = 4096,
    features: int = 256,
    neighbours: int = 30,
    queue: int = 128_000,
    groups: int = 1,
    temperature: float = 0.2,
    momentum: float | Mapping[str, Any] = 0.99,
    weighted: str = "outside",
    threshold: float = 0.0,
    detach_weights: bool = False,
    first: Mapping[str, Any] | None = None,
    second: Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
    remat: str | None = None,
    unroll: int = 1,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> Method:
    """SNCLR as a `Method`; extra is {"twin": averages of all parameters but the predictor's,
    "queue": see objectives.queue}.

    size: a name in `nn.sizes` or (width, depth, heads, mlp). cube: frames, rows and columns of a
    token. hidden, features: widths of the heads. neighbours: K; 0 is MoCo v3. queue: its places.
    groups: blocks of the batch that have a queue of their own. momentum: of the average, a number
    or a schedule. weighted: "outside" of the logarithm or "inside". threshold: weights up to it are
    0 (the reference's option: 1 / K). detach_weights: no gradient through the weights. first,
    second: fields of `augment.View` for the two views; by default MoCo v3's. dtype: of activations
    and matrix products; remat, unroll: see nn.transformer.Stack.
    """
    places, known = groups * queue, ("outside", "inside")
    if weighted not in known:
        raise UserError(f"method.weighted={weighted!r}; known: {', '.join(known)}")
    if neighbours > queue:
        raise UserError(f"method.neighbours={neighbours} are more than the queue's {queue} places")
    views: list[dict[str, Any]] = [dict(blur=1.0), dict(blur=0.1, solarise=0.2)]
    for name, view, changes in zip(("first", "second"), views, (first, second), strict=True):
        view.update(changes or {})
        if odd := sorted(set(view) - set(augment.View._fields)):
            known = ", ".join(augment.View._fields)
            raise UserError(f"method.{name}: unknown key '{odd[0]}'; known: {known}")
    one, two = (augment.View(**view) for view in views)
    net = SNCLR(
        sizes.pick(sizes.ENCODERS, size, "method.size"), (cube[0], cube[1], cube[2]),
        hidden, features, dtype, remat, unroll, tuple(mean), tuple(std),
    )  # fmt: skip
    recipe = Recipe(
        neighbours, places, groups, temperature, schedules.make(momentum, "method.momentum"),
        weighted, threshold, detach_weights, (one, two),
    )  # fmt: skip
    return Method(
        init=partial(init, net),
        loss=partial(loss, net, recipe),
        encode=dict(video=partial(encode_video, net)),
        start=partial(start, net, recipe),
        after_update=partial(after_update, recipe),
    )
