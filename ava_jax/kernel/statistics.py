"""From logits to a handful of numbers per token, and back to the logits' gradient."""

import dataclasses
import functools
from types import ModuleType
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ava_jax.kernel import cpu, reference, xla
from ava_jax.kernel.gradient import is_zero_cotangent
from ava_jax.kernel.platforms import Implementation, by_implementation
from ava_jax.kernel.stats import Query, TokenStats, Vocabulary
from ava_jax.reduce import as_float

_MODULES: dict[Implementation, ModuleType] = {
    "reference": reference,
    "cpu": cpu,
    "xla": xla,
}


def token_statistics(
    logits: Float[Array, "*n V"],
    query: Query,
    vocabulary: Vocabulary,
    temperature: Float[Array, ""] | None = None,
) -> TokenStats:
    """Reduces logits to the numbers per token that all token losses share.

    Columns from `vocabulary.size` on are padding; −inf entries have probability 0; the
    logits of inactive tokens may hold anything. All of these get a gradient of 0.

    Args:
      logits: any float dtype; statistics are float32 (float64 under x64).
      query: targets, active tokens and further ids.
      vocabulary: the true vocabulary size, the soft-cap and the implementation.
      temperature: T > 0, a scalar; 1 if None.

    Returns:
      TokenStats. Its gradient is one fused expression over the logits, which are kept
      in their own dtype.

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
    # XLA's CPU loops over an axis of size one are several times slower.
    lead = logits.shape[:-1]
    long = tuple(size for size in lead if size != 1)
    squeezed, query = jax.tree.map(
        lambda x: x.reshape(*long, *x.shape[len(lead) :]), (logits, query)
    )
    stats = cast(
        TokenStats, _token_statistics(vocabulary, squeezed, query, temperature)
    )
    whole = jax.tree.map(
        lambda x: x.reshape(*lead, *x.shape[len(long) :]),
        dataclasses.replace(stats, temperature=stats.shift),
    )
    return dataclasses.replace(whole, temperature=stats.temperature)


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
    # An empty tuple, or None: what is known while tracing travels in the structure.
    kept = (temperature, () if is_learned else None)
    return stats, (logits, query, stats, kept)


def _backward(vocabulary, residuals, cotangents: TokenStats):
    logits, query, stats, (temperature, is_learned) = residuals
    cotangents = jax.tree.map(
        lambda c: None if is_zero_cotangent(c) else c,
        cotangents,
        is_leaf=is_zero_cotangent,
    )

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


_token_statistics.defvjp(_forward, _backward, symbolic_zeros=True)
