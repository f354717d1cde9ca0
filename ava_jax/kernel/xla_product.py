"""The kernel for TPUs and GPUs: all sums in one pass.

They are relative to a number near the row max. On a TPU the pass is part of the product
that computes the logits; it also reads logits that are given, or that were written.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ava_jax.kernel import xla
from ava_jax.kernel.collectives import (
    add_scalar,
    add_up,
    first_id,
    max_over_shards,
)
from ava_jax.kernel.logits import (
    capped,
    column_ids,
    columns_of,
    has_padding,
    ids_of,
    is_class,
    pick,
    raw_logits,
)
from ava_jax.kernel.product import Given, Product, finished
from ava_jax.kernel.rounded import Exponentials
from ava_jax.kernel.stats import Query, TokenStats, Vocabulary
from ava_jax.kernel.summary import (
    first_of,
    is_first,
    plain_sums,
    summarize,
    tempered_sums,
    with_queried,
)
from ava_jax.reduce import as_float

# The range of (row max − shift) / min(T, 1) for which a shift is accepted: exponentials
# are far from the limits of float32, and the rounding of the difference is small.
_LOWEST_SHIFT, _HIGHEST_SHIFT = -20.0, 60.0


def reduce(
    product: Product | Given,
    query: Query,
    vocabulary: Vocabulary,
    temperature: Float[Array, ""] | None,
    *,
    keep: Literal["logits", "exponentials"] | None = None,
) -> tuple[TokenStats, Float[Array, "*n W"] | Exponentials | None]:
    """Computes the statistics of a block in one pass.

    The sums leave out ids of the query, whose logits are then added one by one: this
    makes `log(1 − p)` of each exact in one pass. If the logits are in memory before
    their sums are computed, that is the id of the query with the largest logit, else
    all of its ids. All sums are relative to a number near the row max. Where that turns
    out to be too far off, they are recomputed relative to the row max itself, and on a
    TPU the product with them.

    Args:
      product: the logits, or what computes them.
      query: per token.
      vocabulary: the static facts.
      temperature: T, or None for 1.
      keep: what to return of the block for the gradient. Exponentials require the
        layout by columns or `by_mosaic`, and at most `xla.MOST_COMPARED` ids.

    Returns:
      The statistics, and what `keep` says, where the logits are the product's alone,
      without bias and scale. `top` is exact where it is one of the ids of the query,
      and `NOT_QUERIED` elsewhere.
    """
    few = ids_of(query).shape[-1] <= xla.MOST_COMPARED
    by_mosaic = product.by_mosaic and keep != "logits"
    if isinstance(product, Product) and few and (product.by_columns or by_mosaic):
        read = _with_product(product, vocabulary, query, temperature, keep)
    else:
        read = _from_memory(product, vocabulary, query, temperature)
    made, sums = read.made, read.sums
    if "count" not in sums:
        sums["count"] = _count_possible(product, vocabulary)
    row_sums = with_queried(
        sums,
        made.maxima,
        made.shift,
        read.at_ids,
        read.is_left_out,
        query,
        vocabulary,
        temperature,
    )
    given = jnp.ones_like(as_float(1.0)) if temperature is None else temperature
    kept = None if made.logits is None else product.by_token(made.logits)
    if made.rounded is not None:
        kept = Exponentials(product.by_token(made.rounded), made.shift)
    return summarize(row_sums, query, given), kept


class _Read(NamedTuple):
    """What is known of a block.

    Attributes:
      made: the block and its sums.
      sums: those of all shards.
      at_ids: the logits at the queried ids; −inf where there is no such class.
      is_left_out: marks the ids that the sums leave out.
    """

    made: "_Made"
    sums: dict[str, Any]
    at_ids: Float[Array, "*n K"]
    is_left_out: Bool[Array, "*n K"]


def _with_product(
    product: Product, vocabulary: Vocabulary, query: Query, temperature, keep
) -> _Read:
    """Computes the sums within the product."""
    ids = ids_of(query)
    request = _Request(
        query=query,
        columns=columns_of(vocabulary.axis, ids, product.width),
        temperature=temperature,
        writes_logits=keep == "logits",
        writes_exponentials=keep == "exponentials",
    )
    made = _make(product, vocabulary, request)
    at_ids = made.at_ids
    if at_ids is None:
        at_ids = _pick(product, vocabulary, made.logits, ids)
    sums, at_ids = add_up(vocabulary.axis, (made.sums, at_ids), 1)
    at_ids = _where_class(vocabulary, query, at_ids)
    return _Read(made, sums, at_ids, is_first(ids))


def _from_memory(
    product: Product | Given, vocabulary: Vocabulary, query: Query, temperature
) -> _Read:
    """Computes the sums of logits that are in memory before."""
    logits, ids = product.make(), ids_of(query)
    lead = query.targets.ndim
    at_ids = _pick(product, vocabulary, logits, ids)
    at_ids = _where_class(vocabulary, query, add_up(vocabulary.axis, at_ids, lead))
    best = jnp.max(at_ids, -1, keepdims=True)
    left_out = first_of(ids, at_ids == best)[..., None]
    request = _Request(
        query=query,
        columns=columns_of(vocabulary.axis, left_out, product.width),
        temperature=temperature,
        writes_logits=True,
        writes_exponentials=False,
    )

    def sum_up(shift: Array) -> _Made:
        # Otherwise XLA hoists the maxima out of the loop: another pass over the logits.
        read, shift = lax.optimization_barrier((logits, shift))
        return _sum_up(product, vocabulary, read, shift, request)

    made = _until_near(product, vocabulary, sum_up)._replace(logits=logits)
    sums = add_up(vocabulary.axis, made.sums, lead)
    # Comparing every id with every other would be slow if there are hundreds.
    index = jnp.argmax(ids == left_out, -1, keepdims=True).astype(jnp.int32)
    return _Read(made, sums, at_ids, column_ids(ids) == index)


def _pick(product: Product | Given, vocabulary: Vocabulary, made, ids):
    """Returns the raw logits at ids; 0 for ids of other shards."""
    picked = pick(vocabulary, product.by_token(made), ids, bias=product.bias)
    return finished(picked, None, product.scale)


def _where_class(vocabulary: Vocabulary, query: Query, at_ids):
    """Replaces logits by −inf where there is no class, or the token is masked."""
    # The logits of masked tokens may hold anything.
    exists = is_class(vocabulary, ids_of(query)) & query.active[..., None]
    return jnp.where(exists, at_ids, -jnp.inf)


class _Request(NamedTuple):
    """What to compute of a block.

    Attributes:
      query: the query.
      columns: the columns of its ids.
      temperature: T, or None for 1.
      writes_logits: whether to write the logits to memory; otherwise those at the
        queried ids are extracted by sums.
      writes_exponentials: whether to write the exponentials to memory.
    """

    query: Query
    columns: Int[Array, "*n K"]
    temperature: Float[Array, ""] | None
    writes_logits: bool
    writes_exponentials: bool


class _Made(NamedTuple):
    """A block and the sums over it.

    Attributes:
      logits: the block, as `Product.make` returns it, if it is written.
      rounded: its exponentials in bfloat16, if they are written.
      sums: over this shard's classes that are not queried.
      at_ids: the logits at the queried ids, unless all logits are written; 0 for ids of
        other shards.
      maxima: of raw logits: the largest one that is not queried, and the largest one at
        an id below the target.
      shift: the shift that the sums should have.
      is_off: whether they have another one.
    """

    logits: Float[Array, "..."] | None
    rounded: Float[Array, "..."] | None
    sums: dict[str, Any]
    at_ids: Float[Array, "*n K"] | None
    maxima: Float[Array, "2 *n"]
    shift: Float[Array, "*n"]
    is_off: Bool[Array, ""]


def _count_possible(
    product: Product | Given, vocabulary: Vocabulary
) -> Float[Array, ""]:
    """Counts the classes of all shards that are not made impossible by the bias."""
    if product.bias is None:
        return as_float(vocabulary.size)
    bias = raw_logits(vocabulary, product.bias)
    return add_scalar(vocabulary.axis, jnp.sum(as_float(bias != -jnp.inf)))


def _until_near(
    product: Product | Given, vocabulary: Vocabulary, turn: Callable[[Array], _Made]
) -> _Made:
    """Computes the sums relative to a shift; twice if the first was too far off."""
    near = finished(product.near, None, product.scale)
    near = capped(vocabulary, max_over_shards(vocabulary.axis, near))
    shapes = jax.eval_shape(turn, near)
    start = jax.tree.map(lambda x: lax.empty(x.shape, x.dtype), shapes)
    start = start._replace(shift=near, is_off=jnp.ones_like(shapes.is_off))
    return lax.while_loop(
        lambda made: made.is_off, lambda made: turn(made.shift), start
    )


def _make(product: Product, vocabulary: Vocabulary, request: _Request) -> _Made:
    """Computes a block together with its sums."""

    def make_again(shift: Array) -> _Made:
        # Otherwise XLA would hoist the product, a loop invariant, out of the loop.
        hidden, shift = lax.optimization_barrier((product.hidden, shift))
        logits = dataclasses.replace(product, hidden=hidden).make()
        made = _sum_up(product, vocabulary, logits, shift, request)
        return made._replace(logits=logits) if request.writes_logits else made

    def make_tiles(shift: Array) -> _Made:
        # Most programs have no use for Mosaic GPU, which takes long to import.
        from ava_jax.kernel import mosaic_gpu

        found = mosaic_gpu.multiply_and_sum(
            product,
            vocabulary,
            request.query,
            request.columns,
            request.temperature,
            shift,
            writes_exponentials=request.writes_exponentials,
        )
        maxima = jnp.stack([found.largest, found.before])
        own = found.exponentials, found.sums, found.at_ids
        return _judged(vocabulary, request, shift, maxima, *own)

    turn = make_tiles if product.by_mosaic else make_again
    return _until_near(product, vocabulary, turn)


class _Rows(NamedTuple):
    """The logits of a block, whose rows may be split into parts of equal length.

    Attributes:
      logits: [*n, W], or [*n, parts, W / parts].
      columns: the column of each.
      axis: that of classes.
      is_split: whether rows are split.
    """

    logits: Float[Array, "..."]
    columns: Int[Array, "..."]
    axis: int
    is_split: bool

    @staticmethod
    def of(logits: Float[Array, "..."], axis: int, parts: int) -> "_Rows":
        """Splits rows, unless the logits are laid out by columns."""
        axis %= logits.ndim
        columns = lax.broadcasted_iota(jnp.int32, logits.shape, axis)
        if parts == 1 or axis != logits.ndim - 1 or logits.shape[-1] % parts:
            return _Rows(logits, columns, axis, is_split=False)
        logits, columns = (
            x.reshape(*x.shape[:-1], parts, -1) for x in (logits, columns)
        )
        return _Rows(logits, columns, axis + 1, is_split=True)

    def spread(self, x: Array) -> Array:
        """Returns a number per token in a shape that is broadcast over classes."""
        return jnp.expand_dims(x, (-2, -1) if self.is_split else self.axis)

    def whole(self, sums: dict[str, Any], maxima: Array):
        """Returns the sums and maxima of whole rows, given those of their parts."""
        if not self.is_split:
            return sums, maxima
        # Otherwise XLA would join the parts before it reduces them.
        sums, maxima = lax.optimization_barrier((sums, maxima))
        return jax.tree.map(lambda x: jnp.sum(x, -1), sums), jnp.max(maxima, -1)


def _sum_up(
    product: Product | Given, vocabulary: Vocabulary, made, shift, request: _Request
) -> _Made:
    """Sums over this shard's classes except the queried ones, in one pass.

    Args:
      product: what makes the logits.
      vocabulary: the static facts.
      made: what it has made.
      shift: what the sums are relative to, [N].
      request: what to compute.
    """
    rows = _Rows.of(product.finish(made), product.class_axis, vocabulary.parts)
    logits, every, spread, axis = rows.logits, rows.columns, rows.spread, rows.axis
    ids = every + first_id(vocabulary.axis, product.width)
    is_padded = has_padding(vocabulary, product.width)
    raw = raw_logits(vocabulary, logits, ids) if is_padded else as_float(logits)
    columns = jnp.moveaxis(request.columns, -1, 0)
    hits = [every == spread(column) for column in columns]

    def not_queried(terms, fill):
        """Replaces the terms of the queried classes by a constant."""
        filled = jnp.full_like(terms, fill)
        return jnp.where(functools.reduce(jnp.logical_or, hits), filled, terms)

    z = capped(vocabulary, raw)
    relative = z - spread(shift)
    exponentials = jnp.exp(relative)
    e = not_queried(exponentials, 0.0)
    is_all = not is_padded and (vocabulary.finite or not product.has_holes)
    sums = plain_sums(is_all, z, relative, e, axis)
    sums["exp_sum"] = jnp.sum(e, axis)
    if isinstance(product, Given):
        sums["count"] = jnp.sum(as_float(z != -jnp.inf), axis)
    keep = functools.partial(not_queried, fill=0.0)
    sums |= tempered_sums(request.query, relative, request.temperature, axis, keep)
    at_ids = rounded = None
    if not request.writes_logits:
        masked = [jnp.where(hit, raw, jnp.zeros_like(raw)) for hit in hits]
        at_ids = jnp.stack([jnp.sum(x, axis) for x in masked], -1)
    if request.writes_exponentials:
        rounded = exponentials.astype(jnp.bfloat16)
    largest = jnp.max(not_queried(raw, -jnp.inf), axis)
    is_before = ids < spread(request.query.targets)
    before = jnp.max(jnp.where(is_before, raw, jnp.full_like(raw, -jnp.inf)), axis)
    sums, maxima = rows.whole(sums, jnp.stack([largest, before]))
    if isinstance(product, Given):
        # Those of masked tokens may hold anything.
        maxima = jnp.where(request.query.active, maxima, -jnp.inf)
    return _judged(vocabulary, request, shift, maxima, rounded, sums, at_ids)


def _judged(
    vocabulary: Vocabulary, request: _Request, shift, maxima, rounded, sums, at_ids
) -> _Made:
    """Finds out whether the sums are relative to a number that is near enough."""
    maxima = max_over_shards(vocabulary.axis, maxima)
    shift, is_off = _next_shift(vocabulary, shift, maxima[0], request.temperature)
    return _Made(None, rounded, sums, at_ids, maxima, shift, is_off)


def _next_shift(vocabulary: Vocabulary, shift, largest, temperature):
    """Returns the shift that the sums should have, and whether it differs anywhere."""
    steepest = as_float(1.0)
    if temperature is not None:
        steepest = jnp.maximum(steepest, 1 / temperature)
    largest = capped(vocabulary, largest)
    distance = (largest - shift) * steepest
    is_off = (distance < _LOWEST_SHIFT) | (distance > _HIGHEST_SHIFT)
    is_off &= largest != -jnp.inf
    return jnp.where(is_off, largest, shift), jnp.any(is_off)
