"""OmniVL on images whose texts are all different is BLIP: losses, hard negatives, queues and
gradients against numbers of BLIP's own code (fp64).

The golden's rule: tensors by `tests.goldens.make_tensor` from their official names, tied ones once;
temperature 0.07; inputs as below; dropout off; the likeliest wrong pair instead of a drawn one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tests.goldens import close, load, make_tensor, probe
from vtp_jax import masking, tree
from vtp_jax.convert import rules
from vtp_jax.convert.families import bert, timm
from vtp_jax.methods import omnivl
from vtp_jax.objectives import contrastive, momentum

OFFICIAL = load("omnivl_blip_tiny")
WORDS, PLACES = 20, 8
HEADS = 2
TABLE = "text_encoder{}.embeddings.word_embeddings.weight"


def encoder_rules(twin=""):
    """BLIP's names of what encodes; of its twin they end in `_m`."""
    words = bert.embedding_rules("text_embed", "embeddings")
    words += rules.stack("encoder", "encoder.layer", HEADS, bert.BERT)
    return [
        *rules.under(timm.vit_rules(HEADS, head=None), "visual/", f"visual_encoder{twin}."),
        *rules.under(words, "text/", f"text_encoder{twin}."),
        *rules.linear("video_proj", f"vision_proj{twin}"),
        *rules.linear("text_proj", f"text_proj{twin}"),
    ]


def blip_rules():
    decoder = rules.stack("decoder", "text_decoder.bert.encoder.layer", HEADS, bert.BERT)
    head = "text_decoder.cls.predictions"
    return [
        *encoder_rules(),
        *bert.cross_rules("text/encoder", "text_encoder.encoder.layer", HEADS),
        *rules.linear("match_head", "itm_head"),
        *(r for r in decoder if "/attn/" in r.ours or "/norm1/" in r.ours),
        *rules.linear("word_head/fc", f"{head}.transform.dense"),
        *rules.norm("word_head/norm", f"{head}.transform.LayerNorm"),
        rules.Rule("word_head/bias", f"{head}.bias", rules.SAME),
    ]


def tensors(twin=""):
    """Official tensors, in fp64; the two task words end BLIP's table, and it has no token types."""
    found = {n: np.float64(make_tensor(n, s)) for n, s in OFFICIAL["shapes"].items()}
    for end in ("", "_m"):
        name = TABLE.format(end)
        found[f"{name}.task"] = found[name][WORDS:]
        found[name] = found[name][:WORDS]
        types = np.zeros((2, found[name].shape[1]))
        found[name.replace("word_embeddings", "token_type_embeddings")] = types
    return found


def fill(params, table, twin=""):
    """Params with what BLIP has; what it lacks (all that is for videos) stays."""
    given = tensors()
    known = {name for rule in table for i in (None, 0, 1) for name in rule.names(i)}
    flat = tree.flatten(rules.to_ours(table, {k: v for k, v in given.items() if k in known}))
    flat["text/text_embed/task"] = given[f"{TABLE.format(twin)}.task"]
    return tree.replace(params, {k: jnp.asarray(v) for k, v in flat.items()})


@pytest.fixture(scope="module", autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def made(fp64):
    """A step's loss, what it returns beside it, the wrong pairs, and gradients."""
    net, recipe = omnivl.build(
        size=(16, 2, HEADS, 24), text_size=(16, 2, HEADS, 24), features=6, picture=16, frames=4,
        cube=(2, 8, 8), queue=PLACES, dropout=0.0, dtype="float64", vocab_size=WORDS,
        text_length=12,
    )  # fmt: skip
    recipe = recipe._replace(alpha=lambda step: 0.4)  # a schedule's is rounded to fp32
    draw = np.random.RandomState(3)
    image = draw.uniform(0, 1, (4, 16, 16, 3))
    ids = draw.randint(5, WORDS, (4, 7))
    ids[:, 0] = 2
    mask = np.arange(7) < np.array([7, 5, 6, 4])[:, None]
    past = draw.standard_normal((2, PLACES, 6))
    batch = dict(
        video=jnp.asarray(image[:, None]),
        text=jnp.asarray(np.where(mask, ids, 0), jnp.int32),
        text_mask=jnp.asarray(mask),
        valid=jnp.ones(4, bool),
        id=jnp.arange(4, dtype=jnp.int32),
    )
    spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
    shapes = jax.eval_shape(lambda key: omnivl.init(net, recipe, key, spec), jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.1), shapes)  # where BLIP has nothing
    params = fill({**params, "temperature": jnp.float64(0.07)}, blip_rules())
    twin = fill(momentum.twin(params, omnivl.TWIN), encoder_rules("_m"), "_m")
    twin = momentum.follow(twin, params, 0.995)  # before its first loss, as in BLIP
    held = dict(
        video=jnp.asarray(past[0]), text=jnp.asarray(past[1]), next=jnp.int32(4),
        real=jnp.ones(PLACES, bool), name=-100 - jnp.arange(PLACES, dtype=jnp.int32),
    )  # fmt: skip

    def run(params):
        wrong = []

        def likeliest(rng, scores, allowed):
            wrong.append(jnp.argmax(jnp.where(allowed, scores, -jnp.inf), axis=1).astype(jnp.int32))
            return wrong[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(masking, "hard_negatives", likeliest)
            args = params, dict(twin=twin, queue=held), batch, jax.random.key(0), jnp.int32(0)
            value, out = omnivl.loss(net, recipe, *args)
        return value, (out, dict(zip(("video", "text"), wrong, strict=True)))

    (value, (out, wrong)), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    return value, out, wrong, grads


def test_losses(made):
    value, out, *_ = made
    found = {name: float(out.metrics[f"loss_{name}"].value()) for name in OFFICIAL["losses"]}
    assert found == close(OFFICIAL["losses"])
    assert float(value) == close(sum(OFFICIAL["losses"].values()))


def test_hard_negatives_are_the_same_rows(made):
    assert {k: v.tolist() for k, v in made[2].items()} == OFFICIAL["wrong"]


def test_queues_hold_the_twin_s_features_at_the_same_place(made):
    past = made[1].extra["queue"]
    assert int(past["next"]) == OFFICIAL["queue"]["place"] and past["real"].all()
    rows = contrastive.normalise(past["video"][4:8])
    assert rows.ravel()[:6].tolist() == close(OFFICIAL["queue"]["image"])


def test_gradients(made):
    flat = tree.flatten(jax.device_get(made[3]))
    words = np.concatenate([flat["text/text_embed/word"], flat["text/text_embed/task"]])
    theirs = {rule.ours: flat[rule.ours] for rule in blip_rules()}
    named = rules.to_theirs(blip_rules(), traverse_util.unflatten_dict(theirs, sep="/"))
    named |= {TABLE.format(""): words, "temp": flat["temperature"]}
    assert OFFICIAL["grads"].keys() <= named.keys()
    for name, golden in OFFICIAL["grads"].items():
        x = np.asarray(named[name])
        assert float(np.linalg.norm(x)) == close(golden["norm"], 1e-3), name
        if golden["norm"] > 1e-12:  # keys' biases change nothing: their gradients are noise
            assert probe(x) == close(golden["probe"], float(np.linalg.norm(x)))
    unread = [k for k in flat if "time" in k or "video_patch_embed" in k]
    assert unread and not any(np.any(flat[k]) for k in unread)  # images ask nothing of videos' part
