"""Ten steps of AdamW in PyTorch and here, from the same weights on the same batches.

PyTorch: torch.optim.AdamW, with the parameter groups and the table of rates that the authors' code
makes (facts of wufeim/SimVTP @558d24e, restated below), on the module that exported folders carry.
Here: `vtp_jax.run.optim`, with the rules and schedule of the configs; figures: docs/parity.md.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.goldens import make_tensor
from vtp_jax import masking, schedules
from vtp_jax.convert import pytorch, rules
from vtp_jax.convert.families import simvtp as published
from vtp_jax.methods import simvtp
from vtp_jax.nn.sizes import Size
from vtp_jax.objectives import terms
from vtp_jax.run import optim
from vtp_jax.setup import shipped
from vtp_jax.setup.recipes import DECAY
from vtp_jax.tasks import retrieve

torch = pytest.importorskip("torch", reason="torch is installed by `make test`")
finetune_msrvtt = shipped.module("simvtp/finetune_msrvtt")
torch.set_num_threads(1)  # nets this small cost more in threads than they save
F = torch.nn.functional

STEPS, WARMUP, DECAYED = 10, 3, 0.05
ENCODER, DECODER = Size(64, 2, 2, 96), Size(32, 2, 1, 64)
CUBE, VIDEO, ROWS, LENGTH, WORDS, MASK = (2, 8, 8), (4, 16, 24), 4, 7, 40, 3
N, HIDDEN = 12, 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def draw_batch(step: int, dtype: str) -> dict[str, np.ndarray]:
    """The input of both sides at a step: a batch, and everything that the loss would draw."""
    draw = np.random.default_rng(step)
    mask = np.arange(LENGTH) < np.array([7, 5, 3, 4])[:, None]
    ids = np.where(mask, draw.integers(5, WORDS, (ROWS, LENGTH)), 0)
    asked = mask & (draw.uniform(size=ids.shape) < 0.5)
    asked[:, 0] = True
    return dict(
        video=draw.uniform(size=(ROWS, *VIDEO, 3)).astype(dtype),
        text=ids,
        text_mask=mask,
        valid=np.ones(ROWS, bool),
        hidden=np.stack([draw.permutation(N) < HIDDEN for _ in range(ROWS)]),
        asked=asked,
        masked=np.where(asked, MASK, ids),
        negative=(np.arange(ROWS) + draw.integers(1, ROWS, ROWS)) % ROWS,
    )


# PyTorch.


def make_rates(peak: float, end: float) -> np.ndarray:
    """The authors' table, a rate a step: linear from 0, then a cosine, with the peak twice."""
    rising = np.linspace(0, peak, WARMUP)
    k = np.arange(STEPS - WARMUP)
    return np.concatenate([rising, end + 0.5 * (peak - end) * (1 + np.cos(np.pi * k / len(k)))])


def make_groups(net: Any, skip: set[str], scale: Callable[[str], float]) -> list[dict[str, Any]]:
    """No decay for what has one dimension, for biases, and for names in `skip`."""
    groups = []
    for name, p in net.named_parameters():
        spared = p.ndim == 1 or name.endswith(".bias") or name in skip
        decay = 0.0 if spared else DECAYED
        groups.append(dict(params=[p], weight_decay=decay, lr_scale=scale(name)))
    return groups


def contrast(text: Any, video: Any) -> Any:
    logits = F.normalize(text) @ F.normalize(video).T / 0.05
    label = torch.arange(len(logits))
    return F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)


def pretraining_loss(net: Any, batch: dict[str, Any]) -> Any:
    """L_v + L_t + L_vtc + L_vtm, with the reference's quirks."""
    frames, ids, mask = batch["video"], batch["masked"], batch["text_mask"]
    pixels, words = net.reconstruct(frames, batch["hidden"], ids, mask)
    t, h, w = (side // step for side, step in zip(VIDEO, CUBE, strict=True))
    cubes = frames.reshape(ROWS, t, CUBE[0], h, CUBE[1], w, CUBE[2], 3)
    cubes = cubes.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(ROWS, N, -1, 3)
    std, mean = torch.std_mean(cubes, 2, keepdim=True)
    target = ((cubes - mean) / (std + 1e-6)).flatten(2)[batch["hidden"]]
    restored = F.mse_loss(pixels, target.view_as(pixels))
    asked = batch["asked"]
    named = F.cross_entropy(words[asked], batch["text"][asked])
    seen = net.encoder.patch_embed(frames)[~batch["hidden"]].view(ROWS, N - HIDDEN, -1)
    embedded = contrast(net.encode_text(ids, mask), net.encode(seen).mean(1))
    pairs = torch.cat([seen, seen[batch["negative"]]])
    tokens = net.encode_pair(pairs, ids.repeat(2, 1), mask.repeat(2, 1))
    label = torch.arange(2).flip(0).repeat_interleave(ROWS)
    return restored + named + embedded + F.cross_entropy(net.vtm_head(tokens.mean(1)), label)


def finetuning_loss(net: Any, batch: dict[str, Any]) -> Any:
    video, text = net(batch["video"], batch["text"], batch["text_mask"])
    return contrast(text, video)


def layer_scale(decay: float) -> Callable[[str], float]:
    """VideoMAE's rule on names without their tower; the words' embedding counts as the cubes'."""

    def scale(name: str) -> float:
        part, *rest = name.split(".")[1:]
        depth = ENCODER.depth
        layer = {"patch_embed": 0, "text_embeddings": 0, "fc_norm": depth + 1}
        return decay ** (depth + 1 - (int(rest[0]) + 1 if part == "blocks" else layer[part]))

    return scale


# Here.


def make_pretraining(dtype: str) -> Any:
    net, recipe = simvtp.build(
        size=ENCODER, decoder=DECODER, cube=CUBE, dropout=0.0, dtype=dtype,
        vocab_size=WORDS, text_length=LENGTH, mask_id=MASK, mean=MEAN, std=STD,
        contrast_text="masked", match_text="masked", pool_padding=True, sum_directions=True,
    )  # fmt: skip

    def loss(params: Any, batch: dict[str, Any]) -> Any:
        draws = simvtp.Draws(
            masking.of_dropped(batch["hidden"], HIDDEN),
            batch["asked"],
            batch["masked"],
            batch["negative"],
        )
        out = simvtp.forward(net, recipe, params, batch, draws)
        return terms.total(simvtp.compare(recipe, out, batch, draws), recipe.weights)

    return loss


def make_finetuning(dtype: str) -> Any:
    base = simvtp.make(
        size=ENCODER, decoder=DECODER, cube=CUBE, dropout=0.0, dtype=dtype, vocab_size=WORDS,
        text_length=LENGTH, mean=MEAN, std=STD,
    )  # fmt: skip
    task = retrieve.make(base=base, pool_padding=True, sum_directions=True)

    def loss(params: Any, batch: dict[str, Any]) -> Any:
        extra = dict(video={}, text={})
        return task.loss(params, extra, batch, jax.random.key(0), jnp.zeros((), jnp.int32))[0]

    return loss


class Recipe(NamedTuple):
    """Both sides of a released recipe; rates are those of the full batch."""

    ours: Callable[[str], Any]
    theirs: Callable[[Any, dict[str, Any]], Any]
    table: list[rules.Rule]
    decoder: Size | None
    betas: tuple[float, float]
    peak: float
    end: float
    rules: Any
    skip: set[str]
    scale: Callable[[str], float]


DUAL = Recipe(
    make_finetuning, finetuning_loss, published.finetune_rules(ENCODER.heads), None,
    (0.9, 0.999), 7.5e-5, 2.5e-7, finetune_msrvtt.rates(ENCODER.depth, official=False),
    {"pos_embed", "cls_token"}, layer_scale(0.75),
)  # fmt: skip
RECIPES = {
    "pretraining": Recipe(
        make_pretraining, pretraining_loss,
        published.pretrain_rules(ENCODER.heads, DECODER.heads), DECODER,
        (0.9, 0.95), 6e-4, 4e-5, DECAY, {"pos_embed", "cls_token", "mask_token"}, lambda _: 1.0,
    ),
    "finetuning": DUAL,
    "finetuning as released": DUAL._replace(
        rules=finetune_msrvtt.rates(ENCODER.depth, official=True), scale=lambda _: 1.0
    ),
}  # fmt: skip


def build_pytorch(recipe: Recipe, dtype: str) -> Any:
    """The module, with weights by the goldens' rule."""
    spec = importlib.util.spec_from_file_location("simvtp_module", pytorch.MODULE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = pytorch.config(
        encoder=ENCODER, decoder=recipe.decoder, video=VIDEO, cube=CUBE, mean=MEAN, std=STD,
        vocab_size=WORDS, text_length=LENGTH, pad_id=0, dropout=0.0, pool_padding=True,
    )  # fmt: skip
    net = module.NETS[config["kind"]](config).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.from_numpy(make_tensor(name, tuple(p.shape))))
    return net.to(getattr(torch, dtype))


def tensors(net: Any) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in net.named_parameters()}


def train_pytorch(recipe: Recipe, net: Any, dtype: str) -> list[float]:
    groups = make_groups(net, recipe.skip, recipe.scale)
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak, betas=recipe.betas, eps=1e-8)
    losses = []
    for step, rate in enumerate(make_rates(recipe.peak, recipe.end)):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        batch = {k: torch.from_numpy(v) for k, v in draw_batch(step, dtype).items()}
        optimizer.zero_grad()
        value = recipe.theirs(net, batch)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def make_schedule(recipe: Recipe) -> schedules.Schedule:
    spec = dict(kind="warmup_cosine", peak=recipe.peak, end=recipe.end)
    return schedules.make(spec | dict(warmup=WARMUP, steps=STEPS))


def train_jax(recipe: Recipe, params: Any, dtype: str) -> tuple[Any, list[float]]:
    lr = make_schedule(recipe)
    if dtype == "float64":  # rates here are fp32; PyTorch's in fp64 test the optimizer alone
        table = jnp.asarray(make_rates(recipe.peak, recipe.end))
        lr = table.__getitem__
    optimizer = optim.make(
        jax.eval_shape(lambda: params),
        rules=recipe.rules,
        lr=lr,
        weight_decay=DECAYED,
        betas=recipe.betas,
    )
    loss, opt, losses = recipe.ours(dtype), optimizer.init(params), []

    @jax.jit
    def update(params: Any, opt: Any, batch: Any, step: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, batch)
        return value, *optimizer.update(grads, opt, params, step)[:2]

    for step in range(STEPS):
        batch = jax.tree.map(jnp.asarray, draw_batch(step, dtype))
        value, params, opt = update(params, opt, batch, jnp.asarray(step, jnp.int32))
        losses.append(float(value))
    return params, losses


class Runs(NamedTuple):
    start: dict[str, np.ndarray]
    theirs: dict[str, np.ndarray]
    ours: dict[str, np.ndarray]
    losses: tuple[list[float], list[float]]


def run(recipe: Recipe, dtype: str) -> Runs:
    net = build_pytorch(recipe, dtype)
    start = tensors(net)
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(jnp.asarray, rules.to_params(recipe.table, start))
        params, losses = train_jax(recipe, params, dtype)
        ours = rules.to_tensors(recipe.table, params)
    expected = train_pytorch(recipe, net, dtype)
    return Runs(start, tensors(net), ours, (losses, expected))


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b))


@pytest.mark.parametrize(
    "name, dtype",
    [(name, "float32") for name in RECIPES]
    + [
        pytest.param(name, "float64", marks=pytest.mark.slow(reason="fp32 is what runs have"))
        for name in ("pretraining", "finetuning")
    ],
)
def test_parameters_after_ten_steps_are_pytorchs(name, dtype):
    runs = run(RECIPES[name], dtype)
    np.testing.assert_allclose(*runs.losses, rtol=TOLERANCE[dtype])
    assert runs.ours.keys() == runs.theirs.keys()
    for key, theirs in runs.theirs.items():
        assert runs.ours[key].dtype == theirs.dtype
        assert apart(runs.ours[key], theirs) < TOLERANCE[dtype], key
        # Every tensor has changed by more than a tolerance could hide.
        assert apart(theirs, runs.start[key]) > 5 * TOLERANCE[dtype], key


@pytest.mark.parametrize("name", RECIPES)
def test_rates_are_those_of_the_table_to_single_precision(name):
    rates = make_rates(RECIPES[name].peak, RECIPES[name].end)
    assert rates[0] == 0  # nothing moves
    assert np.isclose(rates[WARMUP - 1], rates[WARMUP])  # the peak, twice
    ours = [float(make_schedule(RECIPES[name])(step)) for step in range(STEPS)]
    np.testing.assert_allclose(ours, rates, rtol=1e-6)  # fp32, and a cosine that comes near -1
