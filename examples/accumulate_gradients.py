"""Gradient accumulation that gives the gradient of the whole batch.

    python examples/accumulate_gradients.py

Rows differ in how many tokens are unmasked, so the mean of the micro-batches' losses is
not the loss of the batch. `loss_fn.normalizers` counts the tokens of all micro-batches
first, `loss_fn.accumulate` divides each sum by these counts, and `loss_fn.commit`
updates the loss state once. Takes some seconds on a CPU.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

import ava_jax
from trainer.small import VOCAB, Params, byte_rows, hidden_states, init_params

ROWS, LENGTH, MICROBATCHES, STEPS = 16, 64, 4, 60

LOSS = ava_jax.create_unified_loss(
    {
        "vocab_size": VOCAB,
        "primary_loss_type": "deepseek",
        "adaptive_temperature": True,
        "label_smoothing": 0.1,
    }
)
OPTIMIZER = optax.adamw(3e-3)


def gradient(
    params: Params,
    state: ava_jax.LossState,
    ids: Int[Array, "M B S+1"],
    mask: Bool[Array, "M B S"],
) -> tuple[Params, ava_jax.StepStats]:
    """Returns the gradient of M micro-batches and the sums of their statistics."""
    normalizers = LOSS.normalizers(targets=ids[..., 1:], attention_mask=mask)

    def micro_loss(
        params: Params, ids: Int[Array, "B S+1"], mask: Bool[Array, "B S"]
    ) -> tuple[Float[Array, ""], ava_jax.StepStats]:
        loss, _, stats = LOSS.accumulate(
            state,
            normalizers=normalizers,
            targets=ids[:, 1:],
            attention_mask=mask,
            hidden_states=hidden_states(params, ids[:, :-1]),
            lm_head=params["lm_head"],
        )
        return loss, stats

    def add(
        total: Params, micro: tuple[Array, Array]
    ) -> tuple[Params, ava_jax.StepStats]:
        grads, stats = jax.grad(micro_loss, has_aux=True)(params, *micro)
        return jax.tree.map(jnp.add, total, grads), stats

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, stats = jax.lax.scan(add, zeros, (ids, mask))
    return grads, jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), stats)


@jax.jit
def train_step(
    params: Params,
    moments: optax.OptState,
    state: ava_jax.LossState,
    ids: Int[Array, "M B S+1"],
    mask: Bool[Array, "M B S"],
) -> tuple[Params, optax.OptState, ava_jax.LossState, dict[str, Array]]:
    """Takes one optimizer step over all micro-batches."""
    grads, stats = gradient(params, state, ids, mask)
    updates, moments = OPTIMIZER.update(grads, moments, params)
    params = cast(Params, optax.apply_updates(params, updates))
    state = LOSS.commit(state, stats)
    return params, moments, state, LOSS.summary(state, stats)


def distance(left: Params, right: Params) -> float:
    """Returns the relative distance of two gradients."""
    gap = optax.tree.norm(optax.tree.sub(left, right))
    return float(gap / optax.tree.norm(right))


def main() -> dict[str, float]:
    """Compares the accumulated gradient with the whole batch's, then trains."""
    ids = byte_rows(ROWS, LENGTH).reshape(MICROBATCHES, -1, LENGTH + 1)
    # The first micro-batch has the shortest rows, the last one the longest.
    lengths = jnp.linspace(8, LENGTH, ROWS).astype(int).reshape(MICROBATCHES, -1)
    mask = jnp.arange(LENGTH) < lengths[..., None]
    params, state = init_params(jax.random.key(0)), LOSS.init()
    grad = jax.jit(lambda ids, mask: gradient(params, state, ids, mask)[0])
    whole = grad(ids.reshape(1, ROWS, -1), mask.reshape(1, ROWS, -1))
    alone = [grad(ids[m : m + 1], mask[m : m + 1]) for m in range(MICROBATCHES)]
    means = jax.tree.map(lambda *g: functools.reduce(jnp.add, g) / len(g), *alone)
    found = {
        "accumulated": distance(grad(ids, mask), whole),
        "mean_of_means": distance(means, whole),
    }
    print(f"accumulated gradient, off by    {found['accumulated']:.1e}")
    print(f"mean of the micro-batches', off {found['mean_of_means']:.1e}")
    moments = OPTIMIZER.init(params)
    for step in range(STEPS):
        params, moments, state, aux = train_step(params, moments, state, ids, mask)
        if step % 20 == 0 or step == STEPS - 1:
            print(f"step {step}: nll {aux['nll']:.3f}")
        found.setdefault("first_nll", float(aux["nll"]))
        found["last_nll"] = float(aux["nll"])
    return found


if __name__ == "__main__":
    main()
