"""Consistency losses: a model should predict the same for an input and a copy of it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from ava_jax.annotations import with_checked_arrays
from ava_jax.arrays import as_weights
from ava_jax.ranges import check_range
from ava_jax.reduce import as_float


def _squared_error(
    log_p: Float[Array, "*B C"], log_q: Float[Array, "*B C"]
) -> Float[Array, "*B"]:
    return jnp.mean(jnp.square(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)


def _divergence(
    log_p: Float[Array, "*B C"], log_q: Float[Array, "*B C"]
) -> Float[Array, "*B"]:
    """Returns `Σ q · (log q − log p)`; a class with q = 0 adds nothing."""
    q = jnp.exp(log_q)
    absent = q == 0
    # Both logarithms may be −inf there, and their difference NaN.
    ratio = jnp.where(absent, 0, log_q) - jnp.where(absent, 0, log_p)
    return jnp.sum(q * ratio, axis=-1)


def _pseudo_label(
    original: Float[Array, "*B C"], augmented: Float[Array, "*B C"]
) -> Float[Array, "*B"]:
    classes = jnp.arange(original.shape[-1], dtype=jnp.int32)
    label = jnp.argmax(original, axis=-1).astype(jnp.int32)
    log_q = jax.nn.log_softmax(augmented)
    return -jnp.sum(jnp.where(classes == label[..., None], log_q, 0), axis=-1)


@with_checked_arrays
def consistency_loss(
    outputs_original: Float[Array, "*B C"],
    outputs_augmented: Float[Array, "*B C"],
    *,
    kind: str = "mse",
    temperature: Float[Array, ""] | float | int = 1.0,
    weights: Shaped[Array, "*B"] | None = None,
) -> Float[Array, "*B"]:
    """Computes the disagreement of two predictions for the same input, per row.

    With `p` and `q` the softmaxes of the original and the augmented logits, both
    divided by `temperature`:

    - `"mse"`: `mean_c (p_c − q_c)²`;
    - `"kl"`: `Σ_c q_c · (log q_c − log p_c)`;
    - `"ce"`: `−log q_y`, `y` the class of the original's largest logit, always at
      temperature 1.

    Both predictions get gradients (`"ce"`: only the augmented one); wrap the original
    in `jax.lax.stop_gradient` to train on the augmented one alone.

    Args:
      outputs_original: `[..., C]` logits.
      outputs_augmented: `[..., C]` logits of the augmented input.
      kind: `"mse"`, `"kl"` or `"ce"`.
      temperature: above 0.
      weights: `[...]`, bool or numbers, or None for ones. Each row's loss is multiplied
        by its weight; a row of weight 0 may hold NaN.

    Returns:
      `[...]`, one loss per row.

    Raises:
      ValueError: an unknown `kind`, a bad `temperature`, or shapes that differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> a, b = jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 0.0]])
      >>> [round(float(losses.consistency_loss(a, b, kind=kind)[0]), 4)
      ...  for kind in ("mse", "kl", "ce")]
      [0.145, 0.4338, 0.6931]

    References:
      Xie et al., Unsupervised Data Augmentation, 2020 (`"kl"`).
      Sohn et al., FixMatch, 2020 (`"ce"`).
    """
    if kind not in ("mse", "kl", "ce"):
        raise ValueError(f'kind must be "mse", "kl" or "ce", got {kind!r}')
    check_range("temperature", temperature, 0, inclusive=False)
    original, augmented = as_float(outputs_original), as_float(outputs_augmented)
    scale = jnp.ones(original.shape[:-1], original.dtype)
    if weights is not None:
        scale = as_weights("weights", weights)
        original = jnp.where(scale[..., None] != 0, original, 0)
        augmented = jnp.where(scale[..., None] != 0, augmented, 0)
    if kind == "ce":
        return scale * _pseudo_label(original, augmented)
    log_p = jax.nn.log_softmax(original / as_float(temperature))
    log_q = jax.nn.log_softmax(augmented / as_float(temperature))
    row = _squared_error if kind == "mse" else _divergence
    return scale * row(log_p, log_q)
