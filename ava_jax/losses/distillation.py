"""Distillation from a teacher's top k, as a function of log-probabilities.

`ava_jax.distillation_loss` distils from a whole distribution, or from hidden states.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from ava_jax.annotations import with_checked_arrays
from ava_jax.reduce import as_float


@with_checked_arrays
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
    log_p, log_q = as_float(log_probs), stop_gradient(as_float(teacher_log_probs))
    of_known = jnp.where(log_q != -jnp.inf, log_p, -jnp.inf)
    if tail:
        return divergence_with_rest(log_p, log_q, log_one_minus_sum(of_known))
    return _of_known(log_p - _log_sum(of_known), log_q - _log_sum(log_q))


def divergence_with_rest(
    log_probs: Float[Array, "*n K"],
    teacher_log_probs: Float[Array, "*n K"],
    log_rest: Float[Array, "*n"],
) -> Float[Array, "*n"]:
    """Computes `top_k_divergence` from what the student gives to all other classes.

    Args:
      log_probs: as there.
      teacher_log_probs: as there; the caller stops its gradient.
      log_rest: the student's `log(1 − Σ p_c)` over the teacher's classes.
    """
    of_teacher = log_one_minus_sum(teacher_log_probs)
    of_rest = jnp.exp(of_teacher) * (of_teacher - log_rest)
    return _of_known(log_probs, teacher_log_probs) + of_rest


def log_one_minus_sum(log_shares: Float[Array, "*n K"]) -> Float[Array, "*n"]:
    """Computes `log(1 − Σ e^x)`; what is left is at least one rounding error."""
    total = jnp.sum(jnp.exp(log_shares), -1)
    return jnp.log1p(-jnp.minimum(total, 1 - jnp.finfo(total.dtype).eps))


def _log_sum(log_p: Float[Array, "*n K"]) -> Float[Array, "*n 1"]:
    """Computes the log-sum-exp over the known classes; 0 if there are none."""
    known = jnp.any(log_p != -jnp.inf, -1, keepdims=True)
    safe = jnp.where(known, log_p, 0.0)
    return jnp.where(known, jax.nn.logsumexp(safe, -1, keepdims=True), 0.0)


def _of_known(
    log_p: Float[Array, "*n K"], log_q: Float[Array, "*n K"]
) -> Float[Array, "*n"]:
    """Computes `Σ q (log q − log p)` over the classes that the teacher knows."""
    known = log_q != -jnp.inf
    q = jnp.where(known, jnp.exp(log_q), 0.0)
    distance = jnp.where(known, log_q, 0.0) - jnp.where(known, log_p, 0.0)
    return jnp.sum(q * distance, -1)
