"""Helpers of the tests of the batch losses."""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar, cast

import chex
import jax
import jaxtyping
import numpy as np
from hypothesis import settings
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpy.typing import NDArray

P = ParamSpec("P")
R = TypeVar("R")
FEW = settings(max_examples=25, deadline=None)
STATIC = (
    "loss",
    "bins",
    "k",
    "kind",
    "margin",
    "momentum",
    "normalize",
    "rate",
    "similarity",
    "weight",
)


@functools.partial(jax.jit, static_argnames=STATIC)
def value_of(loss: Callable[..., R], *arrays: jax.Array | NDArray, **options) -> R:
    """Calls a function under jit: one compilation for each shape."""
    return loss(*arrays, **options)


@functools.partial(jax.jit, static_argnames=STATIC)
def value_and_gradient(
    loss: Callable[..., jax.Array], x: jax.Array | NDArray, **options
) -> tuple[jax.Array, jax.Array]:
    """The loss and its gradient with respect to its first argument, under jit."""
    return jax.value_and_grad(functools.partial(loss, **options))(x)


def check_gradient(
    loss: Callable[..., jax.Array], *arrays: NDArray, tolerance: float = 1e-6
) -> None:
    """Compares the gradient with central differences, in float64.

    Along random directions, as `jax.test_util.check_grads` does in its reverse mode,
    and by one program.
    """
    # Another seed than that of `values`: directions are not the arrays themselves.
    rng, step = np.random.default_rng(1234), 1e-5
    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(loss, tuple(range(len(arrays)))))
        wide = [np.asarray(x, np.float64) for x in arrays]
        gradients = run(*wide)[1]
        for _ in range(3):
            along = [rng.normal(size=x.shape) for x in wide]
            ahead, behind = (
                float(run(*(x + h * d for x, d in zip(wide, along, strict=True)))[0])
                for h in (step, -step)
            )
            pairs = zip(gradients, along, strict=True)
            slope = sum(np.vdot(gradient, d) for gradient, d in pairs)
            np.testing.assert_allclose(
                slope, (ahead - behind) / (2 * step), rtol=tolerance, atol=tolerance
            )


def values(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Normal numbers, float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def check_explicit_axes(
    loss: Callable[..., jax.Array], *arrays: jax.Array, axis: int = 0
) -> None:
    """Compares value and gradient with those of explicitly sharded arrays."""
    plain = jax.jit(jax.value_and_grad(loss))(*arrays)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    spec = PartitionSpec(*(None,) * axis, "data")
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays]
        split = jax.jit(jax.value_and_grad(loss))(*sharded)
    assert split[1].sharding.is_equivalent_to(sharded[0].sharding, arrays[0].ndim)
    chex.assert_trees_all_close(jax.device_get(split), plain, rtol=1e-5, atol=1e-6)


@contextlib.contextmanager
def untyped() -> Iterator[None]:
    """Turns the annotations' checks off, to meet the library's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


class VariantsCase(chex.TestCase):
    """A test case whose `self.under` has a type, unlike chex's `self.variant`."""

    def under(self, function: Callable[P, R]) -> Callable[P, R]:
        """The function, with or without jit."""
        return operator.attrgetter("variant")(self)(function)


Decorator = Callable[[Callable[P, R]], Callable[P, R]]
with_and_without_jit = cast(Decorator, chex.variants(with_jit=True, without_jit=True))
