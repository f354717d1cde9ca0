"""The one pass over the vocabulary: from logits to a handful of numbers per token.

Every token loss is a small function of these numbers, `TokenStats`. The pass and its
gradient are each one expression over the logits. Ids are matched by comparing with an
iota, never gathered, so that a sharded vocabulary axis works.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from ava_jax.reduce import as_float
from ava_jax.tokens import Tokens, seen_before

# 1 − p is 0 in any precision when no other class is possible; its logarithm stays
# finite, so that a product with 0 is 0.
_LOG_NOTHING = -1e30
_TOKENS_PER_CHUNK = 512


@flax.struct.dataclass
class TokenStats:
    """What the token losses know of each token's logits `z`.

    Logits are kept relative to `shift`, the token's largest one, so that logits of any
    size lose no precision; `shift` is a constant to differentiation, and any function
    of the distribution is free of it.

    Attributes:
      shift: the largest logit.
      log_sum: `log Σ exp(z − shift)`.
      second: the largest logit of the classes but `top`, relative to `shift`; a
        constant to differentiation as well.
      log_rest_sum: `log Σ exp(z − shift − second)` over the classes but `top`.
      log_sum_tempered: `log Σ exp((z − shift)/T)`.
      temperature: T, a scalar.
      target: `z_y − shift`.
      total: `Σ_v (z_v − shift)` over the possible classes.
      count: how many classes are possible (finite, not padding).
      expected: `Σ_v p_v (z_v − shift)`.
      top: index of the largest logit.
      is_top: whether that is the target.
      candidates: `z_c − shift` at the requested ids, by name, [..., Q].
      candidate_is_top: whether that id is `top`, by name.
      seen: `Σ_c −log(1 − p_c)` over the distinct earlier ids; None unless requested.
    """

    shift: Float[Array, "*n"]
    log_sum: Float[Array, "*n"]
    second: Float[Array, "*n"]
    log_rest_sum: Float[Array, "*n"]
    log_sum_tempered: Float[Array, "*n"]
    temperature: Float[Array, ""]
    target: Float[Array, "*n"]
    total: Float[Array, "*n"]
    count: Float[Array, "*n"]
    expected: Float[Array, "*n"]
    top: Int[Array, "*n"]
    is_top: Bool[Array, "*n"]
    candidates: dict[str, Float[Array, "*n Q"]]
    candidate_is_top: dict[str, Bool[Array, "*n Q"]]
    seen: Float[Array, "*n"] | None = None

    @property
    def log_z(self) -> Float[Array, "*n"]:
        """`logsumexp(z)`."""
        return self.shift + self.log_sum

    @property
    def log_rest(self) -> Float[Array, "*n"]:
        """`log Σ exp(z − shift)` over the classes but `top`."""
        return self.second + self.log_rest_sum

    @property
    def nll(self) -> Float[Array, "*n"]:
        """`−log p_y` at temperature 1."""
        return self.log_sum - self.target

    @property
    def entropy(self) -> Float[Array, "*n"]:
        """`−Σ p log p` at temperature 1, in nats."""
        return self.log_sum - self.expected

    @property
    def target_complement(self) -> Float[Array, "*n"]:
        """`log(1 − p_y)`, exact and finite also where p_y rounds to 1."""
        return self._complement(self.target, self.is_top, self.log_sum, self.log_rest)

    def unlikelihood(self, name: str) -> Float[Array, "*n Q"]:
        """`u(c) = −log(1 − p_c)` of the candidates `name`, finite at p → 1."""
        return -self._complement(
            self.candidates[name],
            self.candidate_is_top[name],
            self.log_sum[..., None],
            self.log_rest[..., None],
        )

    @staticmethod
    def _complement(logit, is_top, log_sum, log_rest):
        # A class that is not the largest has p ≤ 1/2, where log1p is exact.
        log_p = jnp.where(is_top, -jnp.ones_like(logit), logit - log_sum)
        return jnp.where(is_top, log_rest - log_sum, jnp.log1p(-jnp.exp(log_p)))


@flax.struct.dataclass
class SeenQuery:
    """Asks for the unlikelihood of all distinct earlier ids of a block's rows.

    Attributes:
      history: the whole rows.
      segments: segment ids of the block.
      positions: row positions of the block.
    """

    history: Tokens
    segments: Int[Array, "B C"]
    positions: Int[Array, "B C"]


@flax.struct.dataclass
class Query:
    """Which numbers of a block of logits are wanted, besides the usual ones.

    Attributes:
      targets: the target ids.
      active: tokens that count; the logits of the others may hold anything.
      candidates: further ids, by name, [..., Q].
      seen: asks for `TokenStats.seen`.
    """

    targets: Int[Array, "*n"]
    active: Bool[Array, "*n"]
    candidates: dict[str, Int[Array, "*n Q"]] = flax.struct.field(default_factory=dict)
    seen: SeenQuery | None = None


class Vocabulary(NamedTuple):
    """The static facts of the vocabulary axis: its true size and the soft-cap."""

    size: int
    soft_cap: float | None = None


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
      vocabulary: the true vocabulary size and the soft-cap.
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
    tempered = temperature is not None
    scale = as_float(1.0) if temperature is None else as_float(temperature)
    return _token_statistics(vocabulary, tempered, logits, query, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_statistics(vocabulary, tempered, logits, query, temperature):
    return _forward(vocabulary, tempered, logits, query, temperature)


def _relative_logits(vocabulary: Vocabulary, logits, active, shift=None):
    """Returns logits relative to the largest, which entries count, and the largest."""
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    z = as_float(logits)
    z = jnp.where(active[..., None], z, jnp.zeros_like(z))
    usable = (z != -jnp.inf) & (ids < vocabulary.size)
    if vocabulary.soft_cap is not None:
        z = vocabulary.soft_cap * jnp.tanh(z / vocabulary.soft_cap)
    z = jnp.where(usable, z, -jnp.inf)
    if shift is None:
        shift = jnp.max(z, axis=-1)
        shift = jnp.where(shift == -jnp.inf, jnp.zeros_like(shift), shift)
    return z - shift[..., None], usable, shift, ids


def _pick(z, ids, wanted):
    """Takes z [..., V] at the wanted ids, [...] or [..., Q]."""
    if wanted.ndim == z.ndim:
        # One reduction an id: a broadcast one could leave an array of Q·V behind.
        columns = [_pick(z, ids, wanted[..., q]) for q in range(wanted.shape[-1])]
        return jnp.stack(columns, -1)
    return jnp.sum(jnp.where(ids == wanted[..., None], z, jnp.zeros_like(z)), -1)


def _forward(vocabulary, tempered, logits, query, temperature):
    z, usable, shift, ids = _relative_logits(vocabulary, logits, query.active)
    log_sum = jnp.log(jnp.sum(jnp.exp(z), -1))
    # The largest relative logit is 0; min over the ids avoids a variadic argmax.
    top = jnp.min(jnp.where(z == 0, ids, vocabulary.size), -1)
    others = jnp.where(ids == top[..., None], -jnp.inf, z)
    second = jnp.max(others, -1)
    second = jnp.where(second == -jnp.inf, jnp.zeros_like(second), second)
    rest = jnp.sum(jnp.exp(others - second[..., None]), -1)
    log_rest_sum = jnp.where(rest > 0, jnp.log(rest), _LOG_NOTHING)
    finite = jnp.where(usable, z, jnp.zeros_like(z))
    weighted = jnp.sum(jnp.exp(z) * finite, -1)
    stats = TokenStats(
        shift=shift,
        log_sum=log_sum,
        second=second,
        log_rest_sum=log_rest_sum,
        log_sum_tempered=(
            jnp.log(jnp.sum(jnp.exp(z / temperature), -1)) if tempered else log_sum
        ),
        temperature=temperature,
        target=_pick(z, ids, query.targets),
        total=jnp.sum(finite, -1),
        count=jnp.sum(as_float(usable), -1),
        expected=weighted * jnp.exp(-log_sum),
        top=top,
        is_top=top == query.targets,
        candidates={k: _pick(z, ids, c) for k, c in query.candidates.items()},
        candidate_is_top={k: top[..., None] == c for k, c in query.candidates.items()},
    )
    if query.seen is not None:
        stats = dataclasses.replace(
            stats, seen=_seen_sum(vocabulary, logits, query, stats)
        )
    return stats


def _forward_with_residuals(vocabulary, tempered, logits, query, temperature):
    logits, query, temperature = jax.tree.map(
        lambda primal: primal.value, (logits, query, temperature)
    )
    stats = _forward(vocabulary, tempered, logits, query, temperature)
    return stats, (logits, query, stats)


def _backward(vocabulary, tempered, residuals, cotangents: TokenStats):
    logits, query, stats = residuals
    z, usable, _, ids = _relative_logits(vocabulary, logits, query.active, stats.shift)
    grad = jnp.zeros_like(z)
    for term in _gradient_terms(z, usable, ids, query, stats, cotangents, tempered):
        grad = grad + term
    grad = _through_mask_and_cap(vocabulary, logits, query.active, usable, grad)
    grad = grad.astype(logits.dtype)
    if not is_zero_cotangent(cotangents.seen):
        grad = _add_seen_gradient(vocabulary, logits, query, stats, cotangents, grad)
    return grad, None, _temperature_gradient(z, usable, stats, cotangents, tempered)


def _through_mask_and_cap(vocabulary, logits, active, usable, grad):
    if vocabulary.soft_cap is not None:
        kept = jnp.where(active[..., None], as_float(logits), jnp.zeros_like(grad))
        grad = grad * (1 - jnp.tanh(kept / vocabulary.soft_cap) ** 2)
    return jnp.where(usable & active[..., None], grad, jnp.zeros_like(grad))


def is_zero_cotangent(cotangent: object) -> bool:
    """Says whether a cotangent is known, while tracing, to be zero."""
    return cotangent is None or isinstance(cotangent, SymbolicZero)


def _gradient_terms(z, usable, ids, query, stats, cotangents, tempered):
    """Yields the parts of d/dz; a cotangent known to be zero costs nothing."""
    p = jnp.exp(z - stats.log_sum[..., None])
    if not is_zero_cotangent(cotangents.log_sum):
        yield cotangents.log_sum[..., None] * p
    if not is_zero_cotangent(cotangents.log_sum_tempered):
        scale = stats.temperature if tempered else jnp.ones_like(stats.temperature)
        tempered_p = jnp.exp(z / scale - stats.log_sum_tempered[..., None])
        yield (cotangents.log_sum_tempered / scale)[..., None] * tempered_p
    if not is_zero_cotangent(cotangents.log_rest_sum):
        q = _rest_probabilities(z, ids == stats.top[..., None], stats)
        yield cotangents.log_rest_sum[..., None] * q
    if not is_zero_cotangent(cotangents.expected):
        finite = jnp.where(usable, z, jnp.zeros_like(z))
        excess = 1 + finite - stats.expected[..., None]
        yield cotangents.expected[..., None] * p * excess
    if not is_zero_cotangent(cotangents.total):
        yield jnp.broadcast_to(cotangents.total[..., None], z.shape)
    if not is_zero_cotangent(cotangents.target):
        yield _place(ids, query.targets, cotangents.target)
    for name, cotangent in cotangents.candidates.items():
        if not is_zero_cotangent(cotangent):
            wanted = query.candidates[name]
            for q in range(wanted.shape[-1]):
                yield _place(ids, wanted[..., q], cotangent[..., q])


def _rest_probabilities(z, is_top, stats):
    """The softmax over the classes but the largest; 0 where no other is possible."""
    possible = stats.log_rest_sum > _LOG_NOTHING
    log_sum = jnp.where(possible, stats.log_rest_sum, 0.0)[..., None]
    other = ~is_top & possible[..., None]
    log_q = (z - stats.second[..., None]) - log_sum
    return jnp.exp(jnp.where(other, log_q, -jnp.inf))


def _place(ids, wanted, value):
    value = value[..., None]
    return jnp.where(ids == wanted[..., None], value, jnp.zeros_like(value))


def _temperature_gradient(z, usable, stats, cotangents, tempered):
    zero = jnp.zeros_like(stats.temperature)
    direct = cotangents.temperature
    grad = zero if is_zero_cotangent(direct) else direct
    if not tempered or is_zero_cotangent(cotangents.log_sum_tempered):
        return grad
    log_p = z / stats.temperature - stats.log_sum_tempered[..., None]
    finite = jnp.where(usable, z, jnp.zeros_like(z))
    mean = jnp.sum(jnp.exp(log_p) * finite, -1)
    return grad - jnp.sum(cotangents.log_sum_tempered * mean) / stats.temperature**2


_token_statistics.defvjp(_forward_with_residuals, _backward, symbolic_zeros=True)


def chunk_length(batch: int, length: int) -> int:
    """Chooses how many tokens of each row are handled at a time."""
    return min(length, max(1, _TOKENS_PER_CHUNK // batch))


def _seen_odds(vocabulary, logits, query, stats, start, size):
    """For one chunk: its relative logits, p, and which classes are charged."""

    def cut(x):
        return lax.dynamic_slice_in_dim(x, start, size, 1)

    local = jax.tree.map(
        cut, dataclasses.replace(stats, temperature=stats.shift, seen=None)
    )
    z, usable, _, ids = _relative_logits(
        vocabulary, cut(logits), cut(query.active), local.shift
    )
    seen = query.seen
    charged = seen_before(
        seen.history, cut(seen.segments), cut(seen.positions), z.shape[-1]
    )
    charged &= usable & (ids != cut(query.targets)[..., None])
    p = jnp.exp(z - local.log_sum[..., None])
    is_top = ids == local.top[..., None]
    return local, z, usable, p, charged & ~is_top, charged & is_top, is_top


def _seen_sum(vocabulary, logits, query, stats):
    batch, length = query.targets.shape
    size = chunk_length(batch, length)

    def body(i, out):
        start = jnp.minimum(i * size, length - size)
        local, _, _, p, rest, top, _ = _seen_odds(
            vocabulary, logits, query, stats, start, size
        )
        p = jnp.where(rest, p, jnp.zeros_like(p))
        charge = jnp.where(jnp.any(top, -1), local.log_sum - local.log_rest, 0.0)
        value = charge - jnp.sum(jnp.log1p(-p), -1)
        return lax.dynamic_update_slice_in_dim(out, value, start, 1)

    zeros = jnp.zeros_like(stats.log_sum)
    return lax.fori_loop(0, -(-length // size), body, zeros)


def _add_seen_gradient(vocabulary, logits, query, stats, cotangents, grad):
    batch, length = query.targets.shape
    size = chunk_length(batch, length)

    def body(i, grad):
        start = jnp.minimum(i * size, length - size)
        local, z, usable, p, rest, top, is_top = _seen_odds(
            vocabulary, logits, query, stats, start, size
        )
        odds = jnp.where(rest, p / jnp.where(rest, 1 - p, jnp.ones_like(p)), 0.0)
        part = odds - p * jnp.sum(odds, -1, keepdims=True)
        q = _rest_probabilities(z, is_top, local)
        p_top = jnp.exp(-local.log_sum)[..., None]
        pull = p_top * (as_float(is_top) - q)
        part += jnp.where(jnp.any(top, -1, keepdims=True), pull, jnp.zeros_like(pull))

        def cut(x):
            return lax.dynamic_slice_in_dim(x, start, size, 1)

        # The last chunk may overlap the one before it.
        fresh = start + lax.iota(jnp.int32, size) >= i * size
        part *= jnp.where(fresh[None, :], cut(cotangents.seen), 0.0)[..., None]
        part = _through_mask_and_cap(
            vocabulary, cut(logits), cut(query.active), usable, part
        )
        updated = cut(grad) + part.astype(grad.dtype)
        return lax.dynamic_update_slice_in_dim(grad, updated, start, 1)

    return lax.fori_loop(0, -(-length // size), body, grad)
