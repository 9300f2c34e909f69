"""SNCLR: Soft Neighbors are Positive Supporters in Contrastive Visual Representation Learning
(Ge et al., ICLR 2023, arXiv 2303.17142).

Code:      ChongjianGE/SNCLR @b95c7e5, MIT; not copied. Its memory bank does not run as committed
           (the class body is dedented); the goldens come from a copy with the indentation restored.
Data:      images or videos, two crops of each decode
Parity:    official code, fp64, 1e-9: loss, gradients, moving average, queue; its processes are
           groups
Idea:      MoCo v3 with K more positives for every key: its nearest neighbours in a queue of past
           keys, each weighted by its similarity to the query:

               L = 2 t mean_i ( - log p(key_i) - sum_k w_ik log p(neighbour_ik) )

           with p the softmax of cosines / t over the keys and neighbours of all rows, w a softmax
           of the query's cosines (before the predictor) with its K neighbours; each view is query
           once. Keys come from a moving average of encoder and projector, without gradients.
Command:   vtp train --config snclr/pretrain_imagenet --workdir DIR
Published: linear classification, detection and segmentation "on par or better" than the methods of
           its time; no figures are available here.

Views: the pipeline decodes a clip once and crops it twice (data.video.repeats=2, crop="resized":
video "b 2 t h w c"); colours, blur and flips are applied on the device. With single clips, both
views share the crop and differ only in colours, blur and flips. An image is a video of one frame;
clips of several frames are an addition here, and so are their positions in time (`embed.plane`).

Deviations, each with its reason and the switch that restores the reference:
- One queue for all rows. The reference has one per GPU, of that GPU's rows.             groups=N
- A batch that does not divide the queue wraps around; the reference drops the remainder.
- Keys are stored in the queue with length one, since every use normalises them anyway.
- The four changes of the jitter have a fixed order, torchvision's a random one; the blur is an
  exact Gaussian, PIL's an approximation.
- Batch norm has no running statistics, because the heads are used in training only.
- The weights are outside the logarithm, as in the code; the paper's formula has them inside:
  weighted="inside", with the unspecified gamma set to 1.
Left out: linear classification of frozen features; `evals.probe` uses nearest neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vtp_jax import augment, schedules, tree
from vtp_jax.nn import embed, norm, sizes
from vtp_jax.nn.bind import bind, has
from vtp_jax.nn.transformer import VIT, Linear, Stack, layer_norm
from vtp_jax.objectives import momentum, neighbours, queue, terms
from vtp_jax.objectives.contrastive import normalise
from vtp_jax.types import (
    Batch,
    Encoded,
    Extra,
    Mean,
    Method,
    Out,
    Params,
    Spec,
    UserError,
    assemble,
    made_of,
    wide,
)

TWIN = r"(?!predictor/).*"  # names of the parameters that are averaged


class Head(nn.Module):
    """Linear layers without bias; batch norm and ReLU between them, batch norm without scale and
    bias after the last. PyTorch's default initialisation."""

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
    """A ViT with fixed positions, and two heads on its class token."""

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
        """Tokens of all cubes (pixels in [0, 1]) after the class token, which has no position."""
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
    """How the net is trained; see `build`."""

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
    """Outputs of the net and of its average for one view."""

    z: Float[Array, "b e"]  # projected
    query: Float[Array, "b e"]  # predicted from z
    key: Float[Array, "b e"]  # the average's projection, of length one
    near: Float[Array, "b k e"]  # the key's neighbours
    real: Bool[Array, "b k"]  # which of them exist


def draw_views(
    recipe: Recipe, rng: Array, video: Any
) -> tuple[Float[Array, "b t h w c"], Float[Array, "b t h w c"]]:
    """Two views of "b 2 t h w c", or two of one clip "b t h w c", in [0, 1]."""
    if video.ndim == 5:
        video = jnp.stack([video, video], axis=1)
    if video.shape[1] != 2:
        raise UserError(
            f"snclr takes two views of a clip, not {video.shape[1]}; set data.video.repeats"
        )
    one, two = (
        augment.view(key, embed.to_unit(video[:, i]), recipe.views[i])
        for i, key in enumerate(jax.random.split(rng))
    )
    return one, two


def loss(
    net: SNCLR, recipe: Recipe, params: Params, extra: Extra, batch: Batch, rng: Array, step: Array
) -> tuple[Array, Out]:
    """Queries of each view against keys of the other; the second view's keys enter the queue."""
    valid, groups = batch["valid"], recipe.groups
    online, average = (bind(net, p) for p in (params, extra["twin"]))

    def look(video: Float[Array, "b t h w c"]) -> Seen:
        z = online.project(video, valid)
        key = normalise(jax.lax.stop_gradient(average.project(video, valid)))
        past = extra["queue"]
        near = neighbours.nearest(key, past["key"], past["real"], recipe.neighbours, groups)
        return Seen(z, online.predict(z, valid), key, *near)

    def ask(a: Seen, b: Seen) -> Mean:
        support = jax.lax.stop_gradient(a.z) if recipe.detach_weights else a.z
        weight = neighbours.positiveness(support, b.near, b.real, recipe.threshold)
        return neighbours.soft_info_nce(
            a.query,
            jnp.concatenate([b.key[:, None], b.near], axis=1),
            jnp.pad(b.real, ((0, 0), (1, 0)), constant_values=True) & valid[:, None],
            jnp.pad(weight, ((0, 0), (1, 0)), constant_values=1.0),
            valid,
            temperature=recipe.temperature,
            weighted=recipe.weighted,
        )

    one, two = (look(video) for video in draw_views(recipe, rng, batch["video"]))
    there, back = ask(one, two), ask(two, one)
    scale = 2 * recipe.temperature  # as in MoCo v3
    found = Mean(scale * (there.total + back.total), there.count)
    # Batch norm turns a single row into zeros, so its key would have no direction.
    several = valid & (valid.sum() > 1)
    past = queue.push(extra["queue"], dict(key=two.key), several, groups)
    return found.value(), Out(dict(loss_contrast=found), {**extra, "queue": past})


def init(net: SNCLR, recipe: Recipe, rng: Array, spec: Spec) -> Params:
    """As in MoCo v3: Xavier's rule for q, k and v separately and for the embedding of cubes, whose
    biases are 0."""
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
    """The average starts as a copy of the parameters, the queue full of random directions."""
    twin = momentum.twin(params, TWIN)
    keys = normalise(jax.random.normal(rng, (recipe.places, net.features)))
    past = queue.init(recipe.places, key=jax.ShapeDtypeStruct(keys.shape[1:], keys.dtype))
    return dict(twin=twin, queue={**past, "key": keys, "real": jnp.ones(recipe.places, bool)})


def after_update(
    net: SNCLR, recipe: Recipe, params: Params, extra: Extra, step: Int[Array, ""]
) -> tuple[Params, Extra]:
    """The reference updates the average at the start of a step; here, that is the end of the
    previous one."""
    twin = momentum.follow(extra["twin"], params, recipe.momentum(step + 1))
    return params, {**extra, "twin": twin}


# What the trained net is used for.


def encode_video(
    net: SNCLR,
    recipe: Recipe,
    params: Params,
    extra: Extra,
    batch: Batch,
    rng: Array | None = None,
) -> Encoded:
    """Only the encoder; embedding: its class token. Tasks that read raw may drop the last norm."""
    bound = bind(net, params)
    raw = bound.encoder(bound.embed(embed.to_unit(batch["video"])))
    found = dict(raw=raw, mask=jnp.ones(raw.shape[:2], bool))
    if has(bound, "norm"):
        tokens = bound.norm(raw)
        found.update(embedding=wide(tokens[:, 0]), tokens=tokens)
    return found


def build(
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
) -> tuple[SNCLR, Recipe]:
    """SNCLR. Its `extra` is {"twin": averages of all parameters except the predictor's, "queue":
    see objectives.queue}. Batches need `video`.

    size: a name in `nn.sizes` or (width, depth, heads, mlp). cube: frames, rows and columns of a
    token. hidden, features: widths of the heads. neighbours: K; 0 is MoCo v3. queue: places of each
    queue. groups: number of blocks of the batch with a queue each. momentum: of the average, a
    number or a schedule. weighted: weights "outside" the logarithm or "inside". threshold: weights
    up to it become 0 (the reference's option: 1 / K). detach_weights: no gradient through the
    weights. first, second: fields of `augment.View` for the two views; by default MoCo v3's. dtype:
    of activations and matrix products; remat, unroll: see nn.transformer.Stack. Raises UserError on
    unknown options and on more neighbours than the queue has places.
    """
    terms.choose("weighted", weighted, ("outside", "inside"))
    if neighbours > queue:
        raise UserError(f"method.neighbours={neighbours} is more than the queue's {queue} places")
    views: list[dict[str, Any]] = [dict(blur=1.0), dict(blur=0.1, solarise=0.2)]
    for name, view, changes in zip(("first", "second"), views, (first, second), strict=True):
        view.update(changes or {})
        if odd := sorted(set(view) - set(augment.View._fields)):
            known = ", ".join(augment.View._fields)
            raise UserError(f"method.{name}: unknown key '{odd[0]}'; known: {known}")
    one, two = (augment.View(**view) for view in views)
    net = SNCLR(
        size=sizes.pick(sizes.ENCODERS, size, "method.size"), cube=(cube[0], cube[1], cube[2]),
        hidden=hidden, features=features, dtype=dtype, remat=remat, unroll=unroll,
        mean=tuple(mean), std=tuple(std),
    )  # fmt: skip
    return net, Recipe(
        neighbours=neighbours,
        places=groups * queue,
        groups=groups,
        temperature=temperature,
        momentum=schedules.make(momentum, "method.momentum"),
        weighted=weighted,
        threshold=threshold,
        detach_weights=detach_weights,
        views=(one, two),
    )


@made_of(build)
def make(**cfg: Any) -> Method:
    verbs = dict(video=encode_video)
    return assemble(
        *build(**cfg), init=init, loss=loss, encode=verbs, start=start, after_update=after_update
    )
