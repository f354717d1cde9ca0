"""The statistics of logits, and the gradient of the logits through them."""

import dataclasses
import functools
from types import ModuleType
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ava_jax.arrays import as_ids
from ava_jax.kernel import cpu, reference, rounded, xla, xla_product
from ava_jax.kernel.collectives import shared_scalar
from ava_jax.kernel.forward_mode import reverse_only
from ava_jax.kernel.gradient import is_zero_cotangent
from ava_jax.kernel.logits import at_temperature
from ava_jax.kernel.platforms import Implementation, by_implementation
from ava_jax.kernel.product import Given, Product, finished
from ava_jax.kernel.stats import Query, TokenStats, Vocabulary
from ava_jax.reduce import as_float

_MODULES: dict[Implementation, ModuleType] = {
    "reference": reference,
    "cpu": cpu,
    "xla": xla,
    "mosaic_gpu": xla,
}


def token_statistics(
    logits: Float[Array, "*n V"] | Product,
    query: Query,
    vocabulary: Vocabulary,
    temperature: Float[Array, ""] | None = None,
) -> TokenStats:
    """Computes the numbers per token that all token losses share.

    Columns from `vocabulary.size` on are padding; −inf entries have probability 0; the
    logits of masked tokens may hold anything. All of these get a gradient of 0.

    Args:
      logits: any float dtype; the statistics are float32 (float64 under x64). Inside a
        pass, also a `Product` whose logits do not exist yet.
      query: the targets, the unmasked tokens and further ids.
      vocabulary: the true vocabulary size, the soft-cap and the implementation.
      temperature: T > 0, a scalar; 1 if None.

    Returns:
      TokenStats. Their gradient is one fused expression over the logits, which are
      saved in their own dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import Query, Vocabulary, token_statistics
      >>> query = Query(targets=jnp.array([0]), active=jnp.array([True]))
      >>> stats = token_statistics(jnp.zeros((1, 4)), query, Vocabulary(4))
      >>> round(float(stats.nll[0]), 4)
      1.3863
    """
    query = dataclasses.replace(
        query,
        targets=as_ids(query.targets),
        candidates={k: as_ids(c) for k, c in query.candidates.items()},
    )
    if temperature is not None:
        temperature = as_float(temperature)
    if isinstance(logits, Product):
        return _of_block(logits, query, vocabulary, temperature)
    # XLA:CPU loops with an axis of size one are several times slower.
    lead = logits.shape[:-1]
    long = tuple(size for size in lead if size != 1)
    squeezed, query = jax.tree.map(
        lambda x: x.reshape(*long, *x.shape[len(lead) :]), (logits, query)
    )
    if vocabulary.implementation == "reference" and vocabulary.axis is None:
        stats = reference.reduce(squeezed, query, vocabulary, temperature)
    else:
        run = functools.partial(_token_statistics, vocabulary)
        stats = reverse_only(run, squeezed, query, temperature)
    return _reshaped(cast(TokenStats, stats), long, lead)


def cooled(
    logits: Float[Array, "*n V"] | Product,
    active: Bool[Array, "*n"],
    vocabulary: Vocabulary,
    temperature: Float[Array, ""],
) -> tuple[Float[Array, "*n V"] | Product, Vocabulary]:
    """Divides logits by a temperature, with their derivatives.

    Args:
      logits: a block's, or what makes them.
      active: marks the unmasked tokens; the others' logits may hold anything.
      vocabulary: the static facts.
      temperature: T.

    Returns:
      The soft-capped logits, divided, and the facts of their vocabulary.
    """
    if isinstance(logits, Product) and vocabulary.soft_cap is None:
        shared = shared_scalar(vocabulary.axis, temperature)
        return dataclasses.replace(logits, scale=1 / shared), vocabulary
    z = logits.logits() if isinstance(logits, Product) else logits
    z = at_temperature(z, active, vocabulary, temperature)
    return z, vocabulary._replace(soft_cap=None)


def _reshaped(stats: TokenStats, old: tuple[int, ...], new: tuple[int, ...]):
    """Reshapes the token axes of all statistics."""
    whole = jax.tree.map(
        lambda x: x.reshape(*new, *x.shape[len(old) :]),
        dataclasses.replace(stats, temperature=stats.shift),
    )
    return dataclasses.replace(whole, temperature=stats.temperature)


def _of_block(product: Product, query: Query, vocabulary: Vocabulary, temperature):
    """Computes the statistics of a block whose logits the kernel computes itself."""
    shape = product.shape
    query = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(shape) :]), query)
    probe, scale = product.probe, product.scale
    product = dataclasses.replace(product, probe=None, scale=None)
    stats = _product_statistics(vocabulary, probe, scale, product, query, temperature)
    return _reshaped(cast(TokenStats, stats), (-1,), shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product_statistics(vocabulary, probe, scale, product, query, temperature):
    del probe
    product = dataclasses.replace(product, scale=scale)
    return xla_product.reduce(product, query, vocabulary, temperature)[0]


def _product_forward(vocabulary, probe, scale, product, query, temperature):
    del probe
    learned = [x is not None and x.perturbed for x in (scale, temperature)]
    scale, product, query, temperature = jax.tree.map(
        lambda primal: primal.value, (scale, product, query, temperature)
    )
    product = dataclasses.replace(product, scale=scale)
    keep = "exponentials" if product.may_round and not any(learned) else "logits"
    stats, block = xla_product.reduce(
        product, query, vocabulary, temperature, keep=keep
    )
    # An empty tuple or None: a static fact is passed on as pytree structure.
    facts = [() if is_learned else None for is_learned in learned]
    return stats, (block, product.bias, scale, query, stats, temperature, facts)


def _product_backward(vocabulary, residuals, cotangents: TokenStats):
    block, bias, scale, query, stats, temperature, learned = residuals
    facts = query, vocabulary, stats, _known(cotangents)
    is_tempered = temperature is not None
    d_scale, d_temperature = jax.tree.map(jnp.zeros_like, (scale, temperature))
    if isinstance(block, rounded.Exponentials):
        d_logits = rounded.logits_gradient(block, bias, *facts, tempered=is_tempered)
    else:
        d_logits, slope = xla.logits_gradient(
            block,
            *facts,
            tempered=is_tempered,
            of_temperature=learned[1] is not None,
            bias=bias,
            scale=scale,
        )
        d_temperature = d_temperature if slope is None else slope
        if learned[0] is not None:
            # An impossible class has a gradient of 0, but an infinite logit.
            moves = d_logits * finished(block, bias, None)
            d_scale = jnp.sum(jnp.where(d_logits != 0, moves, jnp.zeros_like(moves)))
    if scale is not None:
        d_logits *= scale
    return d_logits, d_scale, None, None, d_temperature


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_statistics(vocabulary, logits, query, temperature):
    def run(implementation, logits, query, temperature):
        module, rest = _MODULES[implementation], (query, vocabulary, temperature)
        if module is xla and not query.top:
            return xla_product.reduce(Given.of(logits), *rest)[0]
        return module.reduce(logits, *rest)

    operands = (logits, query, temperature)
    return by_implementation(vocabulary.implementation, run, *operands)


def _forward(vocabulary, logits, query, temperature):
    is_learned = temperature is not None and temperature.perturbed
    logits, query, temperature = jax.tree.map(
        lambda primal: primal.value, (logits, query, temperature)
    )
    stats = _token_statistics(vocabulary, logits, query, temperature)
    # An empty tuple or None: a static fact is passed on as pytree structure.
    kept = (temperature, () if is_learned else None)
    return stats, (logits, query, stats, kept)


def _backward(vocabulary, residuals, cotangents: TokenStats):
    logits, query, stats, (temperature, is_learned) = residuals
    run = functools.partial(_logits_gradient, vocabulary, is_learned is not None)
    given = logits, temperature, _known(cotangents)
    d_logits, d_temperature = cast(Any, reverse_only(run, given, query, stats))
    if d_temperature is None and temperature is not None:
        d_temperature = jnp.zeros_like(temperature)
    return d_logits, None, d_temperature


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _logits_gradient(vocabulary, of_temperature: bool, given, query, stats):
    """Computes the cotangents of logits and temperature, of `given` with the stats'.

    It is a function of `given`: the statistics only spare it a pass.
    """
    logits, temperature, cotangents = given

    def run(implementation, logits, query, stats, cotangents):
        return _MODULES[implementation].logits_gradient(
            logits,
            query,
            vocabulary,
            stats,
            cotangents,
            tempered=temperature is not None,
            of_temperature=of_temperature,
        )

    operands = (logits, query, stats, cotangents)
    return by_implementation(vocabulary.implementation, run, *operands)


def _gradient_forward(vocabulary, of_temperature, given, query, stats):
    gradient = _logits_gradient(vocabulary, of_temperature, given, query, stats)
    return gradient, (given, query)


def _gradient_backward(vocabulary, of_temperature, residuals, cotangents):
    """Differentiates the reference's gradient."""
    given, query = residuals
    again = functools.partial(
        reference.second_derivative, vocabulary, of_temperature, query
    )
    return again(given, cotangents), None, None


_logits_gradient.defvjp(_gradient_forward, _gradient_backward)


def _known(cotangents: TokenStats) -> TokenStats:
    """Replaces the cotangents that are known to be zero by None."""
    return jax.tree.map(
        lambda c: None if is_zero_cotangent(c) else c,
        cotangents,
        is_leaf=is_zero_cotangent,
    )


_token_statistics.defvjp(_forward, _backward, symbolic_zeros=True)
_product_statistics.defvjp(_product_forward, _product_backward, symbolic_zeros=True)
