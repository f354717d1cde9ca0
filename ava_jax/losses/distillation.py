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
      a smaller one is counted as that much.

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
    log_p, log_q = as_float(log_probs), stop_gradient(as_float(teacher_log_probs))
    known = log_q != -jnp.inf
    log_p = jnp.where(known, log_p, -jnp.inf)
    sum_p, sum_q = _log_sum(log_p), _log_sum(log_q)
    if not tail:
        log_p, log_q = log_p - sum_p[..., None], log_q - sum_q[..., None]
    q = jnp.where(known, jnp.exp(log_q), 0.0)
    distance = jnp.where(known, log_q, 0.0) - jnp.where(known, log_p, 0.0)
    of_known = jnp.sum(q * distance, -1)
    if not tail:
        return of_known
    rest_p, rest_q = _log_rest(sum_p), _log_rest(sum_q)
    return of_known + jnp.exp(rest_q) * (rest_q - rest_p)


def _log_sum(log_p: Float[Array, "*n K"]) -> Float[Array, "*n"]:
    """Computes the log-sum-exp over the known classes; 0 if there are none."""
    known = jnp.any(log_p != -jnp.inf, -1)
    safe = jnp.where(known[..., None], log_p, 0.0)
    return jnp.where(known, jax.nn.logsumexp(safe, -1), 0.0)


def _log_rest(log_sum: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Computes `log(1 − e^x)` for x ≤ 0; the rest is at least one rounding error."""
    least = jnp.finfo(log_sum.dtype).eps
    x = jnp.minimum(log_sum, -least)
    return jnp.where(x > -jnp.log(2.0), jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x)))
