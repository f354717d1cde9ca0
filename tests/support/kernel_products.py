"""Products that are never stored, and their statistics."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ava_jax import Vocabulary, token_statistics
from ava_jax.kernel.product import Product, near_largest, sample_columns
from ava_jax.kernel.summary import NOT_QUERIED
from support.kernel_rows import (
    MESH,
    TEMPERATURE,
    WIDTH,
    Options,
    assert_rows_agree,
    batch,
    bias_of,
    gradient_of_temperature,
    measured,
    mixed,
    top_logit_of,
    unbiased,
    unknown,
)

# Numbers near each token's largest logit, as a function of it.
NEAR: dict[str, Any] = {
    "the largest": lambda largest: largest,
    "55 below": lambda largest: largest - 55,
    "zero": jnp.zeros_like,
    "far below": lambda largest: jnp.full_like(largest, -1e6),
    "far above": lambda largest: jnp.full_like(largest, 1e6),
}


@functools.cache
def product_program(
    options: Options,
    *,
    by_columns: bool,
    axis: str | None,
    is_near_given: bool,
    may_round: bool,
    by_mosaic: bool,
):
    """Values, facts and gradients of a mixture of a product's statistics, under jit."""
    facts = options.size, options.cap, axis, options.promises, "xla", options.parts
    vocabulary = Vocabulary(*facts)

    def mixture(probe, temperature, hidden, kernel, bias, near, query):
        if not is_near_given:
            sample = sample_columns(kernel, bias, by_columns=by_columns)
            near = near_largest(hidden, sample)
        product = Product(
            hidden,
            kernel,
            near,
            bias,
            probe=probe,
            shape=query.targets.shape,
            by_columns=by_columns,
            may_round=may_round,
            by_mosaic=by_mosaic,
        )
        if may_round:
            temperature = jax.lax.stop_gradient(temperature)
        given = temperature if options.tempered else None
        stats = token_statistics(product, query, vocabulary, given)
        return mixed(stats, query, unknown(options))

    run = jax.grad(mixture, argnums=(0, 1), has_aux=True)
    if axis is not None:
        run = jax.shard_map(
            run,
            mesh=MESH,
            in_specs=(P(None, axis), P(), P(), P(None, axis), P(axis), P(), P()),
            out_specs=((P(None, axis), P()), P()),
            check_vma=False,
        )
    return jax.jit(run)


def measured_product(
    options: Options,
    *,
    by_columns: bool,
    axis: str | None = None,
    near: str = "",
    may_round: bool = False,
    by_mosaic: bool = False,
):
    """What `measured` returns, of rows that are a product with the identity.

    Args:
      options: what the program is traced for.
      by_columns: see `Product`.
      axis: of the mesh, or None.
      near: one of `NEAR`; what a pass takes if it is empty.
      may_round: see `Product`; the temperature then has no gradient.
      by_mosaic: see `Product`; its operands are then of bfloat16.
    """
    _, z, query = batch(options)
    _, hidden = unbiased(options)
    active = query.active[..., None]
    z, hidden = (
        jnp.where(active, x, jnp.zeros_like(x)).reshape(-1, WIDTH) for x in (z, hidden)
    )
    largest = jnp.max(z[:, : options.size], -1)
    run = product_program(
        options,
        by_columns=by_columns,
        axis=axis,
        is_near_given=bool(near),
        may_round=may_round,
        by_mosaic=by_mosaic,
    )
    operands = hidden, jnp.eye(WIDTH, dtype=z.dtype)
    if by_mosaic:
        operands = tuple(x.astype(jnp.bfloat16) for x in operands)
    (grad, slope), (values, found) = run(
        jnp.zeros(hidden.shape, jnp.asarray(0.0).dtype),
        jax.device_put(TEMPERATURE),
        *operands,
        bias_of(options) if options.biased else None,
        NEAR[near](largest) if near else largest,
        query,
    )
    grad = grad.reshape(*query.targets.shape, WIDTH)
    return jax.tree.map(np.asarray, (values, found, (grad, slope)))


def assert_product_agrees(
    options: Options, *, near: str = "", may_round: bool = False, **how
):
    """Compares a product with the definition where both are specified."""
    with jax.enable_x64(options.dtype == "float64"):
        got = measured_product(options, near=near, may_round=may_round, **how)
    assert_one_pass_agrees(options, got, is_near=not near, is_rounded=may_round)


def assert_one_pass_agrees(
    options: Options, got, *, is_near: bool = True, is_rounded: bool = False
):
    """Compares what one pass has measured with the definition.

    Args:
      options: what it was traced for.
      got: what `measured` returns.
      is_near: whether the sums are relative to the largest logit.
      is_rounded: whether the gradient is made of rounded exponentials.
    """
    with jax.enable_x64(options.dtype == "float64"):
        largest = top_logit_of(options)
        want = measured(options, "reference", None, as_product=True)
        exact = gradient_of_temperature(options) if options.tempered else 0.0
    assert largest.is_queried.any()
    assert not largest.is_queried.all()
    values, found, slopes = want
    found = found | {"top": np.where(largest.is_queried, found["top"], NOT_QUERIED)}

    def comparable(values, found, slopes):
        """Zeroes the values that may differ."""
        # Label smoothing takes the mean; its rounding is that of a single logit.
        values = values | {"total": values["total"] / options.size}
        if "log_sum_without_top" in values:
            known = np.where(largest.is_queried, values["log_sum_without_top"], 0)
            values = values | {"log_sum_without_top": known}
        kept = {}
        for key, fact in found.items():
            # If several logits are largest, any queried one may be the top, but the
            # target only if it is the first.
            differs = largest.is_tied & (key != "is_top")
            differs = differs.reshape(*differs.shape, *[1] * (fact.ndim - 2))
            kept[key] = np.where(differs, 0, fact)
        return values, kept, slopes

    # Relative to a number up to 60 below the largest logit, sums lose some digits.
    absolute = 5e-6 if is_near else 2e-5
    absolute = 1e-12 if options.dtype == "float64" else absolute
    if options.cap is not None:
        absolute += options.cap * 5e-7
    assert_rows_agree(
        options,
        comparable(*got),
        comparable(values, found, slopes),
        absolute=absolute,
        of_inactive=True,
        # The difference to the largest logit is rounded, which matters in log(1 − p).
        rounding=largest.lead * np.finfo(largest.lead.dtype).eps,
        is_rounded=is_rounded,
    )
    if not is_rounded:
        np.testing.assert_allclose(got[2][1], exact, rtol=1e-4)
