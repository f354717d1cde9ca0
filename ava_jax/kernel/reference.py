"""The kernel's definition: whole rows, plain formulas, differentiated by JAX.

Every other implementation is tested against this one. It needs several arrays of the
size of the logits, and gathers a sharded vocabulary first.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ava_jax.kernel.collectives import first_id
from ava_jax.kernel.logits import LOG_NOTHING, column_ids, possible_logits
from ava_jax.kernel.stats import Query, TokenStats, Vocabulary
from ava_jax.reduce import as_float

# Logits, the temperature (None for 1), and the cotangents of the statistics.
Given = tuple[Float[Array, "*n W"], Float[Array, ""] | None, TokenStats]


def reduce(
    logits: Float[Array, "*n W"],
    query: Query,
    vocabulary: Vocabulary,
    temperature: Float[Array, ""] | None,
) -> TokenStats:
    """Computes the statistics of a block; see `token_statistics`."""
    whole, vocabulary = _gathered(logits, vocabulary)
    return _define(whole, query, vocabulary, temperature)


def logits_gradient(
    logits: Float[Array, "*n W"],
    query: Query,
    vocabulary: Vocabulary,
    stats: TokenStats,
    cotangents: TokenStats,
    *,
    tempered: bool,
    of_temperature: bool,
) -> tuple[Float[Array, "*n W"], Float[Array, ""] | None]:
    """Computes the cotangents of logits and temperature by `jax.vjp` of `reduce`."""
    whole, facts = _gathered(logits, vocabulary)
    given = whole, stats.temperature if tempered else None, cotangents
    d_whole, d_temperature = _pull(facts, query, given)
    own = _own_columns(vocabulary, d_whole, logits.shape[-1])
    return own, d_temperature if of_temperature else None


def second_derivative(
    vocabulary: Vocabulary,
    of_temperature: bool,
    query: Query,
    given: Given,
    cotangents: tuple[Float[Array, "*n W"], Float[Array, ""] | None],
) -> Given:
    """Computes the cotangents of what `logits_gradient` is a function of.

    Args:
      vocabulary: as for `logits_gradient`.
      of_temperature: as for `logits_gradient`.
      query: as for `logits_gradient`.
      given: the logits, the temperature and the cotangents of the statistics.
      cotangents: those of the result of `logits_gradient`.
    """
    logits, temperature, of_stats = given
    whole, facts = _gathered(logits, vocabulary)
    d_whole, _ = _gathered(cotangents[0], vocabulary)

    def gradient(given: Given):
        d_logits, d_temperature = _pull(facts, query, given)
        return d_logits, d_temperature if of_temperature else None

    pull = jax.vjp(gradient, (whole, temperature, of_stats))[1]
    (again,) = pull((d_whole, cotangents[1]))
    return (_own_columns(vocabulary, again[0], logits.shape[-1]), *again[1:])


def _pull(facts: Vocabulary, query: Query, given: Given):
    """Computes the cotangents of whole rows of logits and of the temperature."""

    def floats(z, temperature):
        return _floats(_define(z, query, facts, temperature))

    logits, temperature, of_stats = given
    values, pull = jax.vjp(floats, logits, temperature)
    known = _floats(of_stats)
    return pull(
        {
            k: jnp.zeros_like(v) if known[k] is None and v is not None else known[k]
            for k, v in values.items()
        }
    )


def _own_columns(
    vocabulary: Vocabulary, whole: Float[Array, "*n V"], width: int
) -> Float[Array, "*n W"]:
    """Returns this shard's columns."""
    if vocabulary.axis is None:
        return whole
    start = first_id(vocabulary.axis, width)
    return lax.dynamic_slice_in_dim(whole, start, width, whole.ndim - 1)


def _gathered(logits, vocabulary: Vocabulary):
    if vocabulary.axis is None:
        return logits, vocabulary
    whole = lax.all_gather(logits, vocabulary.axis, axis=logits.ndim - 1, tiled=True)
    return whole, vocabulary._replace(axis=None)


def _floats(stats: TokenStats) -> dict[str, Array | None]:
    """Returns the differentiable statistics by name."""
    names = ("log_sum", "second_log_sum", "log_sum_tempered", "expected_tempered")
    names += ("temperature", "target", "total", "expected")
    named = {name: getattr(stats, name) for name in names}
    return named | {f"candidates.{k}": c for k, c in stats.candidates.items()}


def _define(logits, query: Query, vocabulary: Vocabulary, temperature) -> TokenStats:
    """Computes the formulas of `TokenStats`."""
    active = query.active
    safe = jnp.where(active[..., None], logits, jnp.zeros_like(logits))
    z = possible_logits(vocabulary, safe)
    possible = z != -jnp.inf
    largest = lax.stop_gradient(jnp.max(z, -1))
    shift = jnp.where(active & (largest != -jnp.inf), largest, 0.0)
    relative = jnp.where(possible, z - shift[..., None], -jnp.inf)
    finite = jnp.where(possible, relative, 0.0)
    log_sum = _log_sum_exp(relative)
    top = jnp.argmax(z, -1).astype(jnp.int32)
    others = jnp.where(column_ids(z) == top[..., None], -jnp.inf, relative)
    second = _log_sum_exp(others, LOG_NOTHING) if query.log_one_minus_p else None
    probabilities = jnp.where(possible, jnp.exp(finite - log_sum[..., None]), 0.0)
    given = jnp.ones_like(as_float(1.0)) if temperature is None else temperature
    cooled = jnp.where(possible, finite / given, -jnp.inf)
    tempered = log_sum if temperature is None else _log_sum_exp(cooled)
    of_tempered = None
    if query.tempered_entropy:
        p = jnp.where(possible, jnp.exp(finite / given - tempered[..., None]), 0.0)
        of_tempered = jnp.sum(p * finite, -1)

    def pick(ids):
        known = (ids >= 0) & (ids < vocabulary.size)
        picked = jnp.take_along_axis(relative, jnp.where(known, ids, 0), -1)
        return jnp.where(known, picked, -jnp.inf)

    return TokenStats(
        shift=shift,
        log_sum=log_sum,
        second_shift=jnp.zeros_like(shift),
        second_log_sum=second,
        log_sum_tempered=tempered,
        expected_tempered=of_tempered,
        temperature=given,
        target=pick(query.targets[..., None])[..., 0],
        total=jnp.sum(finite, -1),
        count=jnp.sum(as_float(possible), -1),
        expected=jnp.sum(probabilities * finite, -1),
        top=top,
        is_top=top == query.targets,
        candidates={k: pick(c) for k, c in query.candidates.items()},
        candidate_is_top={k: top[..., None] == c for k, c in query.candidates.items()},
    )


def _log_sum_exp(z, of_nothing=0.0):
    """Computes the log-sum-exp of each row; `of_nothing` without a possible class."""
    exists = jnp.any(z != -jnp.inf, -1)
    safe = jnp.where(exists[..., None], z, 0.0)
    return jnp.where(exists, jax.nn.logsumexp(safe, -1), of_nothing)
