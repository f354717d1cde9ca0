"""Logits that are not made yet: the kernel makes them together with their sums."""

import dataclasses

import flax.struct
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from ava_jax.reduce import float_dtype

# Columns whose logits tell how large a token's logits are, in as many runs.
_MOST_SAMPLED = 128
_RUNS = 8


@flax.struct.dataclass
class Product:
    """The logits `hidden · kernel` of a block of tokens.

    Attributes:
      hidden: hidden states of the block's N tokens, one after the other.
      kernel: the projection.
      near: per token, a number near its largest logit; any number is right, but one
        that is far off costs the product again.
      probe: zeros whose gradient is that of the logits; None if it is not wanted.
      shape: of the block of tokens, as everything but these arrays has it.
      by_columns: whether the logits of a column lie side by side, as TPUs want it:
        what is one number per token then needs no broadcast within a register.
      may_round: whether the gradient may be made of rounded exponentials, which are
        then kept in place of the logits, see `rounded`.
    """

    hidden: Float[Array, "N D"]
    kernel: Float[Array, "D W"]
    near: Float[Array, "N"]
    probe: Float[Array, "N W"] | None = None
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    by_columns: bool = flax.struct.field(pytree_node=False, default=False)
    may_round: bool = flax.struct.field(pytree_node=False, default=False)

    def make(self) -> Float[Array, "..."]:
        """Returns the logits [N, W], or by columns [W, N]."""
        z = lax.dot_general(
            self.hidden,
            self.kernel,
            (((1,), (0,)), ((), ())),
            preferred_element_type=float_dtype(),
        )
        return _as_it_stands(z.T) if self.by_columns else z

    @property
    def class_axis(self) -> int:
        """Along which the classes lie in what `make` returns."""
        return 0 if self.by_columns else 1

    def by_token(self, made: Float[Array, "..."]) -> Float[Array, "N W"]:
        """Returns what `make` returned, one token after the other."""
        return made.T if self.by_columns else made

    def logits(self) -> Float[Array, "*n W"]:
        """Returns the logits in the block's shape; their gradient is the probe's."""
        z = lax.stop_gradient(self.by_token(self.make()))
        if self.probe is not None:
            z += self.probe
        return z.reshape(*self.shape, z.shape[-1])


def differentiable(z: Float[Array, "*n W"] | Product) -> Float[Array, "*m W"]:
    """Returns what has the gradient of logits: themselves, or a product's probe."""
    if isinstance(z, Product):
        return jnp.zeros((z.hidden.shape[0], z.kernel.shape[1]), float_dtype())
    return z


def replaced(
    z: Float[Array, "*n W"] | Product, given: Float[Array, "*m W"] | None
) -> Float[Array, "*n W"] | Product:
    """Returns logits with `given`, unless it is None, for `differentiable(z)`."""
    if given is None:
        return z
    return dataclasses.replace(z, probe=given) if isinstance(z, Product) else given


def lay_by_columns(x: Float[Array, "N W"]) -> Float[Array, "N W"]:
    """Lays the numbers of a column side by side in memory."""
    return _as_it_stands(x.T).T


def _as_it_stands(x: Float[Array, "a b"]) -> Float[Array, "a b"]:
    return with_layout_constraint(x, Layout(major_to_minor=(0, 1)))


def sample_columns(
    kernel: Float[Array, "D W"], *, by_columns: bool
) -> Float[Array, "D M"]:
    """Returns a few columns from all over a projection, at most one in 128."""
    width = kernel.shape[1]
    count = max(min(_MOST_SAMPLED, width // _MOST_SAMPLED), 1)
    runs = min(_RUNS, count)
    size = count // runs
    starts = [width * run // runs for run in range(runs)]
    parts = [lax.slice_in_dim(kernel, start, start + size, axis=1) for start in starts]
    if by_columns:
        # Otherwise XLA would lay the whole projection out anew.
        parts = [_as_it_stands(part) for part in parts]
    return jnp.concatenate(parts, 1)


def near_largest(
    hidden: Float[Array, "*n D"], columns: Float[Array, "D M"]
) -> Float[Array, "*n"]:
    """Returns the largest of a few logits of each token."""
    # Otherwise XLA makes these and all others in one product on GPUs, and copies them.
    hidden = lax.optimization_barrier(hidden)
    z = jnp.einsum(
        "...d,dm->...m", hidden, columns, preferred_element_type=float_dtype()
    )
    return jnp.max(z, -1)
