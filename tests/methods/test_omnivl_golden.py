"""OmniVL on images whose texts are all different is BLIP: losses, hard negatives, queues and
gradients against numbers of BLIP's own code (salesforce/BLIP @056a169, fp64)."""

import jax
import numpy as np
import pytest

from tests import goldens
from tests.goldens import close
from vtp_jax import tree
from vtp_jax.convert import formats
from vtp_jax.convert.families import STEPS, omnivl


@pytest.fixture(scope="module")
def golden():
    return goldens.omnivl()


@pytest.fixture(scope="module")
def made(golden):
    """Losses, other outputs, and the gradient of all parameters, BLIP's or not."""
    form = STEPS["omnivl"]
    with jax.enable_x64(True):
        case = formats.prepare(form, golden.weights, golden.inputs, golden.heads)
        shapes = jax.eval_shape(case.net.init, jax.random.key(0))
        params = {name: omnivl.complete(case.params[name], shapes[name]) for name in shapes}
        loss, out, gradient = formats.differentiate(case.net, params)
        known = {rule.param for rule in case.rules}
        flat = tree.flatten(gradient)
        blips = tree.split(gradient, lambda name: name in known)[0]
        out = {name: np.asarray(x) for name, x in {**out, "loss": loss}.items()}
        out |= {f"grad/{n}": x for n, x in formats.official(form, case.rules, blips).items()}
    return out, {name: x for name, x in flat.items() if name not in known}


def test_losses_and_gradients_are_blips(golden, made):
    goldens.check_losses(golden, made[0])
    goldens.check_gradients(golden, made[0])


def test_hard_negatives_are_the_same_rows(golden, made):
    found = {name: made[0][f"{kind}_neg"].tolist() for name, kind in KINDS.items()}
    assert found == golden.case["wrong"]


KINDS = dict(video="image", text="text")


def test_queues_hold_the_twins_features_at_the_same_positions(golden, made):
    out, expected = made[0], golden.case["queue"]
    assert out["queue_ptr"] == expected["place"]
    rows = out["image_queue"].T[4:8]
    assert rows.ravel()[:6].tolist() == close(expected["image"])


def test_images_use_no_parameter_of_clips(made):
    unread = {n: x for n, x in made[1].items() if "time" in n or "video_patch_embed" in n}
    assert unread and not any(np.any(x) for x in unread.values())
