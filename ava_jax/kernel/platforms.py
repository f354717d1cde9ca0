"""Which implementation of the kernel runs, and for which kind of device.

The platform of the lowering decides, not the default backend: a program that is
compiled ahead of time on a CPU for a TPU gets the TPU's implementation.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

from jax import lax
from jax.sharding import Mesh

Result = TypeVar("Result")

# What a caller may ask for.
Implementation = Literal["reference", "cpu", "xla"]
Platform = Literal["cpu", "tpu", "gpu"]


class Target(NamedTuple):
    """What a program is made for.

    Attributes:
      implementation: of the kernel.
      platform: the device that sizes are chosen for.
    """

    implementation: Implementation
    platform: Platform


def platform_of(mesh: Mesh) -> Platform | None:
    """Returns the platform of a mesh's devices; None if it has none yet."""
    if not isinstance(mesh, Mesh):
        return None
    name = mesh.devices.flat[0].platform
    return name if name in ("cpu", "tpu") else "gpu"


def by_platform(
    implementation: Implementation | None,
    platform: Platform | None,
    run: Callable[..., Result],
    *operands: Any,
) -> Result:
    """Calls `run(target, *operands)` with what the platform calls for.

    Args:
      implementation: takes the choice away from the platform.
      platform: where it is known, of a mesh's devices.
      run: a function of a `Target` and of the operands.
      *operands: pytrees of arrays.

    Returns:
      What `run` returns. Where the target is not known, `run` is traced for each, and
      the program keeps the one of the platform that it is lowered for.
    """

    def choose(platform: Platform) -> Callable[..., Result]:
        own = "cpu" if platform == "cpu" else "xla"
        target = Target(implementation or own, platform)
        return lambda *operands: run(target, *operands)

    if implementation in ("cpu", "reference"):
        # Their sizes are the same everywhere.
        platform = "cpu"
    if platform is not None:
        return choose(platform)(*operands)
    return lax.platform_dependent(
        *operands, cpu=choose("cpu"), tpu=choose("tpu"), default=choose("gpu")
    )


def by_implementation(
    implementation: Implementation | None,
    run: Callable[..., Result],
    *operands: Any,
) -> Result:
    """Calls `run(implementation, *operands)` where no size depends on the platform.

    Args:
      implementation: takes the choice away from the platform.
      run: a function of an implementation's name and of the operands.
      *operands: pytrees of arrays.

    Returns:
      What `run` returns; as for `by_platform`, but traced for two platforms only.
    """

    def choose(name: Implementation) -> Callable[..., Result]:
        return lambda *operands: run(name, *operands)

    if implementation is not None:
        return choose(implementation)(*operands)
    return lax.platform_dependent(*operands, cpu=choose("cpu"), default=choose("xla"))
