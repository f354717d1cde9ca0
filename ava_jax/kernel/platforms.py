"""Selecting the kernel's implementation by platform.

The platform of the lowering decides, not the default backend: a program that is
compiled ahead of time on a CPU for a TPU gets the TPU's implementation.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import jax
from jax import lax
from jax.extend.backend import get_default_device
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import Mesh, get_abstract_mesh

Result = TypeVar("Result")

# The values of `implementation=`.
Implementation = Literal["reference", "cpu", "xla", "mosaic_gpu"]
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


# That of Hopper GPUs, whose instructions the kernel in Mosaic GPU consists of.
_CAPABILITY = "9.0"


def _lower_for_gpus(_: Any, x: Any) -> Any:
    """Lowers `_on_gpus`, unless the GPUs of this process cannot run the kernel."""
    card, named = get_default_device(), get_abstract_mesh().abstract_device
    is_here = named is None or named.device_kind == card.device_kind
    capability = getattr(card, "compute_capability", _CAPABILITY)
    if is_here and capability != _CAPABILITY:
        raise ValueError(
            "implementation='mosaic_gpu' is for GPUs of compute capability "
            f"{_CAPABILITY}, such as an H100, and {card.device_kind} has {capability}: "
            "leave it out, and the platform decides"
        )
    return [x]


_on_gpus = Primitive("on_gpus")
_on_gpus.def_abstract_eval(lambda x: x)
batching.defvectorized(_on_gpus)
mlir.register_lowering(_on_gpus, _lower_for_gpus)


@jax.jit
def _for_gpus(x: jax.Array) -> jax.Array:
    """Returns an array in programs for GPUs; others cannot be lowered with it."""
    return _on_gpus.bind(x)


def _refuse(platform: str) -> ValueError:
    return ValueError(
        f"implementation='mosaic_gpu' is for GPUs, and this program is for {platform}: "
        "leave it out, and the platform decides"
    )


def _lower_for(platform: str, *_: Any) -> Any:
    raise _refuse(platform)


for _other in ("cpu", "tpu"):
    mlir.register_lowering(
        _on_gpus, functools.partial(_lower_for, _other), platform=_other
    )


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

    Raises:
      ValueError: an implementation for GPUs on another platform, while tracing if the
        platform is known, else while lowering.
    """

    def choose(platform: Platform) -> Callable[..., Result]:
        own = "cpu" if platform == "cpu" else "xla"
        target = Target(implementation or own, platform)
        return lambda *operands: run(target, *operands)

    if implementation in ("cpu", "reference"):
        # Their sizes do not depend on the platform.
        platform = "cpu"
    if implementation == "mosaic_gpu":
        if platform not in (None, "gpu"):
            raise _refuse(platform)
        platform, operands = "gpu", jax.tree.map(_for_gpus, operands)
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
