"""The communication and the memory of compiled programs on a mesh.

Nothing is run, so the sizes are those of a real model.
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
from benchmarks import communication
from benchmarks.hlo import collectives

B, S, D, V = communication.BATCH, communication.LENGTH, 768, 131072
N = B * S
PADDING = 72  # columns of lm_head beyond the vocabulary
PARTS = 16  # the most parts in which the projection's gradient is reduced

# Compiled fast: the flags for that change neither the collectives nor the memory.
pytestmark = pytest.mark.usefixtures("unannotated")


@functools.cache
def compiled(name, data=1, tensor=8):
    sizes = {"data": data, "tensor": tensor}
    loss = communication.losses(sizes, V - PADDING)[name]
    return communication.compile_gradient(sizes, loss, D, V)


def most_parts(rows):
    """Returns the number of parts of whole tiles of a device's rows."""
    return max(n for n in range(1, PARTS + 1) if rows % (8 * n) == 0)


def test_a_sharded_vocabulary_sends_only_scalars_and_hidden_gradients():
    program = compiled(communication.WITH_MESH)
    found = collectives(str(program.as_text()))
    scalars = [c for c in found if c.shape and c.shape[-1] != D]
    # The row maxima and the second largest logits; then the stacked sums per token.
    assert {c.kind for c in scalars} == {"all-gather", "all-reduce"}
    gathered = sum(c.size * c.times for c in scalars if c.kind == "all-gather")
    assert gathered == 4 * N * 2
    (stacked,) = {c.shape[-1] for c in scalars if c.kind == "all-reduce"}
    total = sum(c.size * c.times for c in found)
    # Besides the row max: the second largest logit and the stacked sums.
    assert total <= 4 * N * (1 + 1 + stacked) + 4 * N * D + 1024
    # The target, the top id, eight sums, eight matches, the run and the EOS.
    assert stacked <= 20
    assert all(np.prod(c.shape) < N * V // 8 / 100 for c in found)
    assert all(V not in c.shape and V // 8 not in c.shape for c in found)


@pytest.mark.parametrize(("data", "tensor"), [(2, 4), (8, 1)])
def test_rows_on_several_devices_add_up_the_projection_once(data, tensor):
    program = compiled(communication.WITH_MESH, data, tensor)
    found = collectives(str(program.as_text()))
    large = [c for c in found if c.size * c.times > 4 * N * D // data]
    parts = most_parts(D // data)
    assert [(c.kind, c.shape, c.times) for c in large] == [
        ("reduce-scatter", (data, D // data // parts, V // tensor), parts),
        # The output is replicated over these devices.
        ("all-gather", (D // data, V // tensor), 1),
    ]


def test_a_device_keeps_its_share_of_the_projections_gradient():
    """Like an optimizer whose state is sharded over the axis of the rows."""
    mesh = communication.make_mesh({"data": 8, "tensor": 1})
    shardings = [NamedSharding(mesh, P("data")) for _ in range(3)]
    shapes = ((B, S), jnp.int32), ((B, S, D), jnp.float32), ((D, V), jnp.float32)
    given = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for (shape, dtype), sharding in zip(shapes, shardings, strict=True)
    ]
    loss = communication.losses({"data": 8, "tensor": 1}, V - PADDING)[
        communication.WITH_MESH
    ]
    step = jax.jit(jax.grad(loss, argnums=(1, 2)), out_shardings=tuple(shardings[1:]))
    program = step.lower(*given).compile()
    found = [c for c in collectives(str(program.as_text())) if V in c.shape]
    # The projection is gathered, its gradient is not.
    assert [(c.kind, c.times) for c in found] == [
        ("all-gather", 1),
        ("reduce-scatter", most_parts(D // 8)),
    ]


def test_a_device_holds_a_fraction_of_its_share_of_the_logits():
    temps = []
    for name in (communication.WITH_MESH, communication.NAIVE):
        memory = compiled(name).memory_analysis()
        assert memory is not None
        temps.append(memory.temp_size_in_bytes)
    assert temps[0] <= 0.30 * temps[1]


@pytest.mark.slow
def test_the_table_of_the_docs_can_be_made_again(tmp_path: Path):
    communication.main(["--width", "32", "--vocab", "6144", "--out", str(tmp_path)])
    record = json.loads(next(tmp_path.glob("communication-*.json")).read_text())
    assert len(record["rows"]) == 3 * len(communication.MESHES)
    found = record["rows"][6]
    assert found["mesh"] == {"data": 1, "tensor": 8}
    assert found["token_bytes"] == pytest.approx(4 * 32 + 4 * 19, rel=1e-3)


def test_without_a_mesh_no_logits_are_gathered():
    """XLA shards the chunk's gradient and the underflow loop by itself."""
    mesh = communication.make_mesh({"data": 8})
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
    # The gradient of the projection, once per chunk.
    assert over_vocabulary == {("all-reduce", (32, 2048))}
