"""Where arrays live: the mesh, shardings by parameter name, batches on all hosts."""

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

T = TypeVar("T")
AXES = ("data", "tensor")


def join_pod() -> None:
    """Connects the processes of a pod or cluster; alone, there is nothing to do.

    TPU pods, Slurm, Open MPI and others are recognised by JAX. Elsewhere, set
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        count, own = (
            int(os.environ[name]) if name in os.environ else None
            for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        )
        jax.distributed.initialize(num_processes=count, process_id=own)
        return
    try:
        jax.distributed.initialize()
    except ValueError:
        # JAX found no cluster around it: one process owns every device.
        return


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


def put_batch(rows: Rows, mesh: Mesh) -> Batch:
    """Splits a batch over the data axis.

    Every host holds the whole batch and gives its devices their rows, so that what a
    run sees does not depend on the number of hosts.
    """
    sharding = NamedSharding(mesh, P("data"))

    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return Batch(*(put(array) for array in rows))
