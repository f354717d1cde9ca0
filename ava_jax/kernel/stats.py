"""What the token losses know of a token's logits, and what they may ask for.

Every token loss is a small function of these numbers.
"""

from typing import NamedTuple

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ava_jax.kernel.platforms import Implementation


@flax.struct.dataclass
class TokenStats:
    """What the token losses know of each token's logits `z`.

    Logits are kept relative to `shift`, the token's largest one, so that logits of any
    size lose no precision; `shift` is a constant to differentiation, and any function
    of the distribution is free of it.

    Attributes:
      shift: the largest logit.
      log_sum: `log Σ exp(z − shift)`.
      pivot: what `log_rest_sum` is relative to, itself relative to `shift`: 0 unless
        the other logits are so far below that they would underflow; a constant to
        differentiation as well.
      log_rest_sum: `log Σ exp(z − shift − pivot)` over the classes but `top`; None
        unless complements were asked for.
      log_sum_tempered: `log Σ exp((z − shift)/T)`.
      temperature: T, a scalar.
      target: `z_y − shift`.
      total: `Σ_v (z_v − shift)` over the possible classes.
      count: how many classes are possible (finite, not padding).
      expected: `Σ_v p_v (z_v − shift)`.
      top: index of the largest logit, the first one if several are equal.
      is_top: whether that is the target.
      candidates: `z_c − shift` at the requested ids, by name, [..., Q].
      candidate_is_top: whether that id is `top`, by name.
    """

    shift: Float[Array, "*n"]
    log_sum: Float[Array, "*n"]
    pivot: Float[Array, "*n"]
    log_rest_sum: Float[Array, "*n"] | None
    log_sum_tempered: Float[Array, "*n"]
    temperature: Float[Array, ""]
    target: Float[Array, "*n"]
    total: Float[Array, "*n"]
    count: Float[Array, "*n"]
    expected: Float[Array, "*n"]
    top: Int[Array, "*n"]
    is_top: Bool[Array, "*n"]
    candidates: dict[str, Float[Array, "*n Q"]]
    candidate_is_top: dict[str, Bool[Array, "*n Q"]]

    @property
    def log_z(self) -> Float[Array, "*n"]:
        """`logsumexp(z)`."""
        return self.shift + self.log_sum

    @property
    def log_rest(self) -> Float[Array, "*n"]:
        """`log Σ exp(z − shift)` over the classes but `top`."""
        if self.log_rest_sum is None:
            raise ValueError(
                "complements are not known: pass Query(..., complements=True)"
            )
        return self.pivot + self.log_rest_sum

    @property
    def nll(self) -> Float[Array, "*n"]:
        """`−log p_y` at temperature 1."""
        return self.log_sum - self.target

    @property
    def entropy(self) -> Float[Array, "*n"]:
        """`−Σ p log p` at temperature 1, in nats."""
        return self.log_sum - self.expected

    @property
    def target_complement(self) -> Float[Array, "*n"]:
        """`log(1 − p_y)`, exact and finite also where p_y rounds to 1."""
        return self._complement(self.target, self.is_top, self.log_sum, self.log_rest)

    def unlikelihood(self, name: str) -> Float[Array, "*n Q"]:
        """`u(c) = −log(1 − p_c)` of the candidates `name`, finite at p → 1."""
        return -self._complement(
            self.candidates[name],
            self.candidate_is_top[name],
            self.log_sum[..., None],
            self.log_rest[..., None],
        )

    @staticmethod
    def _complement(logit, is_top, log_sum, log_rest):
        # A class that is not the largest has p ≤ 1/2, where log1p is exact.
        log_p = jnp.where(is_top, -jnp.ones_like(logit), logit - log_sum)
        return jnp.where(is_top, log_rest - log_sum, jnp.log1p(-jnp.exp(log_p)))


@flax.struct.dataclass
class Query:
    """Which numbers of a block of logits are wanted, besides the usual ones.

    Attributes:
      targets: the target ids.
      active: tokens that count; the logits of the others may hold anything.
      candidates: further ids, by name, [..., Q].
      complements: whether `log(1 − p)` of the target or a candidate will be asked for.
    """

    targets: Int[Array, "*n"]
    active: Bool[Array, "*n"]
    candidates: dict[str, Int[Array, "*n Q"]] = flax.struct.field(default_factory=dict)
    complements: bool = flax.struct.field(pytree_node=False, default=True)


class Kernel(NamedTuple):
    """How a block of logits is to be reduced, as the pass tells the objectives.

    Attributes:
      axis: see `Vocabulary`.
      finite: see `Vocabulary`.
      implementation: see `Vocabulary`.
    """

    axis: str | None = None
    finite: bool = False
    implementation: Implementation | None = None

    def vocabulary(self, size: int, soft_cap: float | None) -> "Vocabulary":
        """Returns the facts of a vocabulary that is reduced so."""
        return Vocabulary(size, soft_cap, *self)


class Vocabulary(NamedTuple):
    """The static facts of the vocabulary axis.

    Attributes:
      size: the true V; columns from it on are padding.
      soft_cap: of the logits, or None.
      axis: the mesh axis that shares the vocabulary, inside `jax.shard_map`; None if
        the logits have all columns.
      finite: promises that the logits of all tokens, inactive ones too, are numbers,
        so that nothing has to look for −inf and NaN; padding columns may exist.
      implementation: of the kernel; None leaves the choice to the platform.
    """

    size: int
    soft_cap: float | None = None
    axis: str | None = None
    finite: bool = False
    implementation: Implementation | None = None
