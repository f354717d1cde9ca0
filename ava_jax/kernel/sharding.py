"""The sharding of a batch and its vocabulary on a mesh, and code run on every shard.

Integers, means and batch terms are written for whole arrays, which XLA partitions. The
pass over the tokens is partitioned by hand: it runs on each device's own tokens and
columns (`Layout.run`), with explicit collectives.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import jit, lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ava_jax.kernel.forward_mode import named_errors
from ava_jax.reduce import as_arrays

Result = TypeVar("Result")

_PARTS = 16
_TILE = 8  # rows, on a TPU


@dataclasses.dataclass(frozen=True)
class Layout:
    """The mesh axes that rows, their tokens and the vocabulary are sharded over.

    Made by `make_layout`, which leaves out axes of size 1.

    Attributes:
      mesh: the mesh.
      batch_axes: the axes that the rows are sharded over, B.
      sequence_axis: the axis that each row's tokens are sharded over, S.
      vocab_axis: the axis that the vocabulary is sharded over, V.
    """

    mesh: Mesh
    batch_axes: tuple[str, ...]
    sequence_axis: str | None
    vocab_axis: str | None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies the mesh as the ids of its devices, which cannot be."""
        mesh = self.mesh
        names, types = mesh.axis_names, mesh.axis_types
        ids = np.vectorize(lambda device: device.id, otypes=[int])(mesh.devices)
        platform = mesh.devices.flat[0].platform
        axes = self.batch_axes, self.sequence_axis, self.vocab_axis
        return _layout_of, (platform, ids, names, types, axes)

    def over_tokens(self, sums: Result) -> Result:
        """Sums over the shards of the tokens, inside `run`."""
        return lax.psum(sums, self.token_axes) if self.token_axes else sums

    def over_tokens_by_rows(
        self, x: Float[Array, "D V"], finish: Callable[[Array], Array]
    ) -> Float[Array, "d V"]:
        """Sums as `over_tokens` does, but scatters the rows of the sum over devices.

        The collective runs in parts, one after the other: compilers allocate buffers
        for its operand and result, which are small for a part.

        Args:
          x: the summand of this device.
          finish: applied to each part of the sum, such as a cast to a shorter dtype.
        """
        if not self.token_axes:
            return finish(x)
        axes = self.row_axes(x.shape[0])
        others = tuple(axis for axis in self.token_axes if axis not in axes)
        shares = x.reshape(math.prod(map(self._count, axes)), -1, x.shape[1])
        rows = shares.shape[1]
        cuts = rows // _TILE if axes else rows
        parts = max(n for n in range(1, _PARTS + 1) if cuts % n == 0)

        def add_part(index: Array) -> Array:
            size = rows // parts
            part = lax.dynamic_slice_in_dim(shares, index * size, size, 1)
            part = lax.psum_scatter(part, axes) if axes else part[0]
            return finish(lax.psum(part, others) if others else part)

        return lax.map(add_part, jnp.arange(parts)).reshape(rows, -1)

    def row_axes(self, rows: int) -> tuple[str, ...]:
        """Returns the axes that shard the rows of a sum over tokens, [rows, V].

        They are as many of the token axes as leave whole tiles, beginning with the last
        batch axis: parameters are often sharded over that axis alone, and then need
        only what their neighbours along the other axes hold.
        """
        axes = (*reversed(self.batch_axes), *filter(None, [self.sequence_axis]))
        while axes and rows % (_TILE * math.prod(map(self._count, axes))):
            axes = axes[:-1]
        return axes

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The axes that the tokens are sharded over."""
        return (*self.batch_axes, *filter(None, [self.sequence_axis]))

    @property
    def vocab_shards(self) -> int:
        """The number of the vocabulary's shards."""
        return self._count(self.vocab_axis)

    @property
    def token_shards(self) -> tuple[int, int]:
        """The number of shards of the rows, and of each row's tokens."""
        rows = math.prod(map(self._count, self.batch_axes))
        return rows, self._count(self.sequence_axis)

    def rows(self) -> P:
        """Returns the spec of arrays [B, ...]."""
        return P(self.batch_axes or None)

    def tokens(self, *others: str | None) -> P:
        """Returns the spec of arrays [G, B, S, ...]."""
        return P(None, self.batch_axes or None, self.sequence_axis, *others)

    def token_arrays(self) -> P:
        """Returns the spec of arrays [B, S]."""
        return P(self.batch_axes or None, self.sequence_axis)

    def local_shape(self, batch: int, length: int, width: int) -> tuple[int, int, int]:
        """Returns the rows, tokens per row and columns of one device.

        Raises:
          ValueError: the devices do not divide the rows or tokens evenly.
        """
        rows, parts = self.token_shards
        for what, size, count, argument in (
            ("rows", batch, rows, f"batch_axes={self.batch_axes}"),
            ("tokens a row", length, parts, f"sequence_axis={self.sequence_axis!r}"),
        ):
            if size % count:
                raise ValueError(
                    f"the targets have {size} {what}, which the {count} devices of "
                    f"{argument} do not divide evenly: pad with tokens that "
                    "attention_mask leaves out"
                )
        return batch // rows, length // parts, -(-width // self.vocab_shards)

    def run(
        self, function: Callable[..., Result], in_specs: Any, out_specs: Any
    ) -> Callable[..., Result]:
        """Returns a function of whole arrays that runs `function` on every shard."""
        context = jax.sharding.get_abstract_mesh()
        on_shards = jax.shard_map(
            function,
            # Inside `jax.set_mesh` the axis types may differ from those of the mesh.
            mesh=self.mesh if context.empty else None,
            in_specs=in_specs,
            out_specs=out_specs,
            # Replicated values come from collectives inside hand-written gradients,
            # which this check cannot follow.
            check_vma=False,
        )
        # Outside of a compiled program, shard_map cannot run hand-written gradients.
        return jit(on_shards, inline=True)

    def _count(self, axis: str | None) -> int:
        return 1 if axis is None else self.mesh.shape[axis]


def _layout_of(platform: str, ids: Any, names: Any, types: Any, axes: Any) -> Layout:
    """Returns a layout over the devices of this process that have the ids."""
    here = {device.id: device for device in jax.devices(platform)}
    if missing := sorted(set(ids.flat) - set(here)):
        raise ValueError(
            f"the mesh of this loss has the {platform} devices {missing}, which do not "
            "exist here: make the loss anew with a mesh of this machine's"
        )
    devices = np.vectorize(here.__getitem__, otypes=[object])(ids)
    return Layout(Mesh(devices, names, axis_types=types), *axes)


def make_layout(
    mesh: Mesh | None,
    batch_axes: str | Sequence[str],
    sequence_axis: str | None,
    vocab_axis: str | None,
) -> Layout | None:
    """Returns the layout of a user's arguments; None if nothing is sharded.

    Raises:
      ValueError: axes without a mesh, an unknown axis, or one given twice.
    """
    rows = (batch_axes,) if isinstance(batch_axes, str) else tuple(batch_axes)
    used = [*rows, *filter(None, [sequence_axis, vocab_axis])]
    if mesh is None:
        if used:
            raise ValueError(
                "batch_axes, sequence_axis and vocab_axis name axes of a mesh, got "
                f"{used} and no mesh: pass mesh= as well"
            )
        return None
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(
            f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}: make one "
            "with jax.make_mesh"
        )
    for name in used:
        if name not in mesh.axis_names:
            raise ValueError(
                f"{name!r} is not an axis of the mesh, which has {mesh.axis_names}"
            )
        if used.count(name) > 1:
            raise ValueError(
                f"the mesh's axis {name!r} is given twice: batch_axes={rows}, "
                f"sequence_axis={sequence_axis!r}, vocab_axis={vocab_axis!r}"
            )

    def sharded(axis: str | None) -> str | None:
        return axis if axis is not None and mesh.shape[axis] > 1 else None

    rows = tuple(filter(sharded, rows))
    tokens, columns = sharded(sequence_axis), sharded(vocab_axis)
    if not (rows or tokens or columns):
        return None
    return Layout(mesh, rows, tokens, columns)


def run_whole(
    function: Callable[..., Result],
    static: tuple[Any, ...],
    *args: Any,
    out_specs: Any = None,
) -> Result:
    """Calls `function(*static, *args)` on whole arrays, which XLA shards.

    Every public function that runs a pass enters here. Outside of jit the call is one
    program, compiled once for all calls with the same shapes: its loops, as operations
    of their own, would be compiled anew at each call.

    Args:
      function: of a module, not a closure; it returns small arrays.
      static: its first arguments, hashable.
      *args: pytrees of arrays, NumPy's among them, and of Python's numbers, which stay
        what they are.
      out_specs: how the results are sharded over Explicit axes; None replicates them.
        Other axes in it are left to XLA.
    """
    leaves, tree = jax.tree.flatten(out_specs, is_leaf=lambda x: isinstance(x, P))
    specs = tuple(leaves), tree
    return in_one_program(_with_auto_axes, (function, static, specs), *args)


def in_one_program(
    function: Callable[..., Result], static: tuple[Any, ...], *args: Any
) -> Result:
    """Calls `function(*static, *args)`, outside of jit as one program.

    That program is found again by the function and `static`. A loop or a `lax.cond`
    with a closure, as an operation of its own, would be compiled anew at each call.

    Args:
      function: of a module, not a closure.
      static: its first arguments, hashable.
      *args: as for `run_whole`.
    """
    leaves, tree = jax.tree.flatten(as_arrays(args))
    is_array = [isinstance(x, jax.Array) for x in leaves]
    numbers = [None if found else x for x, found in zip(leaves, is_array, strict=True)]
    arrays = [x for x, found in zip(leaves, is_array, strict=True) if found]
    call = _Call(function, static, tree, tuple(numbers))
    # An operation is staged wherever a trace, of jit or of a loop, is under way.
    is_staged = isinstance(jnp.zeros(()), Tracer)
    if is_staged:
        return call.run(arrays)
    with named_errors():
        return _run_compiled(call, arrays)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call but for its arrays: hashable, so that its program is found again."""

    function: Callable[..., Any]
    static: tuple[Any, ...]
    tree: Any
    numbers: tuple[Any, ...]

    def run(self, arrays: list[Array]) -> Any:
        rest = iter(arrays)
        leaves = [next(rest) if x is None else x for x in self.numbers]
        return self.function(*self.static, *self.tree.unflatten(leaves))


@functools.partial(jit, static_argnums=0, inline=True)
def _run_compiled(call: _Call, arrays: list[Array]) -> Any:
    return call.run(arrays)


def _with_auto_axes(
    function: Callable[..., Result],
    static: tuple[Any, ...],
    out_specs: tuple[Any, Any],
    *args: Any,
) -> Result:
    """Calls a function whose sharding XLA chooses, under Explicit axes as well."""
    specs = out_specs[1].unflatten(out_specs[0])
    explicit = jax.sharding.get_abstract_mesh().explicit_axes
    if not explicit:
        return function(*static, *args)

    def keep(entry):
        if isinstance(entry, tuple):
            return tuple(axis for axis in entry if axis in explicit) or None
        return entry if entry in explicit else None

    specs = jax.tree.map(
        lambda spec: P(*map(keep, spec)),
        P() if specs is None else specs,
        is_leaf=lambda x: isinstance(x, P),
    )
    function = functools.partial(function, *static)
    automatic = jax.sharding.auto_axes(function, axes=explicit, out_sharding=specs)
    return cast(Result, automatic(*args))
