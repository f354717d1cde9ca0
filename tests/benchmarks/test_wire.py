"""What crosses the wire, and what a device holds, read off the compiled program.

Nothing runs here, so the sizes are those of a real model.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ava_jax
from benchmarks import wire
from benchmarks.hlo import collectives

B, S, D, V = wire.BATCH, wire.LENGTH, 768, 131072
N = B * S
PADDING = 72  # columns of lm_head that are no classes
PARTS = 16  # of the projection's gradient at most, added up one after the other

pytestmark = pytest.mark.usefixtures("optimized", "unannotated")


def compiled(sizes, name):
    loss = wire.losses(sizes, V - PADDING)[name]
    return wire.compile_gradient(sizes, loss, D, V)


def most_parts(rows):
    """In how many parts of whole tiles a device's rows fall."""
    return max(n for n in range(1, PARTS + 1) if rows % (8 * n) == 0)


def test_only_scalars_and_hidden_gradients_cross_a_split_vocabulary():
    program = compiled({"data": 1, "tensor": 8}, wire.TOLD)
    told = collectives(str(program.as_text()))
    scalars = [c for c in told if c.shape and c.shape[-1] != D]
    # The largest logits and the runners-up; then a stack of sums for each token.
    assert {c.kind for c in scalars} == {"all-gather", "all-reduce"}
    gathered = sum(c.size * c.times for c in scalars if c.kind == "all-gather")
    assert gathered == 4 * N * 2
    (stacked,) = {c.shape[-1] for c in scalars if c.kind == "all-reduce"}
    total = sum(c.size * c.times for c in told)
    # S scalars besides the largest logit: the runner-up and the stack.
    assert total <= 4 * N * (1 + 1 + stacked) + 4 * N * D + 1024
    # Target, top, sums of eight kinds, eight matches and the run and the end: no more.
    assert stacked <= 20
    assert all(np.prod(c.shape) < N * V // 8 / 100 for c in told)
    assert all(V not in c.shape and V // 8 not in c.shape for c in told)


@pytest.mark.parametrize(("data", "tensor"), [(2, 4), (8, 1)])
def test_rows_on_several_devices_add_up_the_projection_once(data, tensor):
    program = compiled({"data": data, "tensor": tensor}, wire.TOLD)
    told = collectives(str(program.as_text()))
    large = [c for c in told if c.size * c.times > 4 * N * D // data]
    parts = most_parts(D // data)
    assert [(c.kind, c.shape, c.times) for c in large] == [
        ("reduce-scatter", (data, D // data // parts, V // tensor), parts),
        # What is asked for is whole on every device.
        ("all-gather", (D // data, V // tensor), 1),
    ]


def test_a_device_keeps_its_share_of_the_projections_gradient():
    """As does an optimizer whose state lies along the axis that shares the rows."""
    mesh = wire.make_mesh({"data": 8, "tensor": 1})
    places = [NamedSharding(mesh, P("data")) for _ in range(3)]
    shapes = ((B, S), jnp.int32), ((B, S, D), jnp.float32), ((D, V), jnp.float32)
    given = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for (shape, dtype), place in zip(shapes, places, strict=True)
    ]
    loss = wire.losses({"data": 8, "tensor": 1}, V - PADDING)[wire.TOLD]
    step = jax.jit(jax.grad(loss, argnums=(1, 2)), out_shardings=tuple(places[1:]))
    program = step.lower(*given).compile()
    told = [c for c in collectives(str(program.as_text())) if V in c.shape]
    # The projection is gathered, its gradient is not.
    assert [(c.kind, c.times) for c in told] == [
        ("all-gather", 1),
        ("reduce-scatter", most_parts(D // 8)),
    ]


def test_a_device_holds_a_fraction_of_its_share_of_the_logits():
    temps = []
    for name in (wire.TOLD, wire.NAIVE):
        memory = compiled({"data": 1, "tensor": 8}, name).memory_analysis()
        assert memory is not None
        temps.append(memory.temp_size_in_bytes)
    assert temps[0] <= 0.30 * temps[1]


@pytest.mark.slow
def test_the_table_of_the_docs_can_be_made_again(tmp_path: Path):
    wire.main(["--width", "32", "--vocab", "6144", "--out", str(tmp_path)])
    record = json.loads(next(tmp_path.glob("wire-*.json")).read_text())
    assert len(record["rows"]) == 3 * len(wire.MESHES)
    told = record["rows"][6]
    assert told["mesh"] == {"data": 1, "tensor": 8}
    assert told["token_bytes"] == pytest.approx(4 * 32 + 4 * 19, rel=1e-3)


def test_without_a_mesh_no_logits_are_gathered():
    """XLA shares the chunk's gradient and the underflow loop by itself."""
    mesh = wire.make_mesh({"data": 8})
    loss_fn = ava_jax.create_unified_loss(
        vocab_size=2048,
        eos_token_id=2,
        implementation="xla",
        chunk_size=64,
        block_size=16,
    )

    def given(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, P(*axes))
        )

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(hidden, head, targets):
        return loss_fn(
            loss_fn.init(), targets=targets, hidden_states=hidden, lm_head=head
        )[0]

    program = gradients.lower(
        given((8, 128, 32), jnp.float32, "data"),
        given((32, 2048), jnp.float32),
        given((8, 128), jnp.int32, "data"),
    ).compile()
    found = collectives(str(program.as_text()))
    over_vocabulary = {(c.kind, c.shape) for c in found if 2048 in c.shape}
    # The gradient of the projection, once a chunk.
    assert over_vocabulary == {("all-reduce", (32, 2048))}
