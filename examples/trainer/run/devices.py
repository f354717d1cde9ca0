"""Where arrays live: the mesh, shardings by parameter name, this process's rows."""

import math
import os
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

import ava_jax
from trainer.data.text import Rows
from trainer.model.language_model import partition_spec
from trainer.model.layers import Batch

T = TypeVar("T")
AXES = ("data", "fsdp", "tensor")
# The axes that share the rows of a batch; parameters are split over fsdp and tensor.
ROWS = ("data", "fsdp")


def use_deterministic_operations() -> None:
    """Makes GPUs give the same bits every time; comes before the first array."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def make_mesh(text: str, rows: int, devices: Sequence[object] | None = None) -> Mesh:
    """Makes the mesh that `--mesh` asks for.

    Args:
      text: such as `data=4,tensor=2`; empty for all devices along data.
      rows: rows of one micro-batch, which the axes of the rows have to divide.
      devices: of the mesh; by default those that there are.

    Raises:
      ValueError: an unknown axis, or sizes that fit neither devices nor rows.
    """
    is_here = devices is None
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    default = _default_size(count, rows) if is_here else count
    sizes = dict.fromkeys(AXES, 1)
    for part in (text or f"data={default}").split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                "--mesh takes data=N,tensor=M, or fsdp=N as well to split the "
                f"parameters, got {text!r}"
            )
        sizes[name] = int(size)
    wanted = math.prod(sizes.values())
    if wanted > count:
        raise ValueError(f"--mesh {text} needs {wanted} devices, but there are {count}")
    if wanted != count and (jax.process_count() > 1 or not is_here):
        raise ValueError(f"--mesh {text} must use all {count} devices of the pod")
    if rows % math.prod(sizes[axis] for axis in ROWS):
        shares = ",".join(f"{axis}={sizes[axis]}" for axis in ROWS if sizes[axis] > 1)
        raise ValueError(
            f"a micro-batch has {rows} rows, which {shares} devices cannot share "
            "evenly: change --batch-size, --microbatches or --mesh"
        )
    # An axis may run over parts of the network's, as of a torus of 8×8×8 for 32×4×4.
    arranged = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices[:wanted], allow_split_physical_axes=True
    )
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _default_size(count: int, rows: int) -> int:
    """All accelerators; of a CPU's fake devices, as many as share the rows evenly."""
    if jax.default_backend() != "cpu" or jax.process_count() > 1:
        return count
    return max(size for size in range(1, count + 1) if rows % size == 0)


def loss_on(mesh: Mesh, loss: ava_jax.UnifiedLossConfig) -> ava_jax.UnifiedLoss:
    """The loss with the mesh, over which rows and the vocabulary are split."""
    return ava_jax.unified_loss(loss, mesh=mesh, batch_axes=ROWS, vocab_axis="tensor")


def placed(tree: T, mesh: Mesh) -> T:
    """Gives each shape a sharding: by name, without the axes that do not fit."""

    def place(
        path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct
    ) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        fitting = (
            axis if axis is None or size % mesh.shape[axis] == 0 else None
            for axis, size in zip(
                partition_spec(name, leaf.ndim), leaf.shape, strict=False
            )
        )
        return leaf.update(sharding=NamedSharding(mesh, P(*fitting)))

    return jax.tree.map_with_path(place, tree)


def split_rows(batch: Batch, parts: int, mesh: Mesh) -> Batch:
    """Splits rows [B, S] into micro-batches [parts, B / parts, S].

    Row b goes to part b % parts, so that no row leaves its device.
    """
    rows_in_place = NamedSharding(mesh, P(None, ROWS))

    def part(array: Array) -> Array:
        window = array.reshape(-1, parts, array.shape[-1]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(window, rows_in_place)

    return Batch(*map(part, batch))


class RowShare:
    """The rows of a batch that this process's devices need, and their placement.

    Attributes:
      row_ids: their numbers in the batch, rising. All rows, where the devices along the
        tensor axis belong to several processes.
    """

    def __init__(self, mesh: Mesh, size: int) -> None:
        self._size = size
        self._sharding = NamedSharding(mesh, P(ROWS))
        indices = self._sharding.addressable_devices_indices_map((size,)).values()
        owned = {row for index in indices for row in self._rows_of(index)}
        self.row_ids = sorted(owned)

    def _rows_of(self, index: tuple[slice, ...] | None) -> range:
        rows = range(self._size)
        return rows if index is None else rows[index[0]]

    def put(self, rows: Rows) -> Batch:
        """Puts the rows of `row_ids` on the devices that need them."""

        def put(array: np.ndarray) -> jax.Array:
            def pick(index: tuple[slice, ...] | None) -> np.ndarray:
                rows = self._rows_of(index)
                first = self.row_ids.index(rows[0])
                return array[first : first + len(rows)]

            shape = (self._size, *array.shape[1:])
            return jax.make_array_from_callback(shape, self._sharding, pick)

        return Batch(*map(put, rows))
