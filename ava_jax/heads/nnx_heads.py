"""The head modules as NNX modules, with the parameters that they have in Linen."""

from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.nnx.bridge.variables import to_nnx_var
from jaxtyping import Array, PyTree


class NNXHeads(nnx.Module):
    """Makes an NNX module of a module of `ava_jax.heads`.

    Its state is its parameters and nothing else, under the names that they have in
    Linen: `heads.params` is what `module.init(...)["params"]` would be, so a checkpoint
    of either goes into the other, by `nnx.update(heads, params)` and
    `module.apply({"params": heads.params}, ...)`. Any Linen module whose variables are
    all parameters will do.

    Args:
      module: the Linen module, such as `MTPHeads(...)`.
      *inputs: what it will be called with; only shapes and dtypes are read, so
        `jax.ShapeDtypeStruct` will do. Axes of batch and sequence may be of size 1.
      rngs: the source of the parameters' keys. It is not kept: dropout takes its keys
        from the call's `rngs`.
      **options: keyword arguments of the call, such as `step=0`.

    Raises:
      ValueError: the module has variables that are no parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from ava_jax.heads import MTPHeads, NNXHeads
      >>> module, h = MTPHeads(num_heads=2, vocab_size=5), jnp.ones((1, 3, 4))
      >>> heads = NNXHeads(module, h, rngs=nnx.Rngs(0))
      >>> graphdef, params = nnx.split(heads, nnx.Param)
      >>> heads.params["heads"]["kernel"].shape, nnx.merge(graphdef, params)(h).shape
      ((2, 4, 5), (2, 1, 3, 5))
      >>> bool((heads(h) == module.apply({"params": heads.params}, h)).all())
      True
    """

    def __init__(
        self, module: nn.Module, *inputs: Any, rngs: nnx.Rngs, **options: Any
    ) -> None:
        keys = {"params": rngs.params()}
        keys |= {name: stream() for name, stream in rngs.items() if name not in keys}
        variables = module.lazy_init(keys, *inputs, **options)
        others = sorted(set(variables) - {"params"})
        if others:
            raise ValueError(
                f"module must have parameters only, got {type(module).__name__} with"
                f" variables in {others}; flax.nnx.bridge.ToNNX keeps those"
            )
        self.linen = module
        for name, tree in variables["params"].items():
            setattr(self, name, nnx.data(_as_params(tree)))

    @property
    def params(self) -> PyTree[Array]:
        """The parameters as plain arrays, under Linen's names.

        Those of `MTPHeads` are the `mtp_params` of the unified loss.
        """
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    def __call__(
        self, *inputs: Any, rngs: nnx.Rngs | None = None, **options: Any
    ) -> Any:
        """Computes what the Linen module computes.

        Args:
          *inputs: the arguments of the module.
          rngs: a key of each of its streams goes to the module; dropout takes that of
            `"dropout"`.
          **options: its keyword arguments, or `method=` as in `Module.apply`.

        Returns:
          The output of the module.
        """
        keys = {name: stream() for name, stream in (rngs or nnx.Rngs()).items()}
        variables = {"params": self.params}
        return self.linen.apply(variables, *inputs, rngs=keys, **options)


def _as_params(tree: PyTree[Array]) -> PyTree[nnx.Param]:
    """Makes parameters of the leaves, which keep the names of their axes, if any."""

    def is_leaf(x: object) -> bool:
        return isinstance(x, nn.meta.AxisMetadata)

    return jax.tree.map(lambda x: to_nnx_var("params", x), tree, is_leaf=is_leaf)
