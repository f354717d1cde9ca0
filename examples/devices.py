"""Where arrays live: the mesh, shardings by parameter name, this process's rows."""

import math
import os
from typing import TypeVar

import jax
import numpy as np
from data import Rows
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from layers import Batch
from model import partition_spec

import ava_jax

T = TypeVar("T")
AXES = ("data", "tensor")


def use_deterministic_operations() -> None:
    """Makes GPUs give the same bits every time; comes before the first array."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def make_mesh(text: str, rows: int) -> Mesh:
    """Makes the mesh that `--mesh` asks for.

    Args:
      text: such as `data=4,tensor=2`; empty for all devices along data.
      rows: rows of one micro-batch, which the data axis has to divide.

    Raises:
      ValueError: an unknown axis, or sizes that fit neither devices nor rows.
    """
    count = jax.device_count()
    sizes = {"data": 1, "tensor": 1}
    for part in (text or f"data={_default_size(count, rows)}").split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--mesh takes data=N,tensor=M, got {text!r}")
        sizes[name] = int(size)
    wanted = math.prod(sizes.values())
    if wanted > count:
        raise ValueError(f"--mesh {text} needs {wanted} devices, but there are {count}")
    if jax.process_count() > 1 and wanted != count:
        raise ValueError(f"--mesh {text} must use all {count} devices of the pod")
    if rows % sizes["data"]:
        raise ValueError(
            f"a micro-batch has {rows} rows, which data={sizes['data']} devices cannot "
            "share evenly: change --batch-size, --microbatches or --mesh"
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=jax.devices()[:wanted],
    )


def _default_size(count: int, rows: int) -> int:
    """All accelerators; of a CPU's fake devices, as many as share the rows evenly."""
    if jax.default_backend() != "cpu" or jax.process_count() > 1:
        return count
    return max(size for size in range(1, count + 1) if rows % size == 0)


def loss_on(mesh: Mesh, loss: ava_jax.UnifiedLossConfig) -> ava_jax.UnifiedLoss:
    """The loss, told where rows and the vocabulary lie."""
    data, tensor = AXES
    return ava_jax.unified_loss(loss, mesh=mesh, batch_axes=data, vocab_axis=tensor)


def shardings_of(tree: T, mesh: Mesh) -> T:
    """Returns a sharding per array: by name, replicated where an axis does not fit."""

    def place(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = partition_spec(name)
        fits = len(spec) == len(leaf.shape) and all(
            axis is None or size % mesh.shape[axis] == 0
            for axis, size in zip(spec, leaf.shape, strict=True)
        )
        return NamedSharding(mesh, spec if fits else P())

    return jax.tree.map_with_path(place, tree)


class RowShare:
    """The rows of every batch that this process's devices need, and their way there.

    Attributes:
      places: their numbers in the batch, rising. All rows, where the devices along the
        tensor axis belong to several processes.
    """

    def __init__(self, mesh: Mesh, size: int) -> None:
        self._size = size
        self._sharding = NamedSharding(mesh, P("data"))
        indices = self._sharding.addressable_devices_indices_map((size,)).values()
        owned = {row for index in indices for row in self._rows_of(index)}
        self.places = sorted(owned)

    def _rows_of(self, index: tuple[slice, ...] | None) -> range:
        rows = range(self._size)
        return rows if index is None else rows[index[0]]

    def put(self, rows: Rows) -> Batch:
        """Gives each device its rows of those at `places`."""

        def put(array: np.ndarray) -> jax.Array:
            def pick(index: tuple[slice, ...] | None) -> np.ndarray:
                rows = self._rows_of(index)
                first = self.places.index(rows[0])
                return array[first : first + len(rows)]

            shape = (self._size, *array.shape[1:])
            return jax.make_array_from_callback(shape, self._sharding, pick)

        return Batch(*map(put, rows))
