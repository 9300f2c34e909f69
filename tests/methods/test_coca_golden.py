"""CoCa against OpenCLIP's parts, where their maths is the paper's: features, pooled tokens, logits,
losses, every gradient, and a caption written without a cache. 1e-9 relative in fp64.

The numbers come from mlfoundations/open_clip @89fb801; `about` in the golden lists what was set so
that both compute the same.
"""

import jax
import pytest

from tests import goldens
from tests.goldens import check_output
from vtp_jax.convert import formats, nets
from vtp_jax.convert.families import STEPS, coca
from vtp_jax.methods import coca as method


@pytest.fixture(scope="module")
def golden():
    return goldens.coca()


def test_a_step_has_openclips_numbers(golden):
    out = golden.run()
    goldens.check_losses(golden, out)
    for name in ("image", "text", "logits", "memory"):
        check_output(out[name], golden.case[name], scale=1.0)
    goldens.check_gradients(golden, out)


def test_a_caption_has_openclips_numbers(golden):
    c = golden.case["config"]
    with jax.enable_x64(True):
        case = formats.prepare(STEPS["coca"], golden.weights, golden.inputs, golden.heads)
        made = method.make(
            **coca.sizes_of(case.params, golden.heads), cls_id=c["start"], sep_id=c["end"],
            **nets.NORMALISED,
        )  # fmt: skip
        batch = nets.batch_of(golden.inputs, unit=False)
        params = coca.complete(case.params)
        said = jax.jit(made.encode["generate"])(params, {}, batch)
    assert said["ids"].tolist() == golden.case["greedy"]["ids"]
    assert said["score"].tolist() == pytest.approx(golden.case["greedy"]["score"], rel=1e-6)
