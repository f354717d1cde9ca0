"""How even the load of a batch can be if the bias comes from the batch before.

    python -m experiments.batch_noise

Independent tokens and a router that never changes: what remains is the noise of the
batches, which limits every balancing that looks at one batch only.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ava_jax import losses, metrics

EXPERTS, CHOSEN = 8, 2
# Of finding the quantiles of one batch; they settle in fewer.
ROUNDS = 12


def scores_of(key: Array, tokens: int) -> Float[Array, "N E"]:
    """Returns the scores of independent tokens under a router that is not even."""
    logits = jax.random.normal(key, (tokens, EXPERTS))
    return jax.nn.softmax(logits + jnp.linspace(-0.5, 0.5, EXPERTS))


def settled_bias(scores: Float[Array, "N E"]) -> Float[Array, "E"]:
    """Returns the bias that balances a batch."""

    def step(_: int, bias: Float[Array, "E"]) -> Float[Array, "E"]:
        histogram = losses.cutoff_histogram(scores, bias, CHOSEN)
        return losses.quantile_bias(bias, histogram, CHOSEN)

    return jax.lax.fori_loop(0, ROUNDS, step, jnp.zeros(EXPERTS))


@functools.partial(jax.jit, static_argnums=(1, 2))
def next_violation(key: Array, tokens: int, batches: int) -> Float[Array, ""]:
    """Returns the mean MaxVio of batches with the bias of the batch before each."""

    def of_pair(key: Array) -> Float[Array, ""]:
        before, after = (scores_of(k, tokens) for k in jax.random.split(key))
        _, indices = losses.route(after, settled_bias(before), CHOSEN)
        load = jnp.bincount(indices.ravel(), length=EXPERTS)
        return metrics.max_violation(load.astype(jnp.float32))

    return jnp.mean(jax.lax.map(of_pair, jax.random.split(key, batches)))


if __name__ == "__main__":
    for tokens in (768, 3072, 6144, 12_288):
        mean = float(next_violation(jax.random.key(0), tokens, 200))
        print(f"{tokens} tokens: MaxVio {mean:.3f}")
