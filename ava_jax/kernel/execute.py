"""Running a pass on the devices of a mesh, or on one device.

On a mesh, every device iterates over its own tokens and its own slice of the
vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike, optimization_barrier
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ava_jax.kernel.chunks import local_gradients, local_sums, local_values
from ava_jax.kernel.passes import (
    Columns,
    Operands,
    Pass,
    Sums,
    TokenFunction,
    is_columns,
    to_width,
)
from ava_jax.kernel.platforms import Implementation, Target, by_platform, platform_of
from ava_jax.kernel.product import sample_columns
from ava_jax.kernel.sharding import Layout
from ava_jax.kernel.sizes import choose_sizes, fuses_gradient, parts_of_row
from ava_jax.kernel.stats import Kernel
from ava_jax.reduce import as_float, float_dtype

# As precise as the exponentials that may be saved instead of the logits.
ROUNDED_OPERANDS = "bfloat16"


class Plan(NamedTuple):
    """The static options of a pass.

    Attributes:
      batch: rows per device, B.
      length: tokens per row and device, S.
      width: logits per token and device.
      itemsize: bytes of a hidden state's element.
      chunk: the user's choice of `Sizes.chunk`.
      block: the user's choice of `Sizes.block`.
      implementation: the kernel's; None selects it by platform.
      layout: how tokens and vocabulary are sharded; None leaves that to XLA.
      precision: of the three products with the projection.
      whole_chunks: whether a CPU's blocks are whole chunks, because the objective
        multiplies by a matrix of its own.
    """

    batch: int
    length: int
    width: int
    itemsize: int = 4
    chunk: int | None = None
    block: int | None = None
    implementation: Implementation | None = None
    layout: Layout | None = None
    precision: PrecisionLike = None
    whole_chunks: bool = False

    def by_reference(self) -> "Plan":
        """Returns the plan of the reference, whose sharding XLA chooses."""
        return self._replace(implementation="reference", layout=None)

    def run(self, function: Callable[..., Any], *operands: Any) -> Any:
        """Calls `function(target, *operands)` with the target of the platform."""
        platform = None if self.layout is None else platform_of(self.layout.mesh)
        return by_platform(self.implementation, platform, function, *operands)


def _flattened(plan: Plan, operands: Operands) -> tuple[Plan, Operands]:
    """Joins a device's rows to one, so that its unmasked tokens are brought together.

    Without a layout the rows may be those of many devices, and stay as they are; so do
    rows that a term needs whole, and logits, which are not moved.
    """
    is_joined = plan.layout is not None and operands.kernel is not None
    if not is_joined or jax.tree.leaves(operands.rows) or plan.batch == 1:
        return plan, operands
    length = plan.batch * plan.length

    def join(x):
        return x.reshape(x.shape[0], 1, length, *x.shape[3:])

    tokens = operands.sources, operands.inputs, operands.active
    sources, inputs, active = jax.tree.map(join, tokens)
    chunk, block = plan.chunk, plan.block
    plan = plan._replace(
        batch=1,
        length=length,
        chunk=None if chunk is None else chunk * plan.batch,
        block=None if block is None else block * plan.batch,
    )
    joined = dataclasses.replace(
        operands, sources=sources, inputs=inputs, active=active
    )
    return plan, joined


def _in_rows(plan: Plan, gradients: Operands) -> Operands:
    """Splits gradients of joined rows into the rows."""

    def split(x):
        return x.reshape(x.shape[0], plan.batch, plan.length, *x.shape[3:])

    tokens = gradients.sources, gradients.inputs
    sources, inputs = jax.tree.map(split, tokens)
    return dataclasses.replace(gradients, sources=sources, inputs=inputs)


def _make_pass(plan: Plan, target: Target, operands: Operands) -> Pass:
    axis = None if plan.layout is None else plan.layout.vocab_axis
    # Masked hidden states are zeros; but given logits, or a bias, may hold −inf.
    is_finite = operands.kernel is not None and operands.bias is None
    choose = functools.partial(
        choose_sizes,
        target,
        plan.batch,
        plan.length,
        plan.width,
        None if operands.kernel is None else operands.kernel.shape[-2],
        itemsize=plan.itemsize,
        chunk=plan.chunk,
        block=plan.block,
    )
    on_gpu, on_mesh = target.platform == "gpu", plan.layout is not None
    # The kernel is for products; given logits take what XLA makes of them.
    by_mosaic = target.implementation == "mosaic_gpu"
    implementation = "xla" if by_mosaic else target.implementation
    parts = parts_of_row(target, plan.width)
    kernel = Kernel(axis, is_finite, implementation, plan.precision, parts)
    sizes = choose()
    if plan.whole_chunks and target.implementation == "cpu":
        sizes = sizes._replace(block=sizes.chunk)
    pass_ = Pass(operands, kernel, sizes, on_gpu=on_gpu, on_mesh=on_mesh)
    if operands.kernel is None or implementation != "xla":
        return pass_
    by_columns = target.platform == "tpu"
    sample = sample_columns(operands.kernel, operands.bias, by_columns=by_columns)
    pass_ = pass_._replace(sample=sample, by_columns=by_columns)
    if operands.kernel.dtype != ROUNDED_OPERANDS:
        return pass_
    if by_mosaic and float_dtype() == jnp.float32:
        # Most programs have no use for Mosaic GPU, which takes long to import.
        from ava_jax.kernel.mosaic_gpu import can_multiply

        if can_multiply(operands.kernel):
            # It writes no logits, so a block may be a whole chunk.
            block = sizes.block if plan.block else sizes.chunk
            sizes = sizes._replace(block=block, first=block)
            return pass_._replace(rounded_sizes=sizes)
    if not by_columns:
        return pass_
    is_one_block = fuses_gradient(operands.kernel.shape[0])
    return pass_._replace(rounded_sizes=choose(is_one_block=is_one_block))


def with_masked_token(plan: Plan, operands: Operands) -> tuple[Plan, Operands]:
    """Returns the pass of a batch without tokens, with a masked one on each device."""
    plan = plan._replace(batch=plan.batch or 1, length=plan.length or 1)
    rows, parts = (1, 1) if plan.layout is None else plan.layout.token_shards
    batch, length = plan.batch * rows, plan.length * parts

    def of_tokens(x):
        return jnp.zeros((x.shape[0], batch, length, *x.shape[3:]), x.dtype)

    def of_rows(x):
        return jnp.zeros((batch, *(size or 1 for size in x.shape[1:])), x.dtype)

    tokens = operands.sources, operands.inputs, operands.active
    sources, inputs, active = jax.tree.map(of_tokens, tokens)
    return plan, dataclasses.replace(
        operands,
        sources=sources,
        inputs=inputs,
        active=active,
        rows=jax.tree.map(of_rows, operands.rows),
    )


def with_equal_shards(layout: Layout | None, operands: Operands) -> Operands:
    """Pads the vocabulary so that every device holds equally many columns."""
    kernel, bias = operands.kernel, operands.bias
    width = (operands.sources[0] if kernel is None else kernel).shape[-1]
    missing = 0 if layout is None else -width % layout.vocab_shards
    if not missing:
        return operands

    def pad(x):
        return to_width(x, x.shape[-1] + missing)

    def pad_marked(x):
        return Columns(pad(x.value)) if is_columns(x) else x

    inputs, shared = jax.tree.map(
        pad_marked, (operands.inputs, operands.shared), is_leaf=is_columns
    )
    operands = dataclasses.replace(operands, inputs=inputs, shared=shared)
    if kernel is None:
        return dataclasses.replace(operands, sources=tuple(map(pad, operands.sources)))
    bias = None if bias is None else pad(bias)
    return dataclasses.replace(operands, kernel=pad(kernel), bias=bias)


def _specs(
    layout: Layout, operands: Operands, *, of_gradients: bool = False
) -> Operands:
    """Returns the partition specs of the operands or of their gradients."""
    columns, kernel = layout.vocab_axis, operands.kernel
    rows = ()
    if of_gradients and kernel is not None:
        rows = layout.row_axes(kernel.shape[0])

    def marked(tree: Any, plain: P) -> Any:
        def spec(x: Any) -> Any:
            if not is_columns(x):
                return plain
            between = x.value.ndim - len(plain) - 1
            return Columns(cast(Any, P(*plain, *(None,) * between, columns)))

        return jax.tree.map(spec, tree, is_leaf=is_columns)

    specs: dict[str, Any] = {
        "sources": layout.tokens(None if kernel is not None else columns),
        "inputs": marked(operands.inputs, layout.tokens()),
        "active": layout.tokens(),
        "rows": layout.rows(),
        "shared": marked(operands.shared, P()),
        "kernel": P(rows or None, columns),
        "bias": P(columns),
    }
    return Operands(**specs)


def run_sums(objectives, plan: Plan, operands: Operands) -> Sums:
    """Computes the sums in a forward pass without a gradient."""
    layout = plan.layout

    def run(target, operands):
        flat, own = _flattened(plan, operands)
        return local_sums(objectives, _make_pass(flat, target, own))

    if layout is None:
        return plan.run(run, operands)

    def of_shard(operands):
        return layout.over_tokens(plan.run(run, operands))

    return layout.run(of_shard, (_specs(layout, operands),), P())(operands)


def run_values(
    function: TokenFunction, plan: Plan, operands: Operands
) -> dict[str, Float[Array, "G B S"]]:
    """Computes a function's values in a forward pass; see `local_values`."""
    layout = plan.layout

    def run(target, operands):
        flat, own = _flattened(plan, operands)
        values = local_values(function, _make_pass(flat, target, own))
        shape = (-1, plan.batch, plan.length)
        return jax.tree.map(lambda x: x.reshape(shape), values)

    if layout is None:
        return plan.run(run, operands)

    def of_shard(operands):
        return plan.run(run, operands)

    specs = (_specs(layout, operands),)
    return layout.run(of_shard, specs, layout.tokens())(operands)


def run_gradients(objectives, plan: Plan, needed, operands: Operands, wanted: Sums):
    """Computes the sums and, in the same loop, the gradient of Σ wanted · sums.

    Args:
      objectives: as for `fused.token_sums`.
      plan: as for `fused.token_sums`.
      needed: for each operand, whether its gradient is needed.
      operands: as for `fused.token_sums`.
      wanted: the cotangents of the sums.
    """
    layout = plan.layout

    def run(target, operands, wanted):
        flat, own = _flattened(plan, operands)
        pass_ = _make_pass(flat, target, own)
        sums, gradients = local_gradients(objectives, pass_, needed, wanted)
        return sums, _in_rows(plan, gradients)

    def on_this_device(operands, wanted):
        if operands.kernel is None:
            sums, own = plan.run(run, operands, wanted)
            return _over_tokens(layout, operands, sums, own)
        # The logits' gradient is cast to the operands' dtype. At the scale of the
        # weights, often 1e-6 and less, it would underflow in float16.
        scale = largest(wanted)
        scaled = jax.tree.map(lambda c: c / scale, wanted)
        sums, own = plan.run(run, operands, scaled)
        return _over_tokens(layout, operands, sums, own, scale)

    if layout is None:
        return on_this_device(operands, wanted)
    specs = _specs(layout, operands), _specs(layout, operands, of_gradients=True)
    if operands.kernel is not None:
        # Otherwise XLA gathers the projection before the model's forward pass.
        sources, kernel = optimization_barrier((operands.sources, operands.kernel))
        operands = dataclasses.replace(operands, sources=sources, kernel=kernel)
    run_on_all = layout.run(on_this_device, (specs[0], P()), (P(), specs[1]))
    return run_on_all(operands, wanted)


def _over_tokens(layout: Layout | None, operands: Operands, sums, own, scale=None):
    """Sums over the devices that the tokens are sharded over; finishes the gradients.

    The gradients get their scale and the operands' dtypes here, before they are saved.
    Those of float16 stay float32 until they are multiplied by the cotangent of the
    total, which may be a loss scale.
    """

    def scaled(g, dtype):
        has_range = jnp.finfo(dtype).maxexp >= jnp.finfo(jnp.float32).maxexp
        g = g if scale is None else scale * as_float(g)
        return g.astype(dtype if has_range else float_dtype())

    def finish(g, x):
        return None if g is None else scaled(g, x.dtype)

    if layout is None:
        return sums, map_gradients(finish, own, operands)
    bias, shared, sums = layout.over_tokens((own.bias, own.shared, sums))
    kernel = own.kernel
    own = dataclasses.replace(own, kernel=None, bias=bias, shared=shared)
    own = map_gradients(finish, own, operands)
    if kernel is None or operands.kernel is None:
        return sums, own
    dtype = operands.kernel.dtype
    kernel = layout.over_tokens_by_rows(kernel, lambda part: scaled(part, dtype))
    # Otherwise XLA keeps the unreduced gradient until the model's backward pass ends.
    sources, kernel = optimization_barrier((own.sources, kernel))
    return sums, dataclasses.replace(own, sources=sources, kernel=kernel)


def largest(coefficients: Mapping[str, Array]) -> Float[Array, ""]:
    """Returns the largest magnitude among the coefficients; 1 if all are 0."""
    # A loss of batch terms alone has none.
    one = jnp.ones((), float_dtype())
    magnitudes = [jnp.max(jnp.abs(c)) for c in coefficients.values()] or [one]
    largest = jnp.max(jnp.stack(magnitudes))
    return jnp.where(largest > 0, largest, jnp.ones_like(largest))


def map_gradients(function, gradients, operands):
    """Maps over pairs of a gradient, which may be None, and its operand."""
    return jax.tree.map(function, gradients, operands, is_leaf=lambda g: g is None)
