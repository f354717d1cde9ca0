"""Mixture of experts without dropped tokens: sort by expert, multiply by groups."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ava_jax.losses import route


class Routing(NamedTuple):
    """Inputs of the balance terms; `outputs` only where every expert ran.

    Experts are chosen by `scores`, the softmax of `gate_logits`, plus the bias.
    """

    gate_logits: Float[Array, "N E"]
    scores: Float[Array, "N E"]
    indices: Int[Array, "N k"]
    outputs: Float[Array, "E N D"] | None


class Experts(nn.Module):
    """Top-k of several SwiGLU experts.

    Attributes:
      experts: how many (E).
      per_token: how many a token visits (k).
      inner: inner width of each expert.
      dtype: arithmetic of the matrix products; the router stays float32.
      run_all: return every expert's output for every token as well.
    """

    experts: int
    per_token: int
    inner: int
    dtype: DTypeLike
    run_all: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], bias: Float[Array, "E"] | None
    ) -> tuple[Float[Array, "B S D"], Routing]:
        width = x.shape[-1]
        tokens = x.reshape(-1, width)
        gate_logits = nn.Dense(
            self.experts, use_bias=False, dtype=jnp.float32, name="router"
        )(tokens.astype(jnp.float32))
        scores = jax.nn.softmax(gate_logits)
        offset = jnp.zeros(self.experts) if bias is None else bias
        weights, indices = route(scores, offset, self.per_token)
        gate, up, down = self._kernels(width)
        mixed = _dispatch(tokens, indices, weights.astype(x.dtype), gate, up, down)
        outputs = _run_all(tokens, gate, up, down) if self.run_all else None
        return mixed.reshape(x.shape), Routing(gate_logits, scores, indices, outputs)

    def _kernels(self, width: int) -> list[Float[Array, "E _ _"]]:
        init = nn.initializers.lecun_normal(batch_axis=0)
        shapes = {
            "gate": (self.experts, width, self.inner),
            "up": (self.experts, width, self.inner),
            "down": (self.experts, self.inner, width),
        }
        return [
            self.param(name, init, shape, jnp.float32).astype(self.dtype)
            for name, shape in shapes.items()
        ]


def _dispatch(
    tokens: Float[Array, "N D"],
    indices: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "N D"]:
    """Sends each token to its experts and adds up their weighted outputs."""
    per_token = indices.shape[-1]
    chosen = indices.reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    sizes = jnp.bincount(chosen, length=gate.shape[0]).astype(jnp.int32)
    grouped = tokens[order // per_token]
    inner = nn.silu(jax.lax.ragged_dot(grouped, gate, sizes))
    inner = inner * jax.lax.ragged_dot(grouped, up, sizes)
    answers = jax.lax.ragged_dot(inner, down, sizes)
    back = answers[jnp.argsort(order)].reshape(-1, per_token, tokens.shape[-1])
    return jnp.sum(back * weights[..., None], axis=1)


def _run_all(
    tokens: Float[Array, "N D"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "E N D"]:
    """Returns every expert's output for every token."""
    inner = nn.silu(jnp.einsum("nd,edf->enf", tokens, gate))
    inner = inner * jnp.einsum("nd,edf->enf", tokens, up)
    return jnp.einsum("enf,efd->end", inner, down)
