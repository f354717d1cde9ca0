"""Sequential multi-token prediction: one transformer block per depth."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from ava_jax.arrays import as_labels
from ava_jax.heads.common import (
    RMSNorm,
    compute_dtype,
    require,
    require_hidden_states,
    require_shape,
    zero_masked,
)


class SequentialMTP(nn.Module):
    """Computes hidden states for K further tokens, each depth from the one before.

    For depth j = 1…K, from `h⁰ = hidden_states` and the input tokens' embeddings e:
    `hʲ_t = Block_j(M_j [RMSNorm(hʲ⁻¹_t); RMSNorm(e_{t+j})])`, with M_j of size D×2D and
    no bias. The embedding is zero where t+j is past the row or in another segment. With
    a causal block, hʲ_t depends on the input tokens up to t+j and on none after.

    Parameters, per depth j (from 1): `norm_hidden_j {scale}`, `norm_embedding_j
    {scale}`, `project_j {kernel [2D,D]}`, `block_j`, and `norm_final_j {scale}` with
    `use_final_norm`.

    Attributes:
      num_depths: K.
      block: constructs a transformer block when called as `block(name=...)`: a Linen
        class or a `functools.partial` of one. The block maps [B, S, D] to [B, S, D].
      use_final_norm: whether to apply an RMSNorm to the output (not to the input of the
        next depth), as the released DeepSeek-V3 does before its shared head.
      norm_epsilon: ε of every RMSNorm.
      dtype: dtype of the projections; `None` means that of the input.
      param_dtype: dtype of the norms' and projections' parameters.

    Raises:
      ValueError: an attribute has a value that is not allowed.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> from ava_jax.heads import SequentialMTP
      >>> block = functools.partial(nn.Dense, 4)
      >>> mtp = SequentialMTP(num_depths=2, block=block)
      >>> h = e = jnp.ones((1, 3, 4))
      >>> variables = mtp.init(jax.random.key(0), h, e)
      >>> mtp.apply(variables, h, e).shape
      (2, 1, 3, 4)

    References:
      DeepSeek-AI, DeepSeek-V3 Technical Report, 2024, equations 21–23.
    """

    num_depths: int
    block: Callable[..., nn.Module]
    use_final_norm: bool = False
    norm_epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        depths, block, epsilon = self.num_depths, self.block, self.norm_epsilon
        require(depths >= 1, "num_depths", depths, "at least 1")
        require(epsilon > 0, "norm_epsilon", epsilon, "above 0")
        require(
            callable(block) and not isinstance(block, nn.Module),
            "block",
            block,
            "a Linen class or a functools.partial of one, not a module already built",
        )
        super().__post_init__()

    def __call__(
        self,
        hidden_states: Float[Array, "B S D"],
        token_embeddings: Float[Array, "B S D"],
        *block_args: object,
        segment_ids: Int[Array, "B S"] | None = None,
        **block_kwargs: object,
    ) -> Float[Array, "K B S D"]:
        """Computes the hidden states of all depths, for the shared head.

        Args:
          hidden_states: [B, S, D], the main model's, before or after its final norm.
          token_embeddings: [B, S, D], of the main model's input tokens.
          *block_args: passed to every block after its input, as are `**block_kwargs`:
            attention masks, positions, `deterministic`.
          segment_ids: [B, S] of packed rows, 0 for padding, which is read as zeros.
            It is not passed to the blocks: pass their attention mask in `block_args`.
          **block_kwargs: see `block_args`.

        Returns:
          `mtp_hidden_states` [K, B, S, D] of the unified loss: entry j−1 at position t
          predicts `targets[t+j]`, the input token at t+j+1.

        Raises:
          ValueError: shapes do not match, or a block changes the shape.
        """
        require_hidden_states(hidden_states)
        require_shape("token_embeddings", token_embeddings, hidden_states.shape)
        x = hidden_states
        if segment_ids is not None:
            require_shape("segment_ids", segment_ids, x.shape[:2])
            x = zero_masked(x, segment_ids != 0)
        outputs = []
        for depth in range(1, self.num_depths + 1):
            ahead = _shift_left(token_embeddings, depth, segment_ids)
            x, output = self.depth(depth, x, ahead, *block_args, **block_kwargs)
            outputs.append(output)
        return jnp.stack(outputs)

    @nn.compact
    def depth(
        self,
        depth: int,
        hidden_states: Float[Array, "B S D"],
        ahead_embeddings: Float[Array, "B S D"],
        *block_args: object,
        **block_kwargs: object,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B S D"]]:
        """Computes a single depth, for drafting during decoding.

        `hʲ_t = Block_j(M_j [RMSNorm(hʲ⁻¹_t); RMSNorm(e_{t+j})])`.

        Args:
          depth: j, from 1 to K.
          hidden_states: [B, S, D], hʲ⁻¹ of any part of the row, as long as the block
            gets its positions; for depth 1 those of the main model.
          ahead_embeddings: [B, S, D]; position t holds that of the token at t+j.
          *block_args: passed to the block after its input.
          **block_kwargs: passed to the block.

        Returns:
          hʲ for the next depth, and this depth's output: the same, or its RMSNorm with
          `use_final_norm`.

        Raises:
          ValueError: shapes do not match, or a block changes the shape.

        Example:
          >>> import functools, jax, jax.numpy as jnp
          >>> import flax.linen as nn
          >>> from ava_jax.heads import SequentialMTP
          >>> mtp = SequentialMTP(2, functools.partial(nn.Dense, 4))
          >>> h = e = jnp.ones((1, 3, 4))
          >>> variables = mtp.init(jax.random.key(0), h, e)
          >>> first, _ = mtp.apply(variables, 1, h, e, method=SequentialMTP.depth)
          >>> bool(jnp.allclose(first[:, :2], mtp.apply(variables, h, e)[0, :, :2]))
          True
        """
        depths = self.num_depths
        require(1 <= depth <= depths, "depth", depth, f"between 1 and {depths}")
        require_hidden_states(hidden_states)
        require_shape("ahead_embeddings", ahead_embeddings, hidden_states.shape)
        dtype = compute_dtype(self.dtype, hidden_states)
        pair = (
            self._norm(f"norm_hidden_{depth}", hidden_states),
            self._norm(f"norm_embedding_{depth}", ahead_embeddings),
        )
        project = nn.Dense(
            hidden_states.shape[-1],
            use_bias=False,
            dtype=dtype,
            param_dtype=self.param_dtype,
            name=f"project_{depth}",
        )
        projected = project(jnp.concatenate(pair, axis=-1).astype(dtype))
        x = self.block(name=f"block_{depth}")(projected, *block_args, **block_kwargs)
        require_shape("the output of block", x, projected.shape)
        if not self.use_final_norm:
            return x, x
        return x, self._norm(f"norm_final_{depth}", x).astype(dtype)

    def _norm(self, name: str, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return RMSNorm(self.norm_epsilon, self.param_dtype, name=name)(x)


def _shift_left(
    x: Shaped[Array, "B S D"], offset: int, segment_ids: Int[Array, "B S"] | None
) -> Shaped[Array, "B S D"]:
    """Returns x[t + offset] at t; zeros where that is past the row or segment."""
    length = x.shape[1]
    offset = min(offset, length)
    shifted = jnp.pad(x[:, offset:], ((0, 0), (0, offset), (0, 0)))
    if segment_ids is None:
        return shifted
    segment_ids = as_labels("segment_ids", segment_ids)
    later = jnp.pad(segment_ids[:, offset:], ((0, 0), (0, offset)))
    inside = (segment_ids != 0) & (later == segment_ids)
    return zero_masked(shifted, inside)
