"""A loss term of your own: a frozen dataclass with `__call__`.

    python examples/add_a_term.py

PolyLoss (Leng et al. 2022) adds ε · (1 − p) of the target's probability p to the
cross-entropy. A term returns a value per token; the loss takes the mean over unmasked
tokens, times the term's weight, adds it and reports it in `aux` under the term's name.
It works on both paths (`logits`, or `hidden_states` and `lm_head`), under micro-batches
and on a mesh. Takes some seconds on a CPU.
"""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import ava_jax
from trainer.small import VOCAB, Params, byte_rows, hidden_states, init_params

ROWS, LENGTH, STEPS = 16, 64, 60
OPTIMIZER = optax.adamw(3e-3)


@dataclasses.dataclass(frozen=True)
class PolyLoss(ava_jax.TokenTerm):
    """`1 − p_y` of every token, the first term of the series of `−log p_y`.

    Attributes:
      name: the key in `aux`.
      weight: ε, a number or a schedule of the step.
    """

    name: str = "poly_loss"
    weight: float | optax.Schedule = 1.0

    def __call__(
        self, stats: ava_jax.TokenStats, inputs: ava_jax.TokenInputs
    ) -> Float[Array, "B S"]:
        """Returns the value of every token, from the statistics of its logits."""
        return -jnp.expm1(-stats.nll)


CONFIG = ava_jax.UnifiedLossConfig(vocab_size=VOCAB)
LOSS = ava_jax.unified_loss(CONFIG, extra_terms=(PolyLoss(weight=2.0),))


def objective(
    params: Params, state: ava_jax.LossState, ids: Array
) -> tuple[Array, tuple[dict[str, Array], ava_jax.LossState]]:
    """Returns the loss of a batch, its terms and the new loss state."""
    loss, aux, state = LOSS(
        state,
        targets=ids[:, 1:],
        hidden_states=hidden_states(params, ids[:, :-1]),
        lm_head=params["lm_head"],
    )
    return loss, (aux, state)


def main() -> dict[str, float]:
    """Trains under cross-entropy and the term; returns its first and last values."""
    params, state = init_params(jax.random.key(0)), LOSS.init()
    moments, ids = OPTIMIZER.init(params), byte_rows(ROWS, LENGTH)

    @jax.jit
    def train_step(
        params: Params, moments: optax.OptState, state: ava_jax.LossState
    ) -> tuple[Params, optax.OptState, ava_jax.LossState, dict[str, Array]]:
        grads, (aux, state) = jax.grad(objective, has_aux=True)(params, state, ids)
        updates, moments = OPTIMIZER.update(grads, moments, params)
        params = cast(Params, optax.apply_updates(params, updates))
        return params, moments, state, aux

    values = []
    for step in range(STEPS):
        params, moments, state, aux = train_step(params, moments, state)
        values.append(float(aux["poly_loss"]))
        if step % 20 == 0 or step == STEPS - 1:
            print(f"step {step}: nll {aux['nll']:.3f}, poly {aux['poly_loss']:.3f}")
    return {"first": values[0], "last": values[-1]}


if __name__ == "__main__":
    main()
