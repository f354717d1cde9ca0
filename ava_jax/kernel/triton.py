"""A kernel for GPUs, in Triton, of a product and all of its sums.

XLA's products on a GPU compute no sums, so their logits are written in float32, and
read once for the sums and once for the gradient. Here each program computes a tile of
the logits and sums it up; what is written is the exponentials in bfloat16, or nothing.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from ava_jax.kernel.collectives import first_id
from ava_jax.kernel.gradient import bounded
from ava_jax.kernel.logits import has_padding, raw_logits
from ava_jax.kernel.product import Product, finished
from ava_jax.kernel.stats import Query, Vocabulary
from ava_jax.kernel.summary import tempered_sums
from ava_jax.reduce import float_dtype

# The tile of a program, and the features that it multiplies at a time. With these, an
# A100 and an H100 keep three steps of operands in shared memory (147 KB).
ROWS, COLUMNS, FEATURES = 128, 256, 64
_WARPS, _STAGES = 8, 3


class Tiled(NamedTuple):
    """What is known of a product from its tiles.

    Attributes:
      at_ids: the logits at the queried ids, 0 for ids of other shards.
      sums: over the classes that are not queried, by name; `total` is over all.
      largest: the largest logit that is not queried.
      before: the largest logit at an id below the target.
      exponentials: in bfloat16, if requested; 0 at the queried ids.
    """

    at_ids: Float[Array, "N K"]
    sums: dict[str, Float[Array, "N"]]
    largest: Float[Array, "N"]
    before: Float[Array, "N"]
    exponentials: Float[Array, "N W"] | None


class _Inputs(NamedTuple):
    """The arrays that programs read; numbers are vectors of one element.

    Attributes:
      hidden: the hidden states.
      kernel: the projection.
      bias: its bias, or None.
      scale: what its products are multiplied by, or None.
      temperature: T, or None.
      first: the id of the first column.
      shift: what the sums are relative to.
      targets: the target ids.
      queried: for each id of the query, its column.
    """

    hidden: Any
    kernel: Any
    bias: Any
    scale: Any
    temperature: Any
    first: Any
    shift: Any
    targets: Any
    queried: Any


class _Outputs(NamedTuple):
    """The arrays that programs write.

    Attributes:
      at_ids: for each id of the query, its logit.
      sums: by name, the sums of each tile's columns.
      exponentials: of all logits, or None.
    """

    at_ids: Any
    sums: Any
    exponentials: Any


def multiply_and_sum(
    product: Product,
    vocabulary: Vocabulary,
    query: Query,
    columns: Int[Array, "N K"],
    temperature: Float[Array, ""] | None,
    shift: Float[Array, "N"],
    *,
    writes_exponentials: bool,
    interpret: bool = False,
) -> Tiled:
    """Computes a product and its sums.

    Args:
      product: with operands of 16 bits; the logits have no soft-cap.
      vocabulary: the static facts.
      query: the query.
      columns: the columns of its ids.
      temperature: T, or None for 1.
      shift: what the sums are relative to.
      writes_exponentials: whether to return the exponentials.
      interpret: whether to run it without a GPU, to test it.
    """
    rows, width = product.hidden.shape[0], product.width
    first = jnp.asarray(first_id(vocabulary.axis, width), jnp.int32)
    inputs = _Inputs(
        hidden=product.hidden,
        kernel=product.kernel,
        bias=product.bias,
        scale=None if product.scale is None else product.scale.reshape(1),
        temperature=None if temperature is None else temperature.reshape(1),
        first=first.reshape(1),
        shift=shift,
        targets=query.targets,
        queried=list(columns.T),
    )
    names = ["total", "exp_sum", "expected", "largest", "before"]
    if temperature is not None:
        names += ["tempered", "tempered_moment"][: 1 + query.tempered_entropy]
    tiles = pl.cdiv(width, COLUMNS)
    out = _Outputs(
        [_floats(rows) for _ in inputs.queried],
        {name: _floats(tiles, rows) for name in names},
        jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)
        if writes_exponentials
        else None,
    )
    (found,) = pl.pallas_call(
        functools.partial(_run, vocabulary, query),
        grid=(pl.cdiv(rows, ROWS), tiles),
        out_shape=[out],
        # A program writes only the logits of ids in its tile.
        input_output_aliases={k: k for k in range(len(inputs.queried))},
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        name="product_and_sums",
    )([jnp.zeros(rows, float_dtype()) for _ in inputs.queried], inputs)
    largest, before = (jnp.max(found.sums.pop(k), 0) for k in ("largest", "before"))
    sums = {name: jnp.sum(x, 0) for name, x in found.sums.items()}
    at_ids = jnp.stack(found.at_ids, -1)
    # Of equal ids only the first one's logit is known.
    is_same = columns[:, :, None] == columns[:, None, :]
    at_ids = jnp.max(jnp.where(is_same, at_ids[:, None], -jnp.inf), -1)
    return Tiled(at_ids, sums, largest, before, found.exponentials)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, float_dtype())


def _run(vocabulary: Vocabulary, query: Query, _, inputs: _Inputs, out: _Outputs):
    """Computes one tile; a program of the kernel."""
    width = inputs.kernel.shape[1]
    rows = _Span(pl.program_id(0), ROWS, inputs.hidden.shape[0])
    columns = _Span(pl.program_id(1), COLUMNS, width)
    made = _multiply(inputs.hidden, inputs.kernel, rows, columns)
    bias = None if inputs.bias is None else columns.load(inputs.bias)
    scale = None if inputs.scale is None else inputs.scale[0]
    z = finished(made, bias, scale)
    index = lax.broadcasted_iota(jnp.int32, z.shape, 1) + columns.start
    ids = index + inputs.first[0]
    if has_padding(vocabulary, width):
        z = raw_logits(vocabulary, z, ids)
    if columns.mask is not None:
        z = jnp.where(index < width, z, -jnp.inf)
    shift = rows.load(inputs.shift)[:, None]
    is_before = ids < rows.load(inputs.targets)[:, None]
    exists = z != -jnp.inf
    sums = {
        "total": jnp.sum(jnp.where(exists, z - shift, 0.0), 1),
        "before": jnp.max(jnp.where(is_before, z, -jnp.inf), 1),
    }
    for queried, place in zip(inputs.queried, out.at_ids, strict=True):
        z = _take_out(z, index, rows.load(queried), columns, rows, place)
    relative = z - shift
    e = jnp.exp(relative)
    sums["largest"] = jnp.max(z, 1)
    sums["exp_sum"] = jnp.sum(e, 1)
    sums["expected"] = jnp.sum(e * bounded(relative), 1)
    temperature = None if inputs.temperature is None else inputs.temperature[0]
    tempered = tempered_sums(query, relative, temperature, 1)
    sums |= {name: x for name, x in tempered.items() if x is not None}
    for name, place in out.sums.items():
        plt.store(place.at[columns.number, rows.slice], sums[name], mask=rows.mask)
    if out.exponentials is not None:
        place = out.exponentials.at[rows.slice, columns.slice]
        plt.store(place, e.astype(jnp.bfloat16), mask=_both(rows, columns))


def _take_out(z, index, column, columns: "_Span", rows: "_Span", place):
    """Writes the logits of an id per row, if it is in the tile, and makes them −inf."""
    is_here = (column >= columns.start) & (column < columns.end)
    if rows.mask is not None:
        is_here &= rows.mask

    def take(z):
        hit = index == column[:, None]
        taken = jnp.sum(jnp.where(hit, z, 0.0), 1)
        plt.store(place.at[rows.slice], taken, mask=is_here)
        return jnp.where(hit, -jnp.inf, z)

    # Few tiles hold the id of any of their rows.
    return lax.cond(jnp.max(is_here.astype(jnp.int32)) > 0, take, lambda z: z, z)


class _Span:
    """A range of an axis; the last one may reach beyond its end.

    Attributes:
      number: which one.
      size: of a range.
      start: its first index.
      end: the index after its last one on the axis.
      slice: to index an array with.
      mask: which indices are on the axis; None if all ranges are whole.
    """

    def __init__(self, number, size: int, length: int):
        self.number, self.size = number, size
        self.start = number * size
        self.end = jnp.minimum(self.start + size, length)
        self.slice = pl.ds(self.start, size)
        self.mask = None
        if length % size:
            self.mask = (
                lax.broadcasted_iota(jnp.int32, (size,), 0) < length - self.start
            )

    def load(self, ref):
        """Loads the range of a vector; zeros beyond its end."""
        return _load(ref.at[self.slice], self.mask)


def _load(place, mask):
    return place[...] if mask is None else plt.load(place, mask=mask, other=0)


def _both(rows: _Span, columns: _Span):
    """Returns the mask of a tile; None for a whole one."""
    masks = [
        lax.broadcast_in_dim(span.mask, (rows.size, columns.size), (axis,))
        for axis, span in enumerate((rows, columns))
        if span.mask is not None
    ]
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _multiply(hidden, kernel, rows: _Span, columns: _Span) -> Float[Array, "r c"]:
    """Multiplies a tile, a few features at a time."""
    features = hidden.shape[1]

    def add(step, total):
        span = _Span(step, FEATURES, features)
        left = _load(hidden.at[rows.slice, span.slice], _both(rows, span))
        right = _load(kernel.at[span.slice, columns.slice], _both(span, columns))
        return total + lax.dot_general(
            left,
            right,
            (((1,), (0,)), ((), ())),
            preferred_element_type=float_dtype(),
        )

    zeros = jnp.zeros((ROWS, COLUMNS), float_dtype())
    return lax.fori_loop(0, pl.cdiv(features, FEATURES), add, zeros)
