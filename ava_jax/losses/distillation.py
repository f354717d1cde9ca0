"""Distillation from a teacher's top k, as a function of log-probabilities.

`ava_jax.distillation_loss` distils from a whole distribution, or from hidden states.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from ava_jax.losses.arguments import check_floating, check_same_shape
from ava_jax.reduce import as_float


def top_k_divergence(
    log_probs: Float[Array, "*n K"],
    teacher_log_probs: Float[Array, "*n K"],
    *,
    tail: bool = True,
) -> Float[Array, "*n"]:
    """Computes the divergence from a teacher of which the top k classes are known.

    `KL(q‖p) = Σ_c q_c·(log q_c − log p_c)` over the k classes and, with `tail`, one
    class for all the rest: `q_rest = 1 − Σ q_c`, `p_rest = 1 − Σ p_c`. Without it, both
    are renormalised over the k classes.

    Args:
      log_probs: the student's `log p_c` at the teacher's k distinct ids, [..., k].
      teacher_log_probs: `log q_c`, [..., k]; a constant. −inf leaves a class out.
      tail: whether the rest is a class.

    Returns:
      The divergence in nats, [...]. In float32 the rest is known to 1e-7 of the whole;
      a smaller one is counted as that much. `terms.TopKDistillation` and
      `distillation_loss`, which see the logits, know it to 1e-7 of what all classes but
      the most probable one have.

    Raises:
      TypeError: an array is not floating point.
      ValueError: the shapes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> p, q = jnp.log(jnp.array([0.5, 0.25])), jnp.log(jnp.array([0.6, 0.2]))
      >>> round(float(losses.top_k_divergence(p, q)), 4)
      0.0201

    References:
      Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    check_floating("log_probs", log_probs)
    check_floating("teacher_log_probs", teacher_log_probs)
    shape = log_probs.shape
    check_same_shape("log_probs", shape, teacher_log_probs=teacher_log_probs)
    log_p, log_q = as_float(log_probs), as_float(teacher_log_probs)
    if tail:
        known = log_q != -jnp.inf
        log_rest = log_one_minus_sum(jnp.where(known, log_p, -jnp.inf))
        return divergence_with_rest(log_p, log_q, log_rest)
    return _of_known(_normalized(log_p, log_q), _normalized(log_q, log_q))


def divergence_with_rest(
    log_probs: Float[Array, "*n K"],
    teacher_log_probs: Float[Array, "*n K"],
    log_rest: Float[Array, "*n"],
) -> Float[Array, "*n"]:
    """Computes `top_k_divergence` from what the student gives to all other classes.

    Args:
      log_probs: as there.
      teacher_log_probs: as there.
      log_rest: the student's `log(1 − Σ p_c)` over the teacher's classes.
    """
    log_q = stop_gradient(teacher_log_probs)
    of_teacher = log_one_minus_sum(log_q)
    of_rest = jnp.exp(of_teacher) * (of_teacher - log_rest)
    return _of_known(log_probs, log_q) + of_rest


def log_one_minus_sum(log_shares: Float[Array, "*n K"]) -> Float[Array, "*n"]:
    """Computes `log(1 − Σ e^x)`; what is left is at least one rounding error."""
    total = _log_sum(log_shares, fill=-1.0)
    least = jnp.finfo(total.dtype).eps
    x = jnp.minimum(total, -least)
    left = jnp.where(x > -jnp.log(2.0), jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x)))
    return jnp.where(jnp.any(log_shares != -jnp.inf, -1), left, 0.0)


def _log_sum(log_p: Float[Array, "*n K"], fill: float) -> Float[Array, "*n"]:
    """Computes the log-sum-exp, and `fill` where there is nothing to sum up."""
    some = jnp.any(log_p != -jnp.inf, -1)
    safe = jnp.where(some[..., None], log_p, 0.0)
    return jnp.where(some, jax.nn.logsumexp(safe, -1), fill)


def _normalized(
    log_p: Float[Array, "*n K"], log_q: Float[Array, "*n K"]
) -> Float[Array, "*n K"]:
    """Divides by the sum over the classes that the teacher knows."""
    known = jnp.where(log_q != -jnp.inf, log_p, -jnp.inf)
    return log_p - _log_sum(known, fill=0.0)[..., None]


def _of_known(
    log_p: Float[Array, "*n K"], log_q: Float[Array, "*n K"]
) -> Float[Array, "*n"]:
    """Computes `Σ q (log q − log p)` over the classes that the teacher knows."""
    known, log_q = log_q != -jnp.inf, stop_gradient(log_q)
    q = jnp.where(known, jnp.exp(log_q), 0.0)
    distance = jnp.where(known, log_q, 0.0) - jnp.where(known, log_p, 0.0)
    return jnp.sum(q * distance, -1)
