"""The loss on a mesh: rows over one axis, the vocabulary of `lm_head` over another.

    python examples/shard_over_mesh.py

Runs on the accelerators that there are, elsewhere on eight fake CPU devices. With
`mesh=` the loss keeps each shard of `lm_head` where it is: the shards' statistics are
combined, and no logits and no rows of `lm_head` are sent. Takes some seconds on a CPU.
"""

from typing import cast

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

import ava_jax
from trainer.small import VOCAB, Params, byte_rows, hidden_states, init_params

ROWS, LENGTH, STEPS = 16, 64, 60
CONFIG = ava_jax.UnifiedLossConfig(vocab_size=VOCAB, label_smoothing=0.1)
OPTIMIZER = optax.adamw(3e-3)
# How each parameter is split; the optimizer's moments follow from the gradients.
SPECS = {"embed": P("tensor"), "mix": P(), "lm_head": P(None, "tensor")}


def objective(
    loss_fn: ava_jax.UnifiedLoss,
    params: Params,
    state: ava_jax.LossState,
    ids: Int[Array, "B S+1"],
) -> tuple[Float[Array, ""], ava_jax.LossState]:
    """Returns the loss of a batch and the new loss state."""
    loss, _, state = loss_fn(
        state,
        targets=ids[:, 1:],
        hidden_states=hidden_states(params, ids[:, :-1]),
        lm_head=params["lm_head"],
    )
    return loss, state


def make_mesh() -> Mesh:
    """Returns a mesh of all devices, two of them along the vocabulary if possible."""
    count = jax.device_count()
    tensor = 2 - count % 2
    auto = (AxisType.Auto,) * 2
    return jax.make_mesh((count // tensor, tensor), ("data", "tensor"), auto)


def main() -> dict[str, float]:
    """Compares the sharded loss and gradient with one device's, then trains."""
    mesh = make_mesh()
    sharded = ava_jax.unified_loss(
        CONFIG, mesh=mesh, batch_axes=("data",), vocab_axis="tensor"
    )
    local = ava_jax.unified_loss(CONFIG)
    params, state = init_params(jax.random.key(0)), local.init()
    ids = byte_rows(ROWS, LENGTH)

    def gradient_of(loss_fn: ava_jax.UnifiedLoss, params: Params, ids: Array) -> Params:
        grad = jax.jit(jax.grad(lambda p: objective(loss_fn, p, state, ids)[0]))
        return jax.device_get(grad(params))

    expected = gradient_of(local, params, ids)
    params = {
        name: jax.device_put(x, NamedSharding(mesh, SPECS[name]))
        for name, x in params.items()
    }
    ids = jax.device_put(ids, NamedSharding(mesh, P("data")))
    found = gradient_of(sharded, params, ids)
    gap = optax.tree.norm(optax.tree.sub(found, expected)) / optax.tree.norm(expected)
    print(f"mesh {dict(mesh.shape)}: gradient off by {gap:.1e}")

    @jax.jit
    def train_step(
        params: Params, moments: optax.OptState, state: ava_jax.LossState
    ) -> tuple[Params, optax.OptState, ava_jax.LossState, Array]:
        value_and_grad = jax.value_and_grad(
            lambda p: objective(sharded, p, state, ids), has_aux=True
        )
        (loss, state), grads = value_and_grad(params)
        updates, moments = OPTIMIZER.update(grads, moments, params)
        params = cast(Params, optax.apply_updates(params, updates))
        return params, moments, state, loss

    moments, losses = jax.jit(OPTIMIZER.init)(params), []
    for step in range(STEPS):
        params, moments, state, loss = train_step(params, moments, state)
        losses.append(float(loss))
        if step % 20 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss:.3f}")
    shard = params["lm_head"].sharding.shard_shape(params["lm_head"].shape)
    print(f"each device holds {shard} of lm_head's {params['lm_head'].shape}")
    return {"gap": float(gap), "first": losses[0], "last": losses[-1]}


if __name__ == "__main__":
    # Fake devices for the CPU backend; accelerators are used where there are some.
    jax.config.update("jax_num_cpu_devices", 8)
    main()
