"""Parallel multi-token-prediction heads: K predictions from one hidden state."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ava_jax.heads.common import (
    LayerNorm,
    Mask,
    compute_dtype,
    exact_gelu,
    require,
    require_choice,
    require_hidden_states,
    token_weights,
    zero_masked,
)


class _StackedDense(nn.Module):
    """K dense layers in one product, on a common input or on one input each."""

    num_heads: int
    features: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*K B S D"]) -> Float[Array, "heads B S F"]:
        kernel = self.param(
            "kernel",
            nn.initializers.lecun_normal(batch_axis=(0,)),
            (self.num_heads, x.shape[-1], self.features),
            self.param_dtype,
        )
        bias = self.param(
            "bias",
            nn.initializers.zeros_init(),
            (self.num_heads, self.features),
            self.param_dtype,
        )
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        inputs = "bsd" if x.ndim == 3 else "kbsd"
        return jnp.einsum(f"{inputs},kdf->kbsf", x, kernel) + bias[:, None, None]


class MTPHeads(nn.Module):
    """Computes the logits of K parallel heads on one normalized hidden state.

    `logits_j = W_j·LN(h) + b_j`, or `W_j·dropout(gelu(U_j·LN(h) + c_j)) + b_j` with
    `head_type="mlp"`. LN has a bias and epsilon 1e-5; gelu is exact.

    With the default options, the parameters are the `mtp_params` of the unified loss.
    By options, with I the intermediate size, they are:

    - linear: `norm {scale, bias}`, `heads {kernel [K,D,V], bias [K,V]}`
    - linear, shared: `norm`, `shared_heads {kernel [D,K·V], bias [K·V]}`
    - mlp: `norm`, `hidden {kernel [K,D,I], bias [K,I]}`,
      `output {kernel [K,I,V], bias [K,V]}`
    - mlp, shared: `norm`, `shared_hidden {kernel [D,I], bias [I]}`,
      `shared_output {kernel [I,K·V], bias [K·V]}`

    Attributes:
      num_heads: K, the number of tokens to predict beyond the next one.
      vocab_size: V.
      head_type: `"linear"` or `"mlp"`.
      share_projections: whether to use one network with K·V outputs, split among the
        heads.
      intermediate_size: I of the MLP heads; `None` means 4·D. Linear heads have none.
      use_layer_norm: whether to apply LN first.
      dropout_rate: dropout rate of the MLP heads. Linear heads have no dropout: their
        rate has to be 0.
      dtype: dtype of the computation and the logits; `None` means that of the input.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: an attribute has a value that is not allowed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from ava_jax.heads import MTPHeads
      >>> heads = MTPHeads(num_heads=2, vocab_size=5)
      >>> h = jnp.ones((1, 3, 4))
      >>> variables = heads.init(jax.random.key(0), h)
      >>> jax.tree.map(jnp.shape, variables["params"])["heads"]
      {'bias': (2, 5), 'kernel': (2, 4, 5)}
      >>> heads.apply(variables, h).shape
      (2, 1, 3, 5)

    References:
      Gloeckle et al., Better & Faster Large Language Models via Multi-token
      Prediction, 2024.
    """

    num_heads: int
    vocab_size: int
    head_type: str = "linear"
    share_projections: bool = False
    intermediate_size: int | None = None
    use_layer_norm: bool = True
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        size, rate = self.intermediate_size, self.dropout_rate
        require(self.num_heads >= 1, "num_heads", self.num_heads, "at least 1")
        require(self.vocab_size >= 1, "vocab_size", self.vocab_size, "at least 1")
        require_choice("head_type", self.head_type, ("linear", "mlp"))
        require(size is None or size >= 1, "intermediate_size", size, "at least 1")
        require(0 <= rate < 1, "dropout_rate", rate, "in [0, 1)")
        if self.head_type == "linear":
            require(rate == 0, "dropout_rate", rate, "0 with head_type='linear'")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        hidden_states: Float[Array, "B S D"],
        attention_mask: Mask | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "K B S V"]:
        """Computes the logits of all heads.

        Args:
          hidden_states: [B, S, D].
          attention_mask: [B, S]; positions of weight 0 are read as zeros, so that NaN
            in them reaches neither a value nor a gradient. `None` masks no position.
          deterministic: `False` turns dropout on.

        Returns:
          Logits [K, B, S, V]; entry j−1 at position t predicts `targets[t+j]`.
        """
        require_hidden_states(hidden_states)
        dtype = compute_dtype(self.dtype, hidden_states)
        x = hidden_states
        if attention_mask is not None:
            x = zero_masked(x, token_weights(x, attention_mask) != 0)
        if self.use_layer_norm:
            x = LayerNorm(self.param_dtype, name="norm")(x)
        x = x.astype(dtype)
        if self.head_type == "linear":
            return self._project(x, "heads", self.vocab_size, dtype)
        size = self.intermediate_size or 4 * x.shape[-1]
        x = exact_gelu(self._project(x, "hidden", size, dtype))
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        return self._project(x, "output", self.vocab_size, dtype)

    def _project(
        self, x: Float[Array, "*K B S D"], layer: str, features: int, dtype: DTypeLike
    ) -> Float[Array, "..."]:
        """Applies one layer, per head or shared; the last one has outputs per head."""
        if not self.share_projections:
            return _StackedDense(
                self.num_heads, features, dtype, self.param_dtype, name=layer
            )(x)
        is_last = layer != "hidden"
        width = self.num_heads * features if is_last else features
        out = nn.Dense(
            width, dtype=dtype, param_dtype=self.param_dtype, name=f"shared_{layer}"
        )(x)
        if not is_last:
            return out
        by_head = out.reshape(*out.shape[:-1], self.num_heads, features)
        return jnp.moveaxis(by_head, -2, 0)
