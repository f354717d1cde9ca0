"""What crosses the wire, and what a device holds, read off the compiled program.

Nothing runs here, so the sizes are those of a real model.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ava_jax
from benchmarks import wire
from benchmarks.compiled import collectives

B, S, D, V = 8, 1024, 768, 131072
N = B * S
CONFIG: dict[str, Any] = {
    "vocab_size": V - 72,
    "eos_token_id": 2,
    "z_loss_weight": 1e-4,
    # As on an accelerator, and an even share of the row.
    "chunk_size": 128,
    "block_size": 128,
}

pytestmark = pytest.mark.usefixtures("optimized", "unannotated")


def compile_gradient(mesh, loss):
    """The program of the gradient for hidden states and lm_head on the mesh."""

    def given(dtype, shape, *axes):
        spec = NamedSharding(mesh, P(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=spec)

    arrays = (
        given(jnp.float32, (B, S, D), "data"),
        given(jnp.float32, (D, V), None, "tensor"),
    )
    places = (NamedSharding(mesh, P()), tuple(x.sharding for x in arrays))
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=places)
    return step.lower(*arrays, given(jnp.int32, (B, S), "data")).compile()


def ours(mesh):
    loss_fn = ava_jax.create_unified_loss(
        CONFIG, mesh=mesh, batch_axes="data", vocab_axis="tensor"
    )

    def loss(hidden, kernel, targets):
        given = {"hidden_states": hidden, "lm_head": kernel, "targets": targets}
        return loss_fn(loss_fn.init(), **given)[0]

    return compile_gradient(mesh, loss)


def naive(mesh):
    def loss(hidden, kernel, targets):
        logits = hidden @ kernel
        ce = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.mean(ce)

    return compile_gradient(mesh, loss)


def make_mesh(data, tensor):
    devices = np.array(jax.devices()).reshape(data, tensor)
    return Mesh(devices, ("data", "tensor"))


def test_only_scalars_and_hidden_gradients_cross_a_split_vocabulary():
    told = collectives(str(ours(make_mesh(1, 8)).as_text()))
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


@pytest.mark.parametrize("sizes", [(2, 4), (8, 1)])
def test_rows_on_several_devices_add_up_the_projection_once(sizes):
    data, tensor = sizes
    told = collectives(str(ours(make_mesh(*sizes)).as_text()))
    large = [c for c in told if c.size * c.times > 4 * N * D // data]
    assert [(c.kind, c.shape, c.times) for c in large] == [
        ("all-reduce", (D, V // tensor), 1)
    ]


def test_a_device_holds_a_fraction_of_its_share_of_the_logits():
    mesh = make_mesh(1, 8)
    temps = []
    for program in (ours(mesh), naive(mesh)):
        memory = program.memory_analysis()
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
