"""The gradient of the projection and of its bias, added up over chunks of tokens."""

from typing import NamedTuple

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ava_jax.kernel.passes import Pass
from ava_jax.kernel.product import row_major
from ava_jax.reduce import as_float, float_dtype, float_zeros


@flax.struct.dataclass
class Total:
    """A sum that begins without zeros in memory: the first summand replaces it.

    Attributes:
      value: the sum; None before the first summand, or anything if it is empty.
      is_empty: whether nothing has been added; None if that is known.
    """

    value: Float[Array, "D V"] | None
    is_empty: Bool[Array, ""] | None

    @staticmethod
    def of(like: Float[Array, "D V"] | None, on_gpu: bool) -> "Total | None":
        """Returns the empty sum of arrays of a shape; None of none.

        A product on a GPU adds its result to an array, but not to a choice of two.
        """
        if like is None:
            return None
        if on_gpu:
            return Total(None, None)
        return Total(lax.empty(like.shape, float_dtype()), jnp.asarray(True))

    def plus(self, old: Float[Array, "d V"], more: Float[Array, "d V"]):
        """Adds to rows of the sum."""
        if self.is_empty is not None:
            old = jnp.where(self.is_empty, jnp.zeros_like(old), old)
        return old + more


class HeadGradient(NamedTuple):
    """The gradients of the projection and its bias; None where they are not needed.

    That of the bias is None as well where the objective of a block is differentiated
    by it.
    """

    kernel: Total | None
    bias: Float[Array, "V"] | None

    @staticmethod
    def empty(
        kernel: Float[Array, "D V"] | None,
        bias: Float[Array, "V"] | None,
        *,
        on_gpu: bool,
    ) -> "HeadGradient":
        """Returns the gradients before the first chunk, of those that are given."""
        return HeadGradient(Total.of(kernel, on_gpu), float_zeros(bias))

    @property
    def is_shapeless(self) -> bool:
        """Whether the first chunk gives it a shape."""
        return self.kernel is not None and self.kernel.value is None

    def plus(
        self, pass_: Pass, h: Float[Array, "*n D"], dz: Float[Array, "*n V"]
    ) -> "HeadGradient":
        """Adds a chunk's: the product of its hidden states with its gradient."""
        kernel, bias = self
        if kernel is not None:
            kernel = _add_product(pass_, kernel, h, dz)
        if bias is not None:
            bias += _sum_of_rows(pass_, dz)
        return HeadGradient(kernel, bias)


def _sum_of_rows(pass_: Pass, dz: Float[Array, "*n V"]) -> Float[Array, "V"]:
    tokens = tuple(range(dz.ndim - 1))
    if not pass_.by_columns:
        return jnp.sum(as_float(dz), tokens)
    # A TPU takes three times as long for a sum over neighbours in memory, which a
    # product with a single row of ones would become.
    ones = jnp.ones((8, *dz.shape[:-1]), dz.dtype)
    sums = lax.dot_general(
        ones,
        dz,
        (([i + 1 for i in tokens], tokens), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=float_dtype(),
    )
    return sums[0]


def _add_product(pass_: Pass, total: Total, h, dz) -> Total:
    """Adds hᵀ·dz to the sum, in parts of D so that the product needs little memory."""
    parts = pass_.sizes.parts
    width = h.shape[-1] // parts if h.shape[-1] % parts == 0 else h.shape[-1]

    def product(part):
        # Not flattened to one axis, which XLA could not shard.
        tokens = tuple(range(dz.ndim - 1))
        over_tokens = ((tokens, tokens), ((), ()))
        return lax.dot_general(
            part,
            dz,
            over_tokens,
            precision=pass_.kernel.precision,
            preferred_element_type=float_dtype(),
        )

    def add_part(i, value):
        part = lax.dynamic_slice_in_dim(h, i * width, width, h.ndim - 1)
        old = lax.dynamic_slice_in_dim(value, i * width, width, 0)
        new = total.plus(old, product(part))
        return lax.dynamic_update_slice_in_dim(value, new, i * width, 0)

    if total.value is None:
        value = product(h)
    elif width == h.shape[-1]:
        value = total.plus(total.value, product(h))
    else:
        value = lax.fori_loop(0, h.shape[-1] // width, add_part, total.value)
    if pass_.by_columns:
        # Otherwise XLA may copy the whole sum, to scatter its rows on a mesh.
        value = row_major(value)
    is_empty = None if total.is_empty is None else jnp.zeros_like(total.is_empty)
    return Total(value, is_empty)
