"""A confidence gate, and heads that run only if the gate is confident."""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

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
from ava_jax.heads.parallel import MTPHeads
from ava_jax.reduce import as_float, safe_divide, weighted_mean

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": exact_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class ConfidenceGate(nn.Module):
    """Predicts the confidence in the extra heads, a number in (0, 1) per sequence.

    `c = sigmoid(Linear(LN(x_n)))`, with `x_{i+1} = dropout(act(Linear_i(LN_i(x_i))))`
    and x_0 the hidden states of one token, or their average over the row: weighted by
    the mask, `Σ w·h / Σ w`, or by attention, `softmax_t(a·h_t + log w_t)`.

    Parameters: `norm_0`, `dense_0`, …, one pair per hidden layer and one for the
    output, and `attention_pool` with attention pooling.

    Attributes:
      gate_hidden_dims: widths of the hidden layers.
      activation: `"gelu"` (exact), `"relu"` or `"silu"`.
      use_attention_pooling: whether to pool by learned attention instead of the mean.
      per_token: whether to predict one confidence per token, without pooling.
      dropout_rate: rate of the dropout after every activation.
      initial_confidence: the approximate output at initialization. The confidence
        regularizer of the adaptive loss moves confidences away from 1/2, so a gate that
        starts below 1/2 tends to switch the heads off for good.
      dtype: dtype of the layers; `None` means that of the input.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: an attribute has a value that is not allowed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from ava_jax.heads import ConfidenceGate
      >>> gate = ConfidenceGate(gate_hidden_dims=(8, 4))
      >>> h = jnp.ones((2, 3, 4))
      >>> variables = jax.jit(gate.init)(jax.random.key(0), h)
      >>> confidence = gate.apply(variables, h, jnp.array([[1, 1, 0], [1, 1, 1]]))
      >>> confidence.shape, bool(confidence[0, 0] == confidence[1, 0])
      ((2, 1), True)
    """

    gate_hidden_dims: Sequence[int] = (512, 256)
    activation: str = "gelu"
    use_attention_pooling: bool = False
    per_token: bool = False
    dropout_rate: float = 0.0
    initial_confidence: float = 0.7
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        self.gate_hidden_dims = dims = tuple(self.gate_hidden_dims)
        rate, start = self.dropout_rate, self.initial_confidence
        require(all(d >= 1 for d in dims), "gate_hidden_dims", dims, "at least 1 each")
        require_choice("activation", self.activation, tuple(_ACTIVATIONS))
        require(0 <= rate < 1, "dropout_rate", rate, "in [0, 1)")
        require(0 < start < 1, "initial_confidence", start, "in (0, 1)")
        if self.per_token:
            pools = self.use_attention_pooling
            require(
                not pools, "use_attention_pooling", pools, "False with per_token=True"
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        hidden_states: Float[Array, "B S D"],
        attention_mask: Mask | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B *S 1"]:
        """Computes the confidences.

        Args:
          hidden_states: [B, S, D].
          attention_mask: [B, S]; bool, int, or float weights. Positions of weight 0
            change nothing and may hold NaN. `None` masks no position.
          deterministic: `False` turns dropout on.

        Returns:
          [B, 1], or [B, S, 1] with `per_token`, in float32. A row (or token) that is
          masked gets the gate's finite output for a zero vector: leave it out of means.
        """
        require_hidden_states(hidden_states)
        dtype = compute_dtype(self.dtype, hidden_states)
        weights = token_weights(hidden_states, attention_mask)
        x = as_float(zero_masked(hidden_states, weights != 0))
        if not self.per_token:
            x = self._pool(x, weights, dtype)
        activation = _ACTIVATIONS[self.activation]
        for layer, features in enumerate(self.gate_hidden_dims):
            x = activation(self._norm_dense(x, layer, features, dtype))
            x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        logit = self._norm_dense(x, len(self.gate_hidden_dims), 1, dtype)
        return jax.nn.sigmoid(as_float(logit))

    def _pool(
        self, x: Float[Array, "B S D"], weights: Float[Array, "B S"], dtype: DTypeLike
    ) -> Float[Array, "B D"]:
        if not self.use_attention_pooling:
            total = jnp.sum(weights, axis=1, keepdims=True)
            return safe_divide(jnp.sum(weights[..., None] * x, axis=1), total)
        unmasked = weights != 0
        score = nn.Dense(
            1, dtype=dtype, param_dtype=self.param_dtype, name="attention_pool"
        )(x.astype(dtype))
        log_weights = jnp.log(jnp.where(unmasked, weights, jnp.ones_like(weights)))
        score = as_float(score[..., 0]) + log_weights
        attention = jax.nn.softmax(score, where=unmasked)
        return jnp.sum(attention[..., None] * x, axis=1)

    def _norm_dense(
        self, x: Float[Array, "... D"], layer: int, features: int, dtype: DTypeLike
    ) -> Float[Array, "... F"]:
        is_output = layer == len(self.gate_hidden_dims)
        odds = self.initial_confidence / (1 - self.initial_confidence)
        dense = nn.Dense(
            features,
            kernel_init=nn.initializers.variance_scaling(
                0.01 if is_output else 1.0, "fan_in", "truncated_normal"
            ),
            bias_init=nn.initializers.constant(math.log(odds) if is_output else 0.0),
            dtype=dtype,
            param_dtype=self.param_dtype,
            name=f"dense_{layer}",
        )
        normed = LayerNorm(self.param_dtype, name=f"norm_{layer}")(x)
        return dense(normed.astype(dtype))


@flax.struct.dataclass
class AdaptiveMTPOutput:
    """The output of `AdaptiveMTPHeads`; `**vars(output)` are arguments of the loss.

    Attributes:
      additional_logits: zeros if the heads were skipped.
      confidence_scores: per row, or per token with `per_token`.
      mtp_active: whether the heads ran.
    """

    additional_logits: Float[Array, "K B S V"]
    confidence_scores: Float[Array, "B *S 1"]
    mtp_active: Bool[Array, ""]


class AdaptiveMTPHeads(nn.Module):
    """Runs `MTPHeads` only if a `ConfidenceGate` is confident enough.

    The heads run if `step ≥ warmup_steps` and `mean(confidence) ≥
    confidence_threshold`. The mean is over rows with an unmasked token (over unmasked
    tokens, by weight, with `per_token`), and 0 if there is none. Otherwise `lax.cond`
    skips the heads and the logits are zeros. Under `vmap` both branches run.
    Parameters: `gate` of a `ConfidenceGate`, `heads` of `MTPHeads`.

    Attributes:
      num_heads: K.
      vocab_size: V.
      confidence_threshold: in [0, 1]; with 0 the gate never skips the heads.
      warmup_steps: the number of first steps in which the heads are skipped; above 0,
        `step` is a required argument.
      head_type, share_projections, intermediate_size, use_layer_norm: see `MTPHeads`.
      gate_hidden_dims, activation, use_attention_pooling, per_token,
        initial_confidence: see `ConfidenceGate`.
      dropout_rate: dropout rate of the gate, and of the heads if they are MLPs.
      dtype: dtype of the computation and the logits; `None` means that of the input.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: an attribute has a value that is not allowed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from ava_jax.heads import AdaptiveMTPHeads
      >>> module = AdaptiveMTPHeads(num_heads=2, vocab_size=5, warmup_steps=10)
      >>> h = jnp.ones((1, 3, 4))
      >>> variables = jax.jit(module.init)(jax.random.key(0), h, step=0)
      >>> apply = jax.jit(module.apply)
      >>> [bool(apply(variables, h, step=s).mtp_active) for s in (9, 10)]
      [False, True]
      >>> sorted(vars(apply(variables, h, step=0)))
      ['additional_logits', 'confidence_scores', 'mtp_active']
    """

    num_heads: int
    vocab_size: int
    confidence_threshold: float = 0.5
    warmup_steps: int = 0
    head_type: str = "linear"
    share_projections: bool = False
    intermediate_size: int | None = None
    use_layer_norm: bool = True
    gate_hidden_dims: Sequence[int] = (512, 256)
    activation: str = "gelu"
    use_attention_pooling: bool = False
    per_token: bool = False
    initial_confidence: float = 0.7
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        threshold, warmup = self.confidence_threshold, self.warmup_steps
        require(0 <= threshold <= 1, "confidence_threshold", threshold, "in [0, 1]")
        require(warmup >= 0, "warmup_steps", warmup, "at least 0")
        self.gate_hidden_dims = tuple(self.gate_hidden_dims)
        # Built only for their checks, so that bad options fail at construction.
        self._make_gate()
        self._make_heads()
        super().__post_init__()

    def _make_gate(self) -> ConfidenceGate:
        return ConfidenceGate(
            gate_hidden_dims=self.gate_hidden_dims,
            activation=self.activation,
            use_attention_pooling=self.use_attention_pooling,
            per_token=self.per_token,
            dropout_rate=self.dropout_rate,
            initial_confidence=self.initial_confidence,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            parent=None,
        )

    def _make_heads(self) -> MTPHeads:
        return MTPHeads(
            num_heads=self.num_heads,
            vocab_size=self.vocab_size,
            head_type=self.head_type,
            share_projections=self.share_projections,
            intermediate_size=self.intermediate_size,
            use_layer_norm=self.use_layer_norm,
            dropout_rate=self.dropout_rate if self.head_type == "mlp" else 0.0,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            parent=None,
        )

    def setup(self) -> None:
        self.gate = self._make_gate()
        self.heads = self._make_heads()

    def __call__(
        self,
        hidden_states: Float[Array, "B S D"],
        attention_mask: Mask | None = None,
        *,
        step: Int[Array, ""] | int | None = None,
        deterministic: bool = True,
    ) -> AdaptiveMTPOutput:
        """Computes the confidences and, unless they are skipped, the heads' logits.

        Args:
          hidden_states: [B, S, D].
          attention_mask: [B, S]; bool, int, or float weights. Positions of weight 0
            change nothing and may hold NaN. `None` masks no position.
          step: the number of optimizer steps so far, for the warm-up.
          deterministic: `False` turns dropout on.

        Returns:
          An `AdaptiveMTPOutput`.

        Raises:
          ValueError: `warmup_steps` is above 0 and `step` is missing.
        """
        confidence = self.gate(
            hidden_states, attention_mask, deterministic=deterministic
        )
        weights = token_weights(hidden_states, attention_mask)
        if not self.per_token:
            weights = as_float(jnp.any(weights != 0, axis=1))
        mean = weighted_mean(confidence[..., 0], weights)
        active = (mean >= self.confidence_threshold) & self._is_warm(step)

        def run(module: AdaptiveMTPHeads, x: Float[Array, "B S D"]) -> Array:
            return module.heads(x, attention_mask, deterministic=deterministic)

        def skip(module: AdaptiveMTPHeads, x: Float[Array, "B S D"]) -> Array:
            shape = (module.num_heads, *x.shape[:2], module.vocab_size)
            return jnp.zeros(shape, compute_dtype(module.dtype, x))

        if self.is_initializing():
            logits = run(self, hidden_states)
        else:
            logits = nn.cond(active, run, skip, self, hidden_states)
        return AdaptiveMTPOutput(logits, confidence, active)

    def _is_warm(self, step: Int[Array, ""] | int | None) -> Bool[Array, ""]:
        if step is not None:
            return jnp.asarray(step) >= self.warmup_steps
        if self.warmup_steps > 0:
            raise ValueError(f"step is required with warmup_steps={self.warmup_steps}")
        return jnp.asarray(True)
