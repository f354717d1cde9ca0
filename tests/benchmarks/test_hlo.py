"""Parsing compiled programs: handmade ones with known answers, then a real one."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks import costs, hlo
from benchmarks.hlo import Array

TPU = """\
HloModule jit_f, is_scheduled=true

%body (carry: (s32[], f32[8,4], s32[])) -> (s32[], f32[8,4], s32[]) {
  %carry = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, /*index=2*/s32[]{:T(128)}) \
parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %x = f32[8,4]{1,0:T(8,128)S(1)} get-tuple-element(%carry), index=1
  %bound = s32[]{:T(128)} get-tuple-element(%carry), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %y = f32[8,4]{1,0:T(8,128)} negate(%x), metadata={op_name="jit(f)/while/neg"}, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %out = (s32[], f32[8,4]{1,0}, s32[]) tuple(%next, %y, %bound)
}

%condition (carry.1: (s32[], f32[8,4], s32[])) -> pred[] {
  %carry.1 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %end = s32[]{:T(128)} get-tuple-element(%carry.1), index=2
  ROOT %lt = pred[]{:T(512)} compare(%j, %end), direction=LT
}

ENTRY %main (a: f32[8,4], b: f32[4,16]) -> f32[8,16] {
  %a = f32[8,4]{1,0:T(8,128)} parameter(0)
  %b = f32[4,16]{1,0:T(8,128)} parameter(1)
  %zero = s32[]{:T(128)} constant(2)
  %start = s32[]{:T(128)} copy(%zero)
  %seven = s32[]{:T(128)} constant(7)
  %init = (s32[], f32[8,4]{1,0}, s32[]) tuple(%start, %a, %seven)
  %loop = (s32[], f32[8,4]{1,0}, s32[]) while(%init), condition=%condition, body=%body
  %z = f32[8,4]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  ROOT %product = f32[8,16]{1,0:T(8,128)} convolution(%z, %b), dim_labels=bf_io->bf, \
metadata={op_name="jit(f)/dot"}, backend_config={"estimated_cycles":"30"}
}
"""

GPU = """\
HloModule jit_g

%fused (p0: f32[64,8], p1: s32[], p2: f32[64,8]) -> (f32[4,8], f32[64,8]) {
  %p0 = f32[64,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[64,8]{1,0} parameter(2)
  %c = s32[] constant(0)
  %cut = f32[4,8]{1,0} dynamic-slice(%p0, %p1, %c), dynamic_slice_sizes={4,8}
  %twice = f32[4,8]{1,0} add(%cut, %cut)
  %put = f32[64,8]{1,0} dynamic-update-slice(%p2, %twice, %p1, %c)
  ROOT %both = (f32[4,8]{1,0}, f32[64,8]{1,0}) tuple(%twice, %put)
}

%add (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %sum = f32[] add(%l, %r)
}

%always (w: s32[]) -> pred[] {
  %w = s32[] parameter(0)
  %k = s32[] call(%w), to_apply=%unknown
  ROOT %eq = pred[] compare(%w, %k), direction=EQ
}

%unknown (u: s32[]) -> s32[] {
  ROOT %u = s32[] parameter(0)
}

ENTRY %main (x: f32[64,8], n: s32[], y: f32[64,8]) -> f32[64,8] {
  %x = f32[64,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %y = f32[64,8]{1,0} parameter(2)
  %f = (f32[4,8]{1,0}, f32[64,8]{1,0}) fusion(%x, %n, %y), kind=kLoop, calls=%fused
  %part = f32[4,8]{1,0} get-tuple-element(%f), index=0
  %start = f32[4,8]{1,0} all-reduce-start(%part), channel_id=1, to_apply=%add
  %done = f32[4,8]{1,0} all-reduce-done(%start)
  %spin = s32[] while(%n), condition=%always, body=%unknown
  %w = f32[8,16]{1,0} parameter(3)
  %gemm = (f32[4,16]{1,0}, s8[4096]{0}) custom-call(%done, %w), \
custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"]}}}
  %ours = (f32[4]{0}, bf16[4,16]{1,0}) custom-call(%done, %w), \
custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/product_and_sums"}
  %empty = f32[64,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %whole = f32[64,8]{1,0} get-tuple-element(%f), index=1
}
"""


def test_sizes_of_arrays():
    assert Array("bf16", (3, 5)).bytes == 30
    assert Array("pred", (3,)).bytes == 3
    assert Array("f8e4m3fn", (4,)).bytes == 4
    assert Array("s4", (4,)).bytes == 2
    assert Array("f32", ()).bytes == 4
    assert Array("token", ()).bytes == 0
    assert str(Array("f32", (2, 3))) == "f32[2,3]"


def test_trip_count_of_a_loop_whose_bound_is_carried():
    program = hlo.parse(TPU)
    assert hlo.unknown_loops(program) == []
    assert costs.estimated_cycles(program) == 5 * 100 + 30
    first, second = costs.costliest(program, 5)
    assert first == ("negate", "f32[8,4]", "jit(f)/while/neg", 500)
    assert second == ("convolution", "f32[8,16]", "jit(f)/dot", 30)
    assert Array("f32", (8, 16)) in program.arrays()


def test_matrix_products_of_a_tpu_and_of_a_gpu():
    assert costs.dot_flops(TPU) == 2 * 8 * 4 * 16
    assert costs.dot_flops(GPU) == 2 * 4 * 8 * 16


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        # A batch of products: the batch is a window of 1.
        (
            "f32[2,6,5] convolution(%a, %b), window={size=1}, dim_labels=0bf_io0->0bf",
            2 * 2 * 6 * 4 * 5,
        ),
        # A sum over two axes: one of them is the window.
        (
            "f32[6,5,1] convolution(%a, %b), window={size=2}, dim_labels=0bf_0io->bf0",
            2 * 2 * 6 * 4 * 5,
        ),
        # Most of a padded window is padding.
        (
            "f32[6,5,2] convolution(%a, %b), window={size=2 pad=1_0}, "
            "dim_labels=0bf_0io->bf0",
            2 * 3 * 6 * 4 * 5,
        ),
    ],
)
def test_products_that_are_convolutions(line: str, flops: int):
    kernel = "4,5,1" if "io0" in line else "2,4,5"
    text = f"""
ENTRY %main (a: f32[2,6,4], b: f32[{kernel}]) -> f32[] {{
  %a = f32[2,6,4] parameter(0)
  %b = f32[{kernel}] parameter(1)
  ROOT %c = {line}
}}
"""
    assert costs.dot_flops(text) == flops


def test_slices_count_as_slices_and_updates_as_updates():
    program = hlo.parse(GPU)
    body = program.computations["main"]
    small = 4 * 8 * 4
    # The slice is read, the sum is written, the update is written; and an index.
    assert costs.bytes_of(program, body, body.operations["f"]) == 3 * small + 4
    assert costs.bytes_of(program, body, body.operations["empty"]) == 0
    # The workspace, the second result, is not an output.
    product = 4 * (4 * 8 + 8 * 16 + 4 * 16)
    assert costs.bytes_of(program, body, body.operations["gemm"]) == product
    # All results of another kernel are.
    ours = 4 * (4 * 8 + 8 * 16 + 4) + 2 * 4 * 16
    assert costs.bytes_of(program, body, body.operations["ours"]) == ours
    assert costs.moved_bytes(program) == 3 * small + 4 + 2 * small + product + ours
    outside = costs.moved_bytes(program, by_products=False)
    assert outside == 3 * small + 4 + 2 * small
    assert costs.costliest(program, 1, by="bytes")[0].amount == product


def test_collectives_count_once():
    assert hlo.collectives(GPU) == [("all-reduce", (4, 8), 4 * 8 * 4, 1)]
    assert hlo.collectives(TPU) == []


def test_loop_of_unknown_length_is_named():
    assert hlo.unknown_loops(hlo.parse(GPU)) == ["spin"]


def test_text_that_is_not_a_program_is_an_error():
    with pytest.raises(ValueError, match="not a compiled program"):
        hlo.parse("module @jit_f {}")


@pytest.mark.usefixtures("optimized_text")
def test_program_of_this_machine():
    count, rows, width, columns = 7, 32, 16, 64

    def total(x: jax.Array, w: jax.Array) -> jax.Array:
        def step(carry: jax.Array, part: jax.Array) -> tuple[jax.Array, None]:
            return carry + jnp.tanh(part @ w).sum(), None

        return lax.scan(step, jnp.float32(0), x)[0]

    x, w = jnp.ones((count, rows, width)), jnp.ones((width, columns))
    text = str(jax.jit(total).lower(x, w).compile().as_text())
    program = hlo.parse(text)
    assert hlo.unknown_loops(program) == []
    assert costs.dot_flops(text) == 2 * count * rows * width * columns
    assert costs.estimated_cycles(program) == 0
    assert Array("f32", (rows, columns)) in program.arrays()
    read = 4 * count * (rows * width + width * columns)
    assert costs.moved_bytes(program) >= read
    assert costs.moved_bytes(program) < read + 10 * 4 * count * rows * columns
