"""What is read from compiled text, against programs whose traffic and loops are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vtp_jax.measure import hlo
from vtp_jax.run import sharding

# As the TPU compiler writes it: a loop's length is in its condition only, fusions have cycles, and
# an asynchronous start returns (operands, results).
TPU = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%inside (p: f32[8]) -> f32[8] {
  ROOT %all-reduce.9 = f32[8]{0:T(128)} all-reduce(%p), to_apply=%add
}

%product (p: f32[8]) -> f32[8] {
  ROOT %convolution.3 = f32[8]{0} convolution(%p, %p), dim_labels=bf_io->bf
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %all-reduce.8 = bf16[4,8]{1,0:T(8,128)(2,1)} all-reduce(%p), to_apply=%add
  %fusion.1 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} fusion(%all-reduce.8), kind=kLoop, calls=%inside, backend_config={"window_config":{"estimated_cycles":"100"}}
  %all-reduce.1 = (bf16[4,8]{1,0}, f32[2]{0:T(128)}) all-reduce(%a, %b), to_apply=%add
}

%cond (p: (s32[], bf16[4,8])) -> pred[] {
  %constant.4 = s32[]{:T(128)} constant(12)
  ROOT %lt.4 = pred[]{:T(512)} compare(%get-tuple-element.2, %constant.4), direction=LT
}

ENTRY %main.5 (p: bf16[4,8]) -> bf16[4,8] {
  %while.7 = (s32[], bf16[4,8]{1,0}) while(%tuple), condition=%cond, body=%body
  %all-gather-start.1 = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%x), dimensions={0}
  %all-gather-done.1 = bf16[16,8]{1,0} all-gather-done(%all-gather-start.1)
  %collective-permute-start.1 = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%y)
  %fusion.2 = f32[8]{0} fusion(%z), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"7"}
}
"""  # noqa: E501


def test_the_tpu_compilers_text_is_read():
    assert hlo.traffic(TPU) == {
        "all-reduce": 12 * (4 * 8 * 2 + 4 * 8 * 2 + 2 * 4 + 8 * 4),
        "all-gather": 16 * 8 * 2,
        "collective-permute": 4 * 4,
    }
    # Of 100 cycles a second: the loop's part reads 64 bytes of the large memory,
    # and writes to memory on the chip; the other part multiplies: its cycles are used.
    assert hlo.seconds(TPU, 100.0, 1e18) == pytest.approx(0.07)
    assert hlo.seconds(TPU, 100.0, 64 / 0.5) == pytest.approx(12 * 0.5 + 0.07)
    assert hlo.seconds(TPU, 100.0, 1.0) == pytest.approx(12 * 1.0 + 0.07)


@pytest.mark.parametrize("length", [1, 5])
def test_traffic_in_a_loop_counts_once_per_iteration(length):
    """A product whose summed dimension is split is one all-reduce of its result."""
    mesh = sharding.make_mesh(data=1, fsdp=8)
    split = [NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P(None, "fsdp", None))]
    whole = NamedSharding(mesh, P())

    def f(x, w):
        def body(x, w):
            y = jax.lax.with_sharding_constraint(x @ w, whole)
            return jax.lax.with_sharding_constraint(jnp.tanh(y), split[0]), None

        return jax.lax.scan(body, x, w)[0]

    shapes = [
        jax.ShapeDtypeStruct(s, jnp.float32, sharding=p)
        for s, p in zip([(4, 16), (length, 16, 16)], split, strict=True)
    ]
    text = jax.jit(f, out_shardings=split[0]).lower(*shapes).compile().as_text()
    assert hlo.traffic(text) == {"all-reduce": length * 4 * 16 * 4}
    assert hlo.seconds(text, 1.0, 1.0) == 0
