"""Blocks of the transformer: rotary attention inside segments, SwiGLU, experts."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from trainer.model.experts import Experts, Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The size of the transformer."""

    layers: int = 3
    """Number of transformer blocks."""
    width: int = 128
    """Size of a hidden state (D); a multiple of twice the number of heads."""
    heads: int = 4
    """Number of attention heads."""
    kv_heads: int = 0
    """Heads of keys and values, each shared by a group of the others; 0 gives each its
    own, and so does any number from `heads` up."""
    inner_width: int = 0
    """Inner width of SwiGLU; 0 for 8/3 of the width, a multiple of 32."""
    experts: int = 0
    """Experts per mixture layer (E); 0 makes every layer dense."""
    experts_per_token: int = 2
    """Experts that a token visits."""
    dense_layers: int = 1
    """How many of the first layers stay dense when there are experts."""
    attention_block: int = 0
    """Tokens whose attention is computed at a time, 0 for all: less memory and, as none
    looks at later blocks, less time; the scores are recomputed in the backward pass."""
    remat: bool = False
    """Recompute each block in the backward pass: less memory, more time."""
    scan: bool = False
    """Run the dense blocks as one loop: deep models compile faster. The parameters are
    stacked, so that a checkpoint is of one way or of the other."""

    def __post_init__(self) -> None:
        for name in ("kv_heads", "inner_width", "attention_block"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"model.{name} must be at least 0, got {getattr(self, name)}"
                )
        for name in ("layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"model.{name} must be at least 1, got {getattr(self, name)}"
                )
        if self.width % (2 * self.heads):
            raise ValueError(
                "model.width must be a multiple of 2 * model.heads, so that rotary "
                f"positions fit: got width={self.width}, heads={self.heads}"
            )
        if self.heads % self.key_heads:
            raise ValueError(
                "model.heads must be a multiple of model.kv_heads: got "
                f"{self.heads} and {self.kv_heads}"
            )
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(
                "model.experts_per_token must lie between 1 and model.experts: got "
                f"{self.experts_per_token} of {self.experts}"
            )
        if self.experts and not 0 <= self.dense_layers < self.layers:
            raise ValueError(
                f"model.dense_layers must lie between 0 and model.layers - 1 = "
                f"{self.layers - 1}, got {self.dense_layers}"
            )

    @property
    def key_heads(self) -> int:
        """Number of heads of keys and values."""
        return min(self.kv_heads or self.heads, self.heads)

    @property
    def inner(self) -> int:
        """Inner width of SwiGLU, its default rounded up to a multiple of 32."""
        return self.inner_width or -(-8 * self.width // (3 * 32)) * 32

    @property
    def expert_layers(self) -> int:
        """Number of layers with experts."""
        return self.layers - self.dense_layers if self.experts else 0


# A block that adds nothing at first learns faster than one that adds noise.
ZEROS = nn.initializers.zeros_init()


class Batch(NamedTuple):
    """Packed rows; segment 0 is padding, positions start again in every segment."""

    inputs: Int[Array, "*M B S"]
    targets: Int[Array, "*M B S"]
    segment_ids: Int[Array, "*M B S"]
    positions: Int[Array, "*M B S"]


def rotate(
    x: Float[Array, "B S H W"], positions: Int[Array, "B S"]
) -> Float[Array, "B S H W"]:
    """Rotary position embedding (Su et al. 2021), computed in float32."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        [left * cos - right * sin, left * sin + right * cos], axis=-1
    )
    return turned.astype(x.dtype)


def attend(
    query: Float[Array, "B S H W"],
    key: Float[Array, "B S G W"],
    value: Float[Array, "B S G W"],
    segments: Int[Array, "B S"],
    block: int,
) -> Float[Array, "B S H W"]:
    """Attends within segments, `block` queries at a time, or all at once if it is 0."""
    same = segments[:, None, :, None] == segments[:, None, None, :]
    if not block:
        return jax.nn.dot_product_attention(
            query, key, value, mask=same, is_causal=True
        )
    length = query.shape[1]
    mix = jax.checkpoint(jax.nn.dot_product_attention)
    parts = []
    for start in range(0, length, block):
        end = min(start + block, length)
        past = jnp.arange(start, end)[:, None] >= jnp.arange(end)
        seen = same[:, :, start:end, :end] & past
        parts.append(mix(query[:, start:end], key[:, :end], value[:, :end], mask=seen))
    return jnp.concatenate(parts, axis=1)


class Attention(nn.Module):
    """Causal attention that stays inside a segment.

    With a `cache_length` it continues where it stopped: keys and values are kept in the
    collection "cache", each at its position, and a token attends to all positions up to
    its own. Later positions are ignored, so rewinding means reading again from there. A
    row is then one segment; positions past the cache are dropped.
    """

    heads: int
    key_heads: int
    block: int
    dtype: DTypeLike
    cache_length: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], batch: Batch) -> Float[Array, "B S D"]:
        width = x.shape[-1]

        def project(name: str, heads: int) -> Float[Array, "B S H W"]:
            size = width // self.heads
            out = nn.Dense(heads * size, use_bias=False, dtype=self.dtype, name=name)(x)
            return out.reshape(*out.shape[:-1], heads, size)

        query = rotate(project("query", self.heads), batch.positions)
        key = rotate(project("key", self.key_heads), batch.positions)
        value = project("value", self.key_heads)
        if self.cache_length is None:
            mixed = attend(query, key, value, batch.segment_ids, self.block)
        else:
            positions, shared = batch.positions, self.heads // self.key_heads
            key, value = (jnp.repeat(x, shared, axis=2) for x in (key, value))
            mixed = self._attend_cached(query, key, value, positions, self.cache_length)
        out = nn.Dense(
            width, use_bias=False, dtype=self.dtype, kernel_init=ZEROS, name="merge"
        )
        return out(mixed.reshape(x.shape))

    def _attend_cached(
        self,
        query: Float[Array, "B S H W"],
        key: Float[Array, "B S H W"],
        value: Float[Array, "B S H W"],
        positions: Int[Array, "B S"],
        length: int,
    ) -> Float[Array, "B S H W"]:
        """Writes keys and values to the cache and attends to it up to each position.

        Rows and heads share an axis, and keys have their positions last: XLA multiplies
        a cache of this layout in place, and copies any other at every token.
        """
        rows, _, heads, width = query.shape
        lies = (rows * heads, width, length), (rows * heads, length, width)
        keys = self.variable("cache", "keys", jnp.zeros, lies[0], key.dtype)
        values = self.variable("cache", "values", jnp.zeros, lies[1], value.dtype)
        row = jnp.arange(rows)[:, None]
        by_row = keys.value.reshape(rows, heads, width, length)
        by_row = by_row.at[row, :, :, positions].set(key, mode="drop")
        keys.value = by_row.reshape(lies[0])
        by_row = values.value.reshape(rows, heads, length, width)
        by_row = by_row.at[row, :, positions].set(value, mode="drop")
        values.value = by_row.reshape(lies[1])
        asked = query.swapaxes(1, 2).reshape(rows * heads, -1, width)
        scores = jnp.einsum(
            "nsw,nwc->nsc", asked, keys.value, preferred_element_type=jnp.float32
        ).reshape(rows, heads, -1, length)
        seen = jnp.arange(length) <= positions[:, None, :, None]
        shares = jax.nn.softmax(jnp.where(seen, scores / width**0.5, -jnp.inf))
        shares = shares.astype(value.dtype).reshape(rows * heads, -1, length)
        mixed = jnp.einsum("nsc,ncw->nsw", shares, values.value)
        return mixed.reshape(rows, heads, -1, width).swapaxes(1, 2)


def make_attention(
    config: ModelConfig, dtype: DTypeLike, cache_length: int | None
) -> Attention:
    """The attention of a block."""
    sizes = config.heads, config.key_heads, config.attention_block
    return Attention(*sizes, dtype, cache_length, name="attention")


class SwiGLU(nn.Module):
    """silu(x·gate) · (x·up), projected back down (Shazeer 2020)."""

    inner: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        gate = nn.Dense(self.inner, use_bias=False, dtype=self.dtype, name="gate")(x)
        up = nn.Dense(self.inner, use_bias=False, dtype=self.dtype, name="up")(x)
        down = nn.Dense(
            x.shape[-1],
            use_bias=False,
            dtype=self.dtype,
            kernel_init=ZEROS,
            name="down",
        )
        return down(nn.silu(gate) * up)


class Block(nn.Module):
    """Attention, then SwiGLU; each after an RMSNorm, each residual."""

    config: ModelConfig
    dtype: DTypeLike
    cache_length: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], batch: Batch) -> Float[Array, "B S D"]:
        config, dtype = self.config, self.dtype
        normed = nn.RMSNorm(dtype=dtype, name="attention_norm")(x)
        x = x + make_attention(config, dtype, self.cache_length)(normed, batch)
        normed = nn.RMSNorm(dtype=dtype, name="mixer_norm")(x)
        return x + SwiGLU(config.inner, dtype, name="mixer")(normed)


class ExpertBlock(nn.Module):
    """Attention, then experts. `run_all` runs every expert on every token as well."""

    config: ModelConfig
    dtype: DTypeLike
    run_all: bool
    cache_length: int | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], batch: Batch, bias: Float[Array, "E"] | None
    ) -> tuple[Float[Array, "B S D"], Routing]:
        config, dtype = self.config, self.dtype
        normed = nn.RMSNorm(dtype=dtype, name="attention_norm")(x)
        x = x + make_attention(config, dtype, self.cache_length)(normed, batch)
        normed = nn.RMSNorm(dtype=dtype, name="mixer_norm")(x)
        experts = Experts(
            config.experts,
            config.experts_per_token,
            config.inner,
            dtype,
            self.run_all,
            name="experts",
        )
        mixed, routing = experts(normed, bias)
        return x + mixed, routing
