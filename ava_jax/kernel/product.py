"""Logits that do not exist yet: the kernel computes them together with their sums."""

import dataclasses
import functools
from typing import NamedTuple

import flax.struct
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from ava_jax.reduce import along_axis, as_float, float_dtype

# The number of columns that estimate a token's row max, and of the runs they lie in.
_MOST_SAMPLED = 128
_RUNS = 8


@flax.struct.dataclass
class Product:
    """The logits `(hidden · kernel + bias) · scale` of a block of tokens.

    Attributes:
      hidden: the hidden states of the block's N tokens, flattened.
      kernel: the projection.
      near: per token, a number near its row max at scale 1; any number gives correct
        results, but one that is far off costs a second product.
      bias: −inf for classes that are impossible; None if there is none.
      scale: one over a temperature; None for 1. Logits with a soft-cap have none.
      probe: zeros whose gradient is that of the logits at scale 1; None if it is not
        needed. The gradient of the bias is its sum over the tokens.
      shape: the block's token axes, which are flattened here.
      by_columns: whether the logits of a column are contiguous in memory, as TPUs
        prefer: a number per token then needs no broadcast within a register.
      may_round: whether the gradient may be computed from rounded exponentials, which
        are then saved instead of the logits; see `rounded`.
      by_mosaic: whether a kernel computes it with its sums, see `mosaic_gpu`.
      precision: of the product.
    """

    hidden: Float[Array, "N D"]
    kernel: Float[Array, "D W"]
    near: Float[Array, "N"]
    bias: Float[Array, "W"] | None = None
    scale: Float[Array, ""] | None = None
    probe: Float[Array, "N W"] | None = None
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    by_columns: bool = flax.struct.field(pytree_node=False, default=False)
    may_round: bool = flax.struct.field(pytree_node=False, default=False)
    by_mosaic: bool = flax.struct.field(pytree_node=False, default=False)
    precision: lax.PrecisionLike = flax.struct.field(pytree_node=False, default=None)

    def make(self) -> Float[Array, "..."]:
        """Computes `hidden · kernel`: [N, W], or [W, N] by columns."""
        z = lax.dot_general(
            self.hidden,
            self.kernel,
            (((1,), (0,)), ((), ())),
            precision=self.precision,
            preferred_element_type=float_dtype(),
        )
        return row_major(z.T) if self.by_columns else z

    def finish(self, made: Float[Array, "..."]) -> Float[Array, "..."]:
        """Computes the logits from what `make` returns."""
        return finished(made, self.bias, self.scale, self.class_axis)

    @property
    def class_axis(self) -> int:
        """The axis of the classes in what `make` returns."""
        return 0 if self.by_columns else -1

    @property
    def width(self) -> int:
        """The number of columns, W."""
        return self.kernel.shape[1]

    @property
    def has_holes(self) -> bool:
        """Whether logits may be −inf."""
        return self.bias is not None

    def by_token(self, made: Float[Array, "..."]) -> Float[Array, "N W"]:
        """Brings what `make` returns to [N, W]."""
        return made.T if self.by_columns else made

    def logits(self) -> Float[Array, "*n W"]:
        """Computes logits in the block's shape; their gradient goes to the probe."""
        assert self.scale is None  # it is applied last
        z = lax.stop_gradient(self.by_token(self.finish(self.make())))
        if self.probe is not None:
            z += self.probe
        return z.reshape(*self.shape, z.shape[-1])


@flax.struct.dataclass
class Given:
    """Logits that exist already, to be read like a `Product`.

    Attributes:
      logits: the block; those of masked tokens may hold anything.
      near: per token, a number near its row max.
    """

    logits: Float[Array, "*n W"]
    near: Float[Array, "*n"]

    bias = scale = None
    by_columns = by_mosaic = False
    class_axis = -1
    has_holes = True

    @staticmethod
    def of(logits: Float[Array, "*n W"]) -> "Given":
        """Returns logits with the maximum over a few columns of each token's."""
        parts = [jnp.max(part, -1) for part in _runs_of(logits, logits.ndim - 1)]
        near = as_float(functools.reduce(jnp.maximum, parts))
        return Given(logits, jnp.where(near != -jnp.inf, near, jnp.zeros_like(near)))

    @property
    def width(self) -> int:
        """The number of columns, W."""
        return self.logits.shape[-1]

    def make(self) -> Float[Array, "*n W"]:
        """Returns the logits."""
        return self.logits

    def finish(self, made: Float[Array, "*n W"]) -> Float[Array, "*n W"]:
        """Returns the same."""
        return made

    def by_token(self, made: Float[Array, "*n W"]) -> Float[Array, "*n W"]:
        """Returns the same."""
        return made


def finished(
    made: Float[Array, "..."],
    bias: Float[Array, "W"] | None,
    scale: Float[Array, ""] | None,
    class_axis: int = -1,
) -> Float[Array, "..."]:
    """Adds a bias to a product, and multiplies by a scale."""
    if bias is not None:
        made = made + along_axis(as_float(bias), made.ndim, class_axis)
    return made if scale is None else made * scale


def differentiable(z: Float[Array, "*n W"] | Product) -> Float[Array, "*m W"]:
    """Returns the array to differentiate by: the logits, or a product's probe."""
    if isinstance(z, Product):
        return jnp.zeros((z.hidden.shape[0], z.kernel.shape[1]), float_dtype())
    return z


def replaced(
    z: Float[Array, "*n W"] | Product, given: Float[Array, "*m W"] | None
) -> Float[Array, "*n W"] | Product:
    """Returns `z` with `given` in place of `differentiable(z)`; `z` if it is None."""
    if given is None:
        return z
    return dataclasses.replace(z, probe=given) if isinstance(z, Product) else given


def lay_by_columns(x: Float[Array, "*n W"]) -> Float[Array, "*n W"]:
    """Constrains the layout: the numbers of a column are contiguous in memory."""
    return row_major(x.mT).mT


def row_major(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Constrains the layout: the numbers of a row are contiguous in memory."""
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


class Sample(NamedTuple):
    """A few columns of a projection, and of its bias if it has one."""

    columns: Float[Array, "D M"]
    bias: Float[Array, "M"] | None


def sample_columns(
    kernel: Float[Array, "D W"], bias: Float[Array, "W"] | None, *, by_columns: bool
) -> Sample:
    """Returns evenly spread columns of a projection, at most one in 128."""
    parts = _runs_of(kernel, 1)
    if by_columns:
        # Otherwise XLA would change the layout of the whole projection.
        parts = [row_major(part) for part in parts]
    of_bias = None if bias is None else jnp.concatenate(_runs_of(bias, 0))
    return Sample(jnp.concatenate(parts, 1), of_bias)


def _runs_of(x: Float[Array, "*n"], axis: int) -> list[Float[Array, "*m"]]:
    """Slices evenly spread runs of an axis, at most one in 128 of its elements."""
    width = x.shape[axis]
    count = max(min(_MOST_SAMPLED, width // _MOST_SAMPLED), 1)
    runs = min(_RUNS, count)
    size = count // runs
    starts = [width * run // runs for run in range(runs)]
    return [lax.slice_in_dim(x, start, start + size, axis=axis) for start in starts]


def near_largest(hidden: Float[Array, "*n D"], sample: Sample) -> Float[Array, "*n"]:
    """Computes the maximum of a token's logits over a few columns; 0 if it is −inf."""
    # Otherwise XLA merges this product with that of all logits on GPUs, and copies it.
    hidden = lax.optimization_barrier(hidden)
    z = jnp.einsum(
        "...d,dm->...m", hidden, sample.columns, preferred_element_type=float_dtype()
    )
    if sample.bias is None:
        return jnp.max(z, -1)
    near = jnp.max(z + along_axis(as_float(sample.bias), z.ndim), -1)
    return jnp.where(near != -jnp.inf, near, jnp.zeros_like(near))
