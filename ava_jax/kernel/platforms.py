"""Selecting the kernel's implementation by platform.

The platform of the lowering decides, not the default backend: a program that is
compiled ahead of time on a CPU for a TPU gets the TPU's implementation.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
from jax import lax
from jax.extend.backend import get_default_device
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AxisType, Mesh, get_abstract_mesh

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


# That of Hopper GPUs, whose instructions the kernel in Mosaic GPU consists of, and how
# they are called: an abstract device has no other mark.
_CAPABILITY = "9.0"
HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")
# The oldest JAX with the kernel's parts of Mosaic GPU.
OLDEST_JAX = (0, 10, 2)


def _card_of(meshes: Sequence[Any]) -> Any:
    """Returns the device, or its description, that a GPU's program will be for.

    That is the one of the first mesh that names one, else the default device. Of a
    program that is compiled ahead of time elsewhere, for a GPU that only its sharding
    names, nothing is known.
    """
    named = [x.abstract_device for x in meshes if x.abstract_device is not None]
    card = get_default_device()
    is_here = not named or named[0].device_kind == card.device_kind
    return card if is_here else named[0]


def _is_hopper(card: Any) -> bool:
    capability = getattr(card, "compute_capability", None)
    if capability is None:
        return HOPPER.search(card.device_kind) is not None
    return capability == _CAPABILITY


def _takes_kernel(operands: Any) -> bool:
    """Returns whether a GPU's program should contain the kernel in Mosaic GPU.

    XLA cannot partition a kernel: where it partitions a program, every device would
    compute the kernel for all tokens. So it has to be known that it does not: there is
    one device, or the program is that of a device of a mesh, within `shard_map`.
    """
    if jax.__version_info__ < OLDEST_JAX:
        return False
    context = get_abstract_mesh()
    of_operands = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(operands)]
    meshes = [context, *of_operands]
    if not _is_hopper(_card_of(meshes)):
        return False
    if context.axis_types and set(context.axis_types) == {AxisType.Manual}:
        return True
    if any(x.abstract_device is not None for x in meshes):
        return all(x.size <= 1 for x in meshes)
    return jax.device_count() == 1


def _lower_for_gpus(context: Any, x: Any) -> Any:
    """Lowers `_on_gpus`, unless the GPUs are known to be unable to run the kernel."""
    card = _card_of([get_abstract_mesh()])
    if getattr(card, "platform", "gpu") != "cpu" and not _is_hopper(card):
        raise ValueError(
            "implementation='mosaic_gpu' is for GPUs of compute capability "
            f"{_CAPABILITY}, such as an H100, and this program is for "
            f"{card.device_kind}: leave it out, and the platform decides"
        )
    # Within shard_map the context is another one.
    count = getattr(context.module_context.axis_context, "num_devices", 1)
    if count > 1:
        raise ValueError(
            f"implementation='mosaic_gpu' in a program that XLA partitions for {count} "
            "devices would be computed by each for all tokens: pass mesh= as well, or "
            "leave it out"
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
      and lowering keeps the one it is for. On a GPU that is the kernel in Mosaic GPU
      where the GPU is known to run it.

    Raises:
      ValueError: an implementation for GPUs on another platform, while tracing if the
        platform is known, else while lowering.
    """

    def choose(platform: Platform) -> Callable[..., Result]:
        own = "cpu" if platform == "cpu" else "xla"
        if platform == "gpu" and not implementation and _takes_kernel(operands):
            own = "mosaic_gpu"
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
