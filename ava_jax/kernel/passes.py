"""The parts of a pass over the tokens: objectives, arrays, static options."""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ava_jax.kernel.product import Product, Sample, finished, near_largest
from ava_jax.kernel.sizes import Sizes
from ava_jax.kernel.stats import Kernel
from ava_jax.kernel.xla import MOST_COMPARED
from ava_jax.reduce import float_dtype

Sums = dict[str, Array]


@runtime_checkable
class Objective(Protocol):
    """A pure, hashable function of a block of logits that returns weighted sums."""

    def __call__(
        self,
        logits: Array | Product,
        inputs: Any,
        rows: Any,
        shared: Any,
        kernel: Kernel,
        /,
    ) -> Sums:
        """Computes the sums.

        Args:
          logits: the block, [B, C, V].
          inputs: of the block's tokens, a pytree of [B, C, ...] arrays.
          rows: `Operands.rows`.
          shared: `Operands.shared`.
          kernel: how to reduce the block.
        """
        ...

    def num_ids(self, inputs: Any, rows: Any, shared: Any, /) -> int | None:
        """Returns how many ids it queries per token; None if it needs all logits."""
        ...


@runtime_checkable
class TokenFunction(Protocol):
    """A pure, hashable function of a block of logits that returns values per token."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the values."""
        ...

    def __call__(
        self,
        logits: Array | Product,
        inputs: Any,
        rows: Any,
        shared: Any,
        kernel: Kernel,
        /,
    ) -> dict[str, Float[Array, "B C"]]:
        """Computes the values; the arguments are those of an `Objective`."""
        ...

    def num_ids(self, inputs: Any, rows: Any, shared: Any, /) -> int | None:
        """Returns what an `Objective` does."""
        ...


@flax.struct.dataclass
class Columns:
    """Marks an array of inputs or of `shared` whose last axis is the vocabulary.

    On a mesh it is sharded over that axis, as the projection is. It has no gradient.

    Attributes:
      value: the array.
    """

    value: Float[Array, "... V"]


def is_columns(x: object) -> bool:
    """Returns whether this is a marked array."""
    return isinstance(x, Columns)


def to_width(x: Float[Array, "*n V"], width: int) -> Float[Array, "*n W"]:
    """Returns an array with that many columns: padding is cut off, or zeros added."""
    missing = width - x.shape[-1]
    if missing <= 0:
        return x[..., :width]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


@flax.struct.dataclass
class Operands:
    """The arrays of a pass.

    Attributes:
      sources: per objective, hidden states [G, B, S, D] or, without a kernel, logits.
      inputs: per objective, a pytree of [G, B, S, ...] arrays.
      active: per objective, a mask of the unmasked tokens; hidden states of masked
        tokens are read as zeros. None in a gradient.
      rows: a pytree of [B, ...] integers, passed whole to every block of these rows.
      shared: a pytree, passed whole to every block.
      kernel: the projection, or None. Several, [K, D, V], are for one objective: they
        share its source, of one group, and each has a group of the inputs.
      bias: its bias, or None; [K, V] of several.
    """

    sources: tuple[Float[Array, "G B S X"], ...]
    inputs: tuple[Any, ...]
    active: tuple[Bool[Array, "G B S"] | None, ...]
    rows: Any
    shared: Any
    kernel: Float[Array, "*k D V"] | None = None
    bias: Float[Array, "*k V"] | None = None


class Pass(NamedTuple):
    """A pass of one implementation: what all of its blocks share.

    Attributes:
      operands: the arrays of this device.
      kernel: how to reduce blocks.
      sizes: the sizes of chunks and blocks.
      sample: columns of the projection, if the kernel computes the logits together with
        their sums.
      by_columns: see `Product`.
      rounded_sizes: the sizes where `may_round`; None if that is never allowed.
      may_round: see `Product`; it depends on the objective.
      on_gpu: whether the program is compiled for a GPU.
      on_mesh: whether this device is one of a mesh.
    """

    operands: Operands
    kernel: Kernel
    sizes: Sizes
    sample: Sample | None = None
    by_columns: bool = False
    rounded_sizes: Sizes | None = None
    may_round: bool = False
    on_gpu: bool = False
    on_mesh: bool = False

    def differentiating(self, objective: Objective | TokenFunction, inputs) -> "Pass":
        """Returns the pass with its options for the gradient of one objective."""
        if self.rounded_sizes is None:
            return self
        one = jax.tree.map(lambda x: x[0], inputs)
        count = objective.num_ids(one, self.operands.rows, self.operands.shared)
        if count is None or count > MOST_COMPARED:
            return self
        return self._replace(sizes=self.rounded_sizes, may_round=True)

    def summing(self, objective: Objective | TokenFunction, inputs) -> "Pass":
        """Returns the pass with its options for one objective without a gradient."""
        return self.differentiating(objective, inputs) if self.on_gpu else self

    def evaluate(
        self, objective: Objective | TokenFunction, z, inputs, bias, shared
    ) -> Sums:
        """Computes the objective's sums over a block of logits, or values per token."""
        rows = self.operands.rows
        return objective(_biased(z, bias), inputs, rows, shared, self.kernel)

    def project(self, h: Float[Array, "B C D"]) -> Float[Array, "B C V"]:
        """Computes the logits of hidden states, without the bias."""
        kernel = self.operands.kernel
        assert kernel is not None
        return jnp.einsum(
            "bcd,dv->bcv",
            h,
            kernel,
            precision=self.kernel.precision,
            preferred_element_type=float_dtype(),
        )

    def logits(self, h: Float[Array, "B C D"]) -> Float[Array, "B C V"] | Product:
        """Returns the logits of a block, or the product that will compute them."""
        if self.sample is None:
            return self.project(h)
        assert self.operands.kernel is not None
        return Product(
            hidden=h.reshape(-1, h.shape[-1]),
            kernel=self.operands.kernel,
            near=near_largest(h, self.sample).reshape(-1),
            shape=h.shape[:-1],
            by_columns=self.by_columns,
            may_round=self.may_round,
            by_mosaic=self.may_round and self.on_gpu,
            precision=self.kernel.precision,
        )

    @property
    def on_cpu(self) -> bool:
        """Whether logits are computed a chunk at a time, not a block at a time."""
        return self.kernel.implementation == "cpu"

    @property
    def is_reference(self) -> bool:
        """Whether the pass is plain JAX, without a gradient written by hand."""
        return self.kernel.implementation == "reference"


def _biased(z, bias):
    if isinstance(z, Product):
        return dataclasses.replace(z, bias=bias)
    return finished(z, bias, None)


def only(needed, tree):
    """Replaces every array whose gradient is not needed by None."""
    return jax.tree.map(lambda is_needed, x: x if is_needed else None, needed, tree)


def refill(floats, tree):
    """Fills the places where `floats` has None with the arrays of `tree`."""
    return jax.tree.map(
        lambda f, x: x if f is None else f, floats, tree, is_leaf=lambda x: x is None
    )
