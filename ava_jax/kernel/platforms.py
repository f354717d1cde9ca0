"""Selecting the kernel's implementation by platform.

The platform of the lowering decides, not the default backend: a program that is
compiled ahead of time on a CPU for a TPU gets the TPU's implementation.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

from jax import lax
from jax.sharding import Mesh

Result = TypeVar("Result")

# The values of `implementation=`.
Implementation = Literal["reference", "cpu", "xla"]
Platform = Literal["cpu", "tpu", "gpu"]


class Target(NamedTuple):
    """What a program is compiled for.

    Attributes:
      implementation: the kernel's.
      platform: the kind of device that sizes are chosen for.
    """

    implementation: Implementation
    platform: Platform


def platform_of(mesh: Mesh) -> Platform | None:
    """Returns the platform of a mesh's devices; None for an abstract mesh."""
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
    """Calls `run(target, *operands)` with the target of the platform.

    Args:
      implementation: overrides the platform's choice.
      platform: that of the mesh's devices; None if it is not known.
      run: a function of a `Target` and of the operands.
      *operands: pytrees of arrays.

    Returns:
      What `run` returns. Without a known platform, `run` is traced for every platform,
      and lowering keeps the one it is for.
    """

    def choose(platform: Platform) -> Callable[..., Result]:
        own = "cpu" if platform == "cpu" else "xla"
        target = Target(implementation or own, platform)
        return lambda *operands: run(target, *operands)

    if implementation in ("cpu", "reference"):
        # Their sizes do not depend on the platform.
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
      implementation: overrides the platform's choice.
      run: a function of an implementation's name and of the operands.
      *operands: pytrees of arrays.

    Returns:
      What `run` returns, as for `by_platform`; it is traced for two platforms only.
    """

    def choose(name: Implementation) -> Callable[..., Result]:
        return lambda *operands: run(name, *operands)

    if implementation is not None:
        return choose(implementation)(*operands)
    return lax.platform_dependent(*operands, cpu=choose("cpu"), default=choose("xla"))
