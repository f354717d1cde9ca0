"""A kernel for GPUs, in Pallas's Mosaic GPU, of a product and all of its sums.

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
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from ava_jax.kernel.collectives import first_id
from ava_jax.kernel.gradient import bounded
from ava_jax.kernel.logits import has_padding, raw_logits
from ava_jax.kernel.platforms import OLDEST_JAX
from ava_jax.kernel.product import Product
from ava_jax.kernel.stats import Query, Vocabulary
from ava_jax.kernel.summary import tempered_sums
from ava_jax.reduce import as_float, float_dtype

# A program has two groups of warps that compute, each the tile of some rows, and one
# that copies operands. Of these there are three steps in shared memory (147 KB), beside
# the exponentials (64 KB).
_GROUPS, _STEPS = 2, 3
_ROWS, _COLUMNS, _FEATURES = 64, 256, 64
_TILE_ROWS = _GROUPS * _ROWS
# Arrays are copied in pieces of this many rows.
_ROWS_TO_COPY = 8
_REGISTERS_TO_COPY = 40


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
      queried: the columns of the ids of the query.
      is_here: whether a tile has one of them, for each of them.
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
    is_here: Any


class _Outputs(NamedTuple):
    """The arrays that programs write.

    Attributes:
      at_ids: for each id of the query and tile, the logits if the tile has any of them.
      sums: by name, the sums of each tile's columns.
      exponentials: of all logits, or None.
    """

    at_ids: Any
    sums: Any
    exponentials: Any


def can_multiply(kernel: Float[Array, "*k D W"]) -> bool:
    """Returns whether a projection's tiles can be copied: of multiples of 64."""
    return not any(size % _FEATURES for size in kernel.shape[-2:])


def multiply_and_sum(
    product: Product,
    vocabulary: Vocabulary,
    query: Query,
    columns: Int[Array, "N K"],
    temperature: Float[Array, ""] | None,
    shift: Float[Array, "N"],
    *,
    writes_exponentials: bool,
    interpret: Any = None,
) -> Tiled:
    """Computes a product and its sums.

    Args:
      product: with operands of bfloat16; the logits have no soft-cap.
      vocabulary: the static facts.
      query: the query.
      columns: the columns of its ids.
      temperature: T, or None for 1.
      shift: what the sums are relative to.
      writes_exponentials: whether to return the exponentials.
      interpret: parameters of Pallas's interpreter, to run it without a GPU.

    Raises:
      RuntimeError: an older JAX.
    """
    if jax.__version_info__ < OLDEST_JAX:
        raise RuntimeError(
            f"implementation='mosaic_gpu' needs JAX 0.10.2 or newer, and this is "
            f"{jax.__version__}: update it, or leave the implementation out"
        )
    inputs = _inputs_of(product, vocabulary, query, columns, temperature, shift)
    count, width = product.hidden.shape[0], product.width
    rows = inputs.hidden.shape[0]
    _, down, across = inputs.is_here.shape
    names = ["total", "before", "largest", "exp_sum", "expected"]
    if temperature is not None:
        names += ["tempered", "tempered_moment"][: 1 + query.tempered_entropy]
    sums = jax.ShapeDtypeStruct((across, down * _TILE_ROWS), float_dtype())
    out = _Outputs(
        [sums for _ in inputs.queried],
        dict.fromkeys(names, sums),
        jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)
        if writes_exponentials
        else None,
    )
    found = _call(vocabulary, query, inputs, out, interpret)
    reduced = {
        name: (jnp.max if name in ("largest", "before") else jnp.sum)(x, 0)[:count]
        for name, x in found.sums.items()
    }
    largest, before = reduced.pop("largest"), reduced.pop("before")
    at_ids = _of_ids(found.at_ids, columns, width)
    exponentials = found.exponentials
    if exponentials is not None:
        exponentials = exponentials[:count]
    return Tiled(at_ids, reduced, largest, before, exponentials)


def _inputs_of(
    product: Product, vocabulary: Vocabulary, query: Query, columns, temperature, shift
) -> _Inputs:
    """Returns what programs read, with a number per row of every tile."""
    rows, width = product.hidden.shape[0], product.width
    down, across = pl.cdiv(rows, _TILE_ROWS), pl.cdiv(width, _COLUMNS)

    def pad(x, fill):
        return jnp.pad(x, (0, down * _TILE_ROWS - rows), constant_values=fill)

    def one(x):
        return None if x is None else as_float(x).reshape(1)

    missing = -rows % _ROWS_TO_COPY
    first = jnp.asarray(first_id(vocabulary.axis, width), jnp.int32)
    queried = [pad(x, -1) for x in columns.T]
    tiles = jnp.stack(queried).reshape(-1, down, _TILE_ROWS, 1) // _COLUMNS
    is_here = jnp.any(tiles == jnp.arange(across, dtype=jnp.int32), 2)
    return _Inputs(
        hidden=jnp.pad(product.hidden, ((0, missing), (0, 0))),
        kernel=product.kernel,
        bias=None if product.bias is None else as_float(product.bias),
        scale=one(product.scale),
        temperature=one(temperature),
        first=first.reshape(1),
        shift=pad(shift, 0),
        targets=pad(query.targets, 0),
        queried=queried,
        is_here=is_here.astype(jnp.int32),
    )


def _of_ids(tiles: list[Array], columns: Int[Array, "N K"], width: int):
    """Returns the logits at ids from those of the tiles that hold them."""
    rows = lax.iota(jnp.int32, columns.shape[0])
    is_own = (columns >= 0) & (columns < width)
    tile = jnp.where(is_own, columns, 0) // _COLUMNS
    taken = [x[tile[:, k], rows] for k, x in enumerate(tiles)]
    at_ids = jnp.where(is_own, jnp.stack(taken, -1), 0.0)
    # Of equal ids only the first one's logit is known.
    is_same = columns[:, :, None] == columns[:, None, :]
    return jnp.max(jnp.where(is_same, at_ids[:, None], -jnp.inf), -1)


def _call(
    vocabulary: Vocabulary, query: Query, inputs: _Inputs, out: _Outputs, interpret
) -> _Outputs:
    """Runs the kernel."""
    given, structure = jax.tree.flatten(inputs)
    wanted, results = jax.tree.flatten(out)

    def product_and_sums(*refs):
        sources, targets = refs[: len(given)], refs[len(given) :][: len(wanted)]
        _run(
            vocabulary,
            query,
            structure.unflatten(sources),
            results.unflatten(targets),
            _Shared(*refs[len(given) + len(wanted) :]),
        )

    down, across = inputs.is_here.shape[1:]
    tile = (_GROUPS, _ROWS, _COLUMNS)
    shared = _Shared(
        shift=plgpu.SMEM((_GROUPS, _ROWS), float_dtype()),
        targets=plgpu.SMEM((_GROUPS, _ROWS), jnp.int32),
        queried=plgpu.SMEM((len(out.at_ids), _GROUPS, _ROWS), jnp.int32),
        bias=plgpu.SMEM((_GROUPS, _COLUMNS), float_dtype()),
        sums=plgpu.SMEM((_GROUPS, len(out.sums), _ROWS), float_dtype()),
        tile=plgpu.SMEM(tile, jnp.bfloat16, transforms=_transforms()),
        is_copied=plgpu.Barrier(num_arrivals=1, num_barriers=_GROUPS),
    )
    options = {} if interpret is None else {"interpret": interpret}
    kernel = plgpu.kernel(
        product_and_sums,
        out_type=wanted,
        grid=(down * across,),
        grid_names=("tile",),
        num_threads=_GROUPS + 1,
        thread_name="group",
        scratch_types=shared,
        **options,
    )
    return results.unflatten(kernel(*given))


class _Shared(NamedTuple):
    """Shared memory of a program, a part of it for each group.

    What is copied to is read by warps at their own pace, and never copied to again.

    Attributes:
      shift: what the sums are relative to.
      targets: the target ids.
      queried: for each id of the query, its columns.
      bias: that of the tile's columns.
      sums: those of the tile; before, the logits at an id in place of the first.
      tile: its exponentials.
      is_copied: says when something has been read.
    """

    shift: Any
    targets: Any
    queried: Any
    bias: Any
    sums: Any
    tile: Any
    is_copied: Any


def _transforms():
    """Returns how tiles of bfloat16 lie in shared memory."""
    return plgpu.TilingTransform((8, _FEATURES)), plgpu.SwizzleTransform(128)


def _run(
    vocabulary: Vocabulary, query: Query, inputs: _Inputs, out: _Outputs, shared
) -> None:
    """Computes one tile; a program of the kernel."""
    down = inputs.is_here.shape[1]
    # Programs that run together share columns of the projection, which is large.
    number = lax.axis_index("tile")
    row, column = lax.rem(number, down), lax.div(number, down)
    group = lax.axis_index("group")

    def add(_, left, right, total):
        own = left.at[pl.ds(group * _ROWS, _ROWS)]
        plgpu.wgmma(total, own, right)
        plgpu.wgmma_wait(1)
        return total

    def finish(multiply):
        def made(total):
            multiply(total)
            return total[...]

        z = pl.run_scoped(
            made, plgpu.WGMMAAccumulatorRef((_ROWS, _COLUMNS), float_dtype())
        )
        tile = _Tile(row, column, group, shared)
        _sum_up(tile, z, vocabulary, query, inputs, out)

    def operand(shape, index):
        return plgpu.BlockSpec(shape, index, transforms=_transforms(), delay_release=1)

    plgpu.emit_pipeline_warp_specialized(
        add,
        grid=(pl.cdiv(inputs.hidden.shape[1], _FEATURES),),
        memory_registers=_REGISTERS_TO_COPY,
        in_specs=[
            operand((_TILE_ROWS, _FEATURES), lambda step: (row, step)),
            operand((_FEATURES, _COLUMNS), lambda step: (step, column)),
        ],
        wg_axis="group",
        num_compute_wgs=_GROUPS,
        max_concurrent_steps=_STEPS,
        compute_context=finish,
    )(inputs.hidden, inputs.kernel)


class _Tile(NamedTuple):
    """Which tile a group computes.

    Attributes:
      row: that of the program, in tiles.
      column: likewise.
      group: the group.
      shared: the program's shared memory.
    """

    row: Any
    column: Any
    group: Any
    shared: _Shared

    @property
    def rows(self):
        """The rows, to index an array with."""
        return pl.ds(self.row * _TILE_ROWS + self.group * _ROWS, _ROWS)

    @property
    def columns(self):
        """The columns, to index an array with."""
        return pl.ds(self.column * _COLUMNS, _COLUMNS)

    def load(self, source, place, axis: int):
        """Reads a vector, by way of shared memory, as one along an axis of the tile."""
        is_copied = self.shared.is_copied.at[self.group]
        plgpu.copy_gmem_to_smem(source, place.at[self.group], is_copied)
        plgpu.barrier_wait(is_copied)
        layout = plgpu.Layout.WGMMA.reduce(1 - axis)
        vector = plgpu.layout_cast(place[self.group], layout)
        return lax.broadcast_in_dim(vector, (_ROWS, _COLUMNS), (axis,))


def _sum_up(
    tile: _Tile, z, vocabulary: Vocabulary, query: Query, inputs: _Inputs, out: _Outputs
) -> None:
    """Writes the sums of a tile, and its exponentials."""
    shared, group, width = tile.shared, tile.group, inputs.kernel.shape[1]
    if inputs.bias is not None:
        z = z + tile.load(inputs.bias.at[tile.columns], shared.bias, 1)
    if inputs.scale is not None:
        z = z * inputs.scale[0]
    index = plgpu.broadcasted_iota(jnp.int32, z.shape, 1, layout=plgpu.Layout.WGMMA)
    index = index + tile.column * _COLUMNS
    ids = index + inputs.first[0]
    if has_padding(vocabulary, width):
        z = raw_logits(vocabulary, z, ids)
    if width % _COLUMNS:
        z = jnp.where(index < width, z, -jnp.inf)
    shift = tile.load(inputs.shift.at[tile.rows], shared.shift, 0)
    targets = tile.load(inputs.targets.at[tile.rows], shared.targets, 0)
    sums = {
        "total": jnp.sum(jnp.where(z != -jnp.inf, z - shift, 0.0), 1),
        "before": jnp.max(jnp.where(ids < targets, z, -jnp.inf), 1),
    }
    for k in range(len(inputs.queried)):
        own = inputs.queried[k], shared.queried.at[k], out.at_ids[k]
        take = functools.partial(_take_out, tile, index, *own)
        # Few tiles hold the id of any of their rows.
        is_here = inputs.is_here[k, tile.row, tile.column] != 0
        z = lax.cond(is_here, take, lambda z: z, z)
    relative = z - shift
    e = jnp.exp(relative)
    sums["largest"] = jnp.max(z, 1)
    sums["exp_sum"] = jnp.sum(e, 1)
    sums["expected"] = jnp.sum(e * bounded(relative), 1)
    temperature = None if inputs.temperature is None else inputs.temperature[0]
    tempered = tempered_sums(query, relative, temperature, 1)
    sums |= {name: x for name, x in tempered.items() if x is not None}
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for k, name in enumerate(out.sums):
        shared.sums[group, k] = sums[name]
    if out.exponentials is not None:
        shared.tile[group] = e.astype(jnp.bfloat16)
    plgpu.commit_smem()
    for k, place in enumerate(out.sums.values()):
        plgpu.copy_smem_to_gmem(
            shared.sums.at[group, k], place.at[tile.column, tile.rows]
        )
    if out.exponentials is not None:
        place = out.exponentials.at[tile.rows, tile.columns]
        plgpu.copy_smem_to_gmem(shared.tile.at[group], place)
    plgpu.wait_smem_to_gmem(0)


def _take_out(tile: _Tile, index, queried, copied, place, z):
    """Writes the logits of an id per row, and makes them −inf."""
    is_own = index == tile.load(queried.at[tile.rows], copied, 0)
    taken = tile.shared.sums.at[tile.group, 0]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    taken[...] = jnp.sum(jnp.where(is_own, z, 0.0), 1)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(taken, place.at[tile.column, tile.rows])
    return jnp.where(is_own, -jnp.inf, z)
