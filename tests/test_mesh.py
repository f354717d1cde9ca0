"""Under jit on a mesh the loss is the single device's, at both doors."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scenes import B, D, S
from test_passes import assert_trees_close

import ava_jax

WIDE = 16  # a vocabulary that four devices share
CONFIG = {
    "vocab_size": WIDE - 3,
    "eos_token_id": 2,
    "ngram_size": 2,
    "ngram_max_matches": 2,
    "z_loss_weight": 1e-2,
}


@pytest.mark.parametrize("shape", [(2, 4), (4, 2)])
@pytest.mark.parametrize("door", ["logits", "fused"])
def test_a_mesh_changes_no_number(door, shape):
    mesh = jax.make_mesh(
        shape, ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = {
        "hidden_states": jax.random.normal(keys[0], (B, S, D)),
        "lm_head": jax.random.normal(keys[1], (D, WIDE)),
    }
    ints = {
        "targets": jax.random.randint(keys[2], (B, S), 0, 4),
        # Ragged: the shards hold different numbers of tokens.
        "attention_mask": jnp.arange(S) < jnp.array([[1], [S], [3], [S - 1]]),
    }
    loss_fn = ava_jax.create_unified_loss(CONFIG)

    def step(state, arrays, ints):
        def loss(arrays):
            given = dict(arrays)
            if door == "logits":
                given["logits"] = given.pop("hidden_states") @ given.pop("lm_head")
            total, aux, after = loss_fn(state, **given, **ints)
            return total, (aux, after)

        return jax.value_and_grad(loss, has_aux=True)(arrays)

    want = jax.jit(step)(loss_fn.init(), arrays, ints)
    rows, columns = (NamedSharding(mesh, P(*p)) for p in (("data",), (None, "tensor")))
    placed = {
        "hidden_states": jax.device_put(arrays["hidden_states"], rows),
        "lm_head": jax.device_put(arrays["lm_head"], columns),
    }
    got = jax.jit(step)(loss_fn.init(), placed, jax.device_put(ints, rows))
    assert got[1]["lm_head"].sharding.spec == columns.spec
    assert_trees_close(got, want, 2e-5)
