"""Divided attention over time and space: TimeSformer's numbers, and laws. The golden states the
rule that makes weights and inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tests.arrays import fill
from tests.goldens import check_output, close, load, make_tensor, probe
from vtp_jax import tree
from vtp_jax.convert import rules
from vtp_jax.convert.families import timm
from vtp_jax.nn import divided, sizes
from vtp_jax.types import UserError

KEY = jax.random.key(0)
OFFICIAL = load("timesformer_tiny")
CASE = OFFICIAL["case"]
SIZE = sizes.Size(*(CASE[x] for x in ("width", "depth", "heads", "mlp")))
BRANCHES = dict(time="time_fc", space="attn/proj", mlp="mlp/fc2")  # the last layer of each


def official_rules():
    """TimeSformer's names: a ViT's, and in each block one more norm, attention and linear layer.
    Both embeddings here have the official one's shape where a cube is one frame."""
    names, block = timm.vit_rules(CASE["heads"], head=None), "encoder/blocks"
    time = rules.stack("encoder", "blocks", CASE["heads"], timm.TIMM)
    time = [r for r in time if r.param.startswith(f"{block}/attn/")]
    return [
        *(r._replace(param=r.param.replace("patch_embed", "video_patch_embed")) for r in names),
        rules.Rule("time_position", "time_embed", rules.TABLE),
        *(
            r._replace(
                param=r.param.replace("/attn/", "/time_attn/"),
                tensor=r.tensor.replace(".attn.", ".temporal_attn."),
            )
            for r in time
        ),
        *rules.norm(f"{block}/norm_time", "blocks.{i}.temporal_norm1"),
        *rules.linear(f"{block}/time_fc", "blocks.{i}.temporal_fc"),
    ]


def net(**changes):
    h, w = (side // CASE["patch"] for side in CASE["size"])
    return divided.DividedViT(
        **{**dict(size=SIZE, places=h * w, frames=CASE["frames"], cube=(1, 8, 8)), **changes}
    )


def clip(frames=CASE["frames"], seed=1):
    return np.random.RandomState(seed).uniform(0, 1, (CASE["batch"], frames, *CASE["size"], 3))


def whole(params):
    """Adds the embedding of images, which clips do not read."""
    return {**params, "patch_embed": params["video_patch_embed"]}


@pytest.fixture(scope="module")
def official():
    """Parameters by the golden's rule, in fp64, without the embedding of images."""
    shapes = jax.eval_shape(net().init, KEY, jnp.zeros((1, *clip().shape[1:])))["params"]
    flat = {k: np.empty(x.shape) for k, x in tree.flatten(shapes).items()}
    flat = {rule.param: flat[rule.param] for rule in official_rules()}
    empty = rules.to_tensors(official_rules(), traverse_util.unflatten_dict(flat, sep="/"))
    theirs = {k: np.float64(make_tensor(k, x.shape)) for k, x in empty.items()}
    return rules.to_params(official_rules(), theirs)


def test_tokens_and_gradients_equal_timesformers(official):
    draw = np.random.RandomState(5)
    with jax.enable_x64(True):
        model = net(dtype=jnp.float64)
        weight = draw.standard_normal(OFFICIAL["tokens"]["shape"])

        @jax.jit
        @functools.partial(jax.value_and_grad, has_aux=True)
        def run(params):
            tokens = model.apply({"params": whole(params)}, jnp.asarray(clip()))
            return (tokens * weight).sum(), tokens

        (value, tokens), grads = jax.device_get(run(jax.tree.map(jnp.asarray, official)))
    check_output(tokens, OFFICIAL["tokens"])
    check_output(tokens[:, 0], OFFICIAL["class"])
    assert float(value) == close(OFFICIAL["scalar"])
    theirs = rules.to_tensors(official_rules(), grads)
    assert theirs.keys() == OFFICIAL["grads"].keys()
    for name, golden in OFFICIAL["grads"].items():
        size = float(np.linalg.norm(theirs[name]))
        assert size == close(golden["norm"], 1e-3), name
        assert probe(theirs[name]) == close(golden["probe"], size), name


@pytest.fixture(scope="module")
def made(official):
    """The net in fp32 with those weights and an embedding of images, and its output."""
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), whole(official))
    return params, jax.jit(
        lambda params, clip: net().apply({"params": params}, clip, method="encode")
    )


def without_time(params):
    """With the time branch and the time table set to zero."""
    flat = tree.flatten(params)
    zero = [k for k in flat if "time_fc" in k or k == "time_position"]
    return tree.replace(params, {k: 0 * flat[k] for k in zero})


def test_a_shorter_clip_uses_the_first_rows_of_the_time_table(made):
    params, encode = made
    short, table = np.float32(clip(2)), params["time_position"]
    tokens = encode(params, short)
    for row in range(len(table)):
        other = encode({**params, "time_position": table.at[row].add(1.0)}, short)
        assert (other == tokens).all() == (row >= 2), row


def test_without_time_frames_are_images_and_the_class_token_is_their_mean(made):
    """Of one block without an MLP: each frame's tokens are those of its image, and the class token
    is the mean of the images' class tokens."""
    params, encode = made
    flat = tree.flatten(params)
    last = {k: x.at[1].set(0) for k, x in flat.items() if "/attn/proj/" in k}  # of the second block
    last |= {k: 0 * x for k, x in flat.items() if "/fc2/" in k}
    params = without_time(tree.replace(params, last))
    video = np.float32(clip())
    b, t = video.shape[:2]
    pictures = encode(params, video.reshape(b * t, 1, *video.shape[2:]))
    pictures = pictures.reshape(b, t, -1, SIZE.width)
    tokens = encode(params, video)
    np.testing.assert_allclose(tokens[:, 0], pictures[:, :, 0].mean(axis=1), atol=1e-5)
    others = pictures[:, :, 1:].reshape(b, -1, SIZE.width)
    np.testing.assert_allclose(tokens[:, 1:], others, atol=1e-5)


def test_the_order_of_frames_comes_from_the_time_table_alone(made):
    params, encode = made
    video, order = np.float32(clip()), np.array([2, 0, 3, 1])
    table = params["time_position"]
    tokens = encode(params, video)
    moved = encode(params, video[:, order])
    assert np.abs(moved[:, 0] - tokens[:, 0]).max() > 1e-3
    turned = encode({**params, "time_position": table[order]}, video[:, order])
    b, t = video.shape[:2]
    np.testing.assert_allclose(turned[:, 0], tokens[:, 0], atol=1e-5)
    frames = tokens[:, 1:].reshape(b, t, -1, SIZE.width)[:, order]
    np.testing.assert_allclose(turned[:, 1:].reshape(frames.shape), frames, atol=1e-5)


@pytest.fixture(scope="module")
def dropped():
    """What a block adds to each of 32 rows at rate 0.75, with a key and without, where only one
    branch adds anything."""
    block = divided.DividedBlock(SIZE)
    draw = np.random.default_rng(0).standard_normal
    carry = (jnp.float32(draw((32, 16))), jnp.float32(draw((32, 3, 4, 16))))
    params = fill(block.init, KEY, carry, jnp.float32(0))["params"]

    @jax.jit
    def run(params):
        def added(**rngs):
            (first, x), _ = block.apply({"params": params}, carry, jnp.float32(0.75), rngs=rngs)
            return divided.join(first, x) - divided.join(*carry)

        return added(), added(dropout=KEY)

    def only(branch):
        flat = tree.flatten(params)
        last = [v for k, v in BRANCHES.items() if k != branch]
        zero = [k for k in flat if k.rpartition("/")[0] in last]
        return run(tree.replace(params, {k: 0 * flat[k] for k in zero}))

    return only


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_branch_is_dropped_for_whole_rows_and_rescaled_for_the_others(dropped, branch):
    plain, trained = (np.asarray(x) for x in dropped(branch))
    kept = trained.any(axis=(1, 2))
    assert np.abs(plain).max(axis=(1, 2)).min() > 1e-2 and 0 < kept.sum() < 32
    expected = np.where(kept[:, None, None], 4 * plain, 0)
    np.testing.assert_allclose(trained, expected, atol=1e-4)


def test_drop_path_rises_from_0_at_the_first_block():
    """With rate 1 at the last of two blocks, two blocks equal the first one alone, for any key."""
    draw = np.random.default_rng(0).standard_normal
    tokens = (jnp.float32(draw((2, 16))), jnp.float32(draw((2, 3, 4, 16))))
    two = divided.DividedStack(SIZE, drop_path=1.0)
    params = fill(two.init, KEY, *tokens)
    first = jax.tree.map(lambda w: w[:1], params)
    one = divided.DividedStack(SIZE._replace(depth=1))
    found = jax.jit(lambda params: two.apply(params, *tokens, rngs={"dropout": KEY}))(params)
    np.testing.assert_allclose(found, jax.jit(one.apply)(first, *tokens), atol=1e-6)


def test_clips_that_do_not_fit_the_tables_are_rejected(made):
    for wrong in (jnp.zeros((1, 5, 16, 24, 3)), jnp.zeros((1, 4, 16, 16, 3))):
        with pytest.raises(UserError, match="the tables have 4 x 6 positions"):
            net().apply({"params": made[0]}, wrong, method="embed")
