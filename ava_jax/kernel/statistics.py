"""The statistics of logits, and the gradient of the logits through them."""

import dataclasses
import functools
from types import ModuleType
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ava_jax.kernel import cpu, reference, rounded, xla, xla_product
from ava_jax.kernel.gradient import is_zero_cotangent
from ava_jax.kernel.platforms import Implementation, by_implementation
from ava_jax.kernel.product import Product
from ava_jax.kernel.stats import Query, TokenStats, Vocabulary
from ava_jax.reduce import as_float

_MODULES: dict[Implementation, ModuleType] = {
    "reference": reference,
    "cpu": cpu,
    "xla": xla,
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
        targets=query.targets.astype(jnp.int32),
        candidates={k: c.astype(jnp.int32) for k, c in query.candidates.items()},
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
    stats = _token_statistics(vocabulary, squeezed, query, temperature)
    return _reshaped(cast(TokenStats, stats), long, lead)


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
    probe = product.probe
    product = dataclasses.replace(product, probe=None)
    stats = _product_statistics(vocabulary, probe, product, query, temperature)
    return _reshaped(cast(TokenStats, stats), (-1,), shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product_statistics(vocabulary, probe, product, query, temperature):
    del probe
    return xla_product.reduce(product, query, vocabulary, temperature)[0]


def _product_forward(vocabulary, probe, product, query, temperature):
    is_learned = temperature is not None and temperature.perturbed
    product, query, temperature = jax.tree.map(
        lambda primal: primal.value, (product, query, temperature)
    )
    del probe
    keep = "exponentials" if product.may_round and not is_learned else "logits"
    stats, block = xla_product.reduce(
        product, query, vocabulary, temperature, keep=keep
    )
    kept = (temperature, () if is_learned else None)
    return stats, (block, product.bias, query, stats, kept)


def _product_backward(vocabulary, residuals, cotangents: TokenStats):
    block, bias, query, stats, (temperature, is_learned) = residuals
    facts = query, vocabulary, stats, _known(cotangents)
    is_tempered, d_temperature = temperature is not None, None
    if isinstance(block, rounded.Exponentials):
        d_logits = rounded.logits_gradient(block, bias, *facts, tempered=is_tempered)
    else:
        d_logits, d_temperature = xla.logits_gradient(
            block,
            *facts,
            tempered=is_tempered,
            of_temperature=is_learned is not None,
            bias=bias,
        )
    if d_temperature is None and temperature is not None:
        d_temperature = jnp.zeros_like(temperature)
    return d_logits, None, None, d_temperature


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_statistics(vocabulary, logits, query, temperature):
    def run(implementation, logits, query, temperature):
        module = _MODULES[implementation]
        return module.reduce(logits, query, vocabulary, temperature)

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
    cotangents = _known(cotangents)

    def run(implementation, logits, query, stats, cotangents):
        return _MODULES[implementation].logits_gradient(
            logits,
            query,
            vocabulary,
            stats,
            cotangents,
            tempered=temperature is not None,
            of_temperature=is_learned is not None,
        )

    operands = (logits, query, stats, cotangents)
    d_logits, d_temperature = by_implementation(
        vocabulary.implementation, run, *operands
    )
    if d_temperature is None and temperature is not None:
        d_temperature = jnp.zeros_like(temperature)
    return d_logits, None, d_temperature


def _known(cotangents: TokenStats) -> TokenStats:
    """Replaces the cotangents that are known to be zero by None."""
    return jax.tree.map(
        lambda c: None if is_zero_cotangent(c) else c,
        cotangents,
        is_leaf=is_zero_cotangent,
    )


_token_statistics.defvjp(_forward, _backward, symbolic_zeros=True)
_product_statistics.defvjp(_product_forward, _product_backward, symbolic_zeros=True)
