"""The divergence of two distributions over the vocabulary, from their logits."""

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float

from ava_jax.kernel.collectives import add_up, max_over_shards
from ava_jax.kernel.logits import LOWEST
from ava_jax.kernel.stats import Vocabulary


def divergence(
    vocabulary: Vocabulary,
    beta: float,
    student: Float[Array, "*n W"],
    teacher: Float[Array, "*n W"],
    active: Bool[Array, "*n"],
) -> Float[Array, "*n"]:
    """Computes the divergence of the student's distribution p from the teacher's q.

    `KL(q‖p)` for β = 0, `KL(p‖q)` for β = 1, and between them
    `β·KL(q‖m) + (1−β)·KL(p‖m)` with `m = (1−β)·p + β·q`.

    Args:
      vocabulary: whose axis the columns are sharded over, if any; the reference's value
        is differentiated by JAX.
      beta: β in [0, 1].
      student: finite logits, or −inf for impossible classes.
      teacher: likewise; a constant under differentiation.
      active: marks the unmasked tokens; both logits are finite there.

    Returns:
      The divergence in nats; 0 for masked tokens.
    """
    axis = vocabulary.axis
    if vocabulary.implementation == "reference" and axis is None:
        both = student, stop_gradient(teacher)
        return _forward(axis, beta, *_with_finite_slopes(*both, active), active)[0]
    return cast(Array, _divergence(axis, beta, student, teacher, active))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _divergence(axis, beta, student, teacher, active):
    return _forward(axis, beta, student, teacher, active)[0]


def _with_finite_slopes(student, teacher, active):
    """Returns logits that JAX can differentiate `_forward` at, of the same value."""
    nowhere = (student == -jnp.inf) & (teacher == -jnp.inf)

    def clean(z):
        kept = jnp.where(active[..., None], z, jnp.zeros_like(z))
        return jnp.where(nowhere, LOWEST, kept)

    return clean(student), clean(teacher)


class _Distributions(NamedTuple):
    """The probabilities of both, and their logarithms; −inf where they are 0."""

    p: Float[Array, "*n W"]
    log_p: Float[Array, "*n W"]
    q: Float[Array, "*n W"]
    log_q: Float[Array, "*n W"]


def _forward(axis, beta, student, teacher, active):
    log_sums = _log_sums(axis, student, teacher)
    both = _distributions(student, teacher, log_sums)
    if beta in (0, 1):
        terms = _times(*_first_and_second(beta, both))
    else:
        log_m = _log_mixture(beta, both)
        of_q = _times(both.q, both.log_q, log_m)
        of_p = _times(both.p, both.log_p, log_m)
        terms = beta * of_q + (1 - beta) * of_p
    total = add_up(axis, jnp.sum(terms, -1), active.ndim)
    value = jnp.where(active, total, jnp.zeros_like(total))
    return value, (student, teacher, active, log_sums, value)


def _backward(axis, beta, residuals, cotangent):
    student, teacher, active, log_sums, value = residuals
    both = _distributions(student, teacher, log_sums)
    if beta == 0:
        slope = both.p - both.q
    elif beta == 1:
        slope = _times(both.p, both.log_p, both.log_q) - both.p * value[..., None]
    else:
        own = (1 - beta) * _times(both.p, both.log_p, _log_mixture(beta, both))
        mean = add_up(axis, jnp.sum(own, -1), active.ndim)
        slope = own - both.p * mean[..., None]
    exists = active[..., None] & (student != -jnp.inf)
    kept = jnp.where(exists, slope, jnp.zeros_like(slope))
    return cotangent[..., None] * kept, None, None


_divergence.defvjp(_forward, _backward)


def _log_sums(axis, student, teacher) -> Float[Array, "2 *n"]:
    """Computes the log-sum-exp of both rows."""
    largest = jnp.stack([jnp.max(student, -1), jnp.max(teacher, -1)])
    largest = max_over_shards(axis, largest)
    shift = jnp.where(largest != -jnp.inf, largest, jnp.zeros_like(largest))
    sums = [
        jnp.sum(jnp.exp(z - own[..., None]), -1)
        for z, own in zip((student, teacher), shift, strict=True)
    ]
    total = add_up(axis, tuple(sums), sums[0].ndim)
    return shift + jnp.log(jnp.stack(total))


def _distributions(student, teacher, log_sums) -> _Distributions:
    log_p = student - log_sums[0][..., None]
    log_q = teacher - log_sums[1][..., None]
    return _Distributions(jnp.exp(log_p), log_p, jnp.exp(log_q), log_q)


def _first_and_second(beta: float, both: _Distributions):
    """Returns a and the logarithms of a and b, for KL(a‖b)."""
    if beta == 0:
        return both.q, both.log_q, both.log_p
    return both.p, both.log_p, both.log_q


def _log_mixture(beta: float, both: _Distributions) -> Float[Array, "*n W"]:
    """Computes log m; finite wherever p or q is not 0."""
    a = both.log_p + jnp.log1p(-beta)
    b = both.log_q + jnp.log(beta)
    return jnp.logaddexp(a, b)


def _times(a, log_a, log_b) -> Float[Array, "*n W"]:
    """Computes `a·(log a − log b)`; 0 where a is 0."""
    exists = a > 0
    distance = jnp.where(exists, log_a, 0.0) - jnp.where(exists, log_b, 0.0)
    return a * distance
