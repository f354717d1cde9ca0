"""Accelerators that need not be present: their compilers, meshes and sizes.

The compilers of TPUs and GPUs are ordinary packages, `libtpu` and JAX's CUDA plugin,
and compile on any x86-64 Linux machine for one chip or for hundreds.
"""

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import mesh_utils, topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    Sharding,
    use_abstract_mesh,
)
from jax.stages import Compiled

GPU_DESCRIPTION = Path(__file__).with_name("h100.pbtxt")
GPUS_A_HOST = 8
# The TPU's compiler needs no TPU, and other processes may use it at the same time.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
NEEDS = "needs the compiled extra, on x86-64 Linux; `make test-compiled` installs it"


class Chip(NamedTuple):
    """A kind of accelerator; devices as JAX counts them.

    Attributes:
      platform: the name for `lowering_platforms`.
      memory: bytes of HBM per device.
      clock: cycles of a TPU's core per nanosecond; `None` without an estimate.
      axes: dimensions of its network, 2 or 3.
      cores: devices per chip.
    """

    platform: str
    memory: int
    clock: float | None = None
    axes: int = 3
    cores: int = 1


# At these clocks the matrix units reach the specified peak rates: 197, 459, 918 and,
# for the two cores of a tpu7x, 2307 Tflop/s.
CHIPS = {
    "v5e": Chip("tpu", 16 * 10**9, 1.5, axes=2),
    "v5p": Chip("tpu", 95 * 10**9, 1.75),
    "v6e": Chip("tpu", 32 * 10**9, 1.75, axes=2),
    "tpu7x": Chip("tpu", 96 * 10**9, 2.2, cores=2),
    "h100": Chip("cuda", 80 * 10**9),
}


def missing(chip: str) -> str:
    """Returns why a chip cannot be compiled for here; empty if it can."""
    packages = ("libtpu",)
    if CHIPS[chip].platform == "cuda":
        packages = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    found = any(importlib.util.find_spec(package) for package in packages)
    return "" if found else NEEDS


def topology_name(chip: str, count: int) -> str:
    """Returns the name of the smallest topology with at least `count` devices.

    Args:
      chip: a name of `CHIPS`.
      count: the number of devices, rounded up to a power of 2 and to whole hosts.
    """
    kind = CHIPS[chip]
    if kind.platform == "cuda":
        hosts = math.ceil(count / GPUS_A_HOST)
        return f"1x{hosts}x{GPUS_A_HOST if hosts > 1 else count}"
    sizes = [2, 2, 1][: kind.axes]
    while math.prod(sizes) * kind.cores < count:
        smallest = max(i for i, n in enumerate(sizes) if n == min(sizes))
        sizes[smallest] *= 2
    # The longest axis comes last, but a single host is flat.
    order = sizes if math.prod(sizes) == 4 else sorted(sizes)
    return f"{chip}:{'x'.join(map(str, order))}"


def devices(chip: str, count: int = 1) -> list[Any]:
    """Returns devices to compile for, which hold no data.

    Args:
      chip: a name of `CHIPS`.
      count: the number of devices.

    Raises:
      ModuleNotFoundError: the compiler is not installed.
    """
    if reason := missing(chip):
        raise ModuleNotFoundError(f"no compiler for {chip}: {reason}")
    return list(_devices(chip, topology_name(chip, count)))[:count]


@functools.cache
def _devices(chip: str, name: str) -> tuple[Any, ...]:
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if CHIPS[chip].platform == "cuda":
        found = topologies.get_topology_desc(
            chip,
            platform="cuda",
            target_config=GPU_DESCRIPTION.read_text(),
            topology=name,
        )
    else:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    return tuple(found.devices)


def make_mesh(chip: str, sizes: Mapping[str, int]) -> Mesh:
    """Returns a mesh of a chip's devices whose shardings XLA propagates.

    Args:
      chip: a name of `CHIPS`.
      sizes: the sizes of the axes, by name.
    """
    shape = tuple(sizes.values())
    # An axis may be a part of one of the network's axes.
    placed = mesh_utils.create_device_mesh(
        shape, devices(chip, math.prod(shape)), allow_split_physical_axes=True
    )
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def compile_for(
    chip: str,
    function: Callable[..., Any],
    *arguments: Any,
    out_shardings: Any = None,
) -> Compiled:
    """Compiles a function for a chip.

    Args:
      chip: a name of `CHIPS`.
      function: the function, which gets jitted.
      *arguments: `jax.ShapeDtypeStruct`s whose shardings name the chip's devices.
      out_shardings: shardings of its results; `None` leaves them to XLA.
    """
    jitted = jax.jit(function, out_shardings=out_shardings)
    platform = CHIPS[chip].platform
    with use_abstract_mesh(_of_card(chip)) if platform == "cuda" else nullcontext():
        lowered = jitted.trace(*arguments).lower(lowering_platforms=(platform,))
    return lowered.compile()


def _of_card(chip: str) -> AbstractMesh:
    """Returns a mesh without axes, which tells Pallas the card."""
    (card,) = devices(chip)
    kind = AbstractDevice(card.device_kind, card.core_count, platform=card.platform)
    return AbstractMesh((), (), abstract_device=kind)


def given(
    shape: tuple[int, ...], dtype: Any, sharding: Sharding
) -> jax.ShapeDtypeStruct:
    """Returns the shape, dtype and sharding of an array."""
    return jax.ShapeDtypeStruct(shape, jax.numpy.dtype(dtype), sharding=sharding)
