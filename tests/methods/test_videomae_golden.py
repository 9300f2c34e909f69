"""VideoMAE, V2 and the classifier on them against the official code: predictions, losses, logits
and every gradient, 1e-9 relative in fp64.

The numbers come from MCG-NJU/VideoMAE @14ef8d8 and OpenGVLab/VideoMAEv2 @29eab1e.
"""

import math

import jax
import numpy as np
import pytest

from tests import goldens
from tests.goldens import check_output
from vtp_jax import masking
from vtp_jax.methods import videomae

NAMES = ("videomae", "videomae_v2")


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_pretraining_has_the_official_numbers(name):
    golden = goldens.videomae(name)
    out, inputs = golden.run(), golden.inputs
    asked = ~inputs["decode_mask"] if "decode_mask" in inputs else inputs["mask"]
    scored = golden.case.get("scored", inputs["mask"].sum())
    assert (asked & inputs["mask"]).sum() == scored
    goldens.check_losses(golden, out)
    for key in ("pixel_pred", "target"):
        check_output(out[key], golden.case[key])
    goldens.check_gradients(golden, out)


def test_running_cells_are_the_official_ones():
    for told in goldens.load("videomae_v2_steps")["running_cells"]:
        drawn = masking.running_cells(jax.random.key(0), 64, tuple(told["grid"]), told["ratio"])
        maps = {"".join(str(int(x)) for x in row) for row in np.asarray(drawn.dropped)}
        assert maps == set(told["maps"])


@pytest.mark.parametrize(
    "name, recipe",
    [
        ("giant_patch14", dict(size="g", cube=(2, 14, 14))),
        ("huge_patch16", dict(size="H", decoder=(512, 4, 8, 2048))),
        ("base_patch16", dict(size="B")),
    ],
)
def test_parameters_of_the_published_models(name, recipe):
    spec = dict(video=jax.ShapeDtypeStruct((2, 16, 224, 224, 3), np.uint8))
    shapes = jax.eval_shape(lambda k: videomae.make(**recipe).init(k, spec), jax.random.key(0))
    found = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert found == goldens.load("videomae_v2_steps")["parameters"][name]


SLOW = pytest.mark.slow(reason="the same classifier at other sizes")


@pytest.mark.parametrize("name", ["videomae", pytest.param("videomae_v2", marks=SLOW)])
def test_a_step_of_the_classifier_has_the_official_numbers(name):
    golden = goldens.videomae_finetune(name)
    out = golden.run()
    np.testing.assert_allclose(out["logits"], golden.case["mixed_logits"], rtol=1e-9, atol=1e-9)
    goldens.check_losses(golden, out)
    goldens.check_gradients(golden, out)


@pytest.mark.slow(reason="the net of the step above on another input")
@pytest.mark.parametrize("name", NAMES)
def test_the_classifier_has_the_official_logits(name):
    golden = goldens.videomae_finetune(name)
    clean = goldens.normalised(goldens.unit_video(golden.case))
    out = golden._replace(inputs={**golden.inputs, "video": clean}).run(grads=False)
    np.testing.assert_allclose(out["logits"], golden.case["logits"], rtol=1e-9, atol=1e-9)
