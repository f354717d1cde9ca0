"""The statistics of a token's logits, and the query that says which are needed.

Every token loss is a small function of these numbers.
"""

from typing import NamedTuple

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ava_jax.kernel.platforms import Implementation


@flax.struct.dataclass
class TokenStats:
    """The statistics of each token's logits `z`.

    Logits are stored relative to `shift`, the token's largest logit, so that logits of
    any magnitude keep their precision. `shift` is a constant under differentiation, and
    no function of the distribution depends on it.

    Attributes:
      shift: the largest logit.
      log_sum: `log Σ exp(z − shift)`.
      second_shift: a second shift, relative to the first: 0, unless the exponentials of
        all logits but the largest would underflow; then it is the second largest
        logit. It is a constant under differentiation as well.
      second_log_sum: `log Σ exp(z − shift − second_shift)` over all classes except
        `top`; None unless the query sets `log_one_minus_p`.
      log_sum_tempered: `log Σ exp((z − shift)/T)`.
      temperature: T, a scalar.
      target: `z_y − shift`.
      total: `Σ_v (z_v − shift)` over the possible classes.
      count: the number of possible classes (logit above −inf, not padding).
      expected: `Σ_v p_v (z_v − shift)`.
      top: index of the largest logit; the first one if several are equal.
      is_top: whether the target is `top`.
      candidates: `z_c − shift` at the query's candidates, by name, [..., Q].
      candidate_is_top: whether each candidate is `top`, by name.
      expected_tempered: `Σ_v p_v (z_v − shift)` with p at temperature T; None unless
        the query sets `tempered_entropy`.
    """

    shift: Float[Array, "*n"]
    log_sum: Float[Array, "*n"]
    second_shift: Float[Array, "*n"]
    second_log_sum: Float[Array, "*n"] | None
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
    expected_tempered: Float[Array, "*n"] | None = None

    @property
    def log_z(self) -> Float[Array, "*n"]:
        """`logsumexp(z)`."""
        return self.shift + self.log_sum

    @property
    def log_sum_without_top(self) -> Float[Array, "*n"]:
        """`log Σ exp(z − shift)` over all classes except `top`."""
        if self.second_log_sum is None:
            raise ValueError(
                "log(1 - p) was not computed: pass Query(..., log_one_minus_p=True)"
            )
        return self.second_shift + self.second_log_sum

    @property
    def log_sum_without_queried_top(self) -> Float[Array, "*n"]:
        """The same where `top` is the target or a candidate; elsewhere any number."""
        return self.log_sum_without_top

    @property
    def nll(self) -> Float[Array, "*n"]:
        """`−log p_y` at temperature 1."""
        return self.log_sum - self.target

    @property
    def tempered_nll(self) -> Float[Array, "*n"]:
        """`−log p_y` at temperature T."""
        return self.log_sum_tempered - self.target / self.temperature

    @property
    def entropy(self) -> Float[Array, "*n"]:
        """`−Σ p log p` at temperature 1, in nats."""
        return self.log_sum - self.expected

    @property
    def tempered_entropy(self) -> Float[Array, "*n"]:
        """`−Σ p log p` at temperature T, in nats."""
        if self.expected_tempered is None:
            raise ValueError(
                "the entropy at T was not computed: pass Query(..., "
                "tempered_entropy=True)"
            )
        return self.log_sum_tempered - self.expected_tempered / self.temperature

    @property
    def log_one_minus_p(self) -> Float[Array, "*n"]:
        """`log(1 − p_y)`, exact and finite even where p_y rounds to 1."""
        return _log_one_minus_p(
            self.target, self.is_top, self.log_sum, self.log_sum_without_queried_top
        )

    def unlikelihood(self, name: str) -> Float[Array, "*n Q"]:
        """Returns `−log(1 − p_c)` of the candidates `name`, finite as p → 1."""
        return -_log_one_minus_p(
            self.candidates[name],
            self.candidate_is_top[name],
            self.log_sum[..., None],
            self.log_sum_without_queried_top[..., None],
        )


def _log_one_minus_p(
    logit: Float[Array, "*n"],
    is_top: Bool[Array, "*n"],
    log_sum: Float[Array, "*#n"],
    log_sum_without_top: Float[Array, "*#n"],
) -> Float[Array, "*n"]:
    """Computes `log(1 − p)` of a class from its logit, all relative to the shift."""
    # A class other than the top has p ≤ 1/2, where log1p is exact.
    log_p = jnp.where(is_top, -jnp.ones_like(logit), logit - log_sum)
    of_top = log_sum_without_top - log_sum
    return jnp.where(is_top, of_top, jnp.log1p(-jnp.exp(log_p)))


@flax.struct.dataclass
class Query:
    """Which tokens and ids the statistics of a block of logits are computed for.

    Attributes:
      targets: the target ids.
      active: marks the unmasked tokens; the logits of masked ones may hold anything.
      candidates: further ids whose logits are needed, by name, [..., Q].
      log_one_minus_p: whether to compute what `log(1 − p)` of the target and of the
        candidates needs.
      tempered_entropy: whether to compute what the entropy at temperature T needs.
      top: whether `top` and `log_sum_without_top` are needed where the largest logit is
        neither the target's nor a candidate's. If not, `"xla"` reads given logits once
        for all statistics, instead of twice.
    """

    targets: Int[Array, "*n"]
    active: Bool[Array, "*n"]
    candidates: dict[str, Int[Array, "*n Q"]] = flax.struct.field(default_factory=dict)
    log_one_minus_p: bool = flax.struct.field(pytree_node=False, default=True)
    tempered_entropy: bool = flax.struct.field(pytree_node=False, default=False)
    top: bool = flax.struct.field(pytree_node=False, default=True)


class Kernel(NamedTuple):
    """How an objective has to reduce its block of logits; chosen by the pass.

    Attributes:
      axis: see `Vocabulary`.
      finite: see `Vocabulary`.
      implementation: see `Vocabulary`.
      precision: of the products that make logits, and of their gradients'.
      parts: see `Vocabulary`.
    """

    axis: str | None = None
    finite: bool = False
    implementation: Implementation | None = None
    precision: lax.PrecisionLike = None
    parts: int = 1

    def vocabulary(self, size: int, soft_cap: float | None) -> "Vocabulary":
        """Returns the static facts of a vocabulary that is reduced this way."""
        facts = self.axis, self.finite, self.implementation, self.parts
        return Vocabulary(size, soft_cap, *facts)


class Vocabulary(NamedTuple):
    """The static facts of the vocabulary axis.

    Attributes:
      size: the true V; columns from V on are padding.
      soft_cap: the soft-cap of the logits, or None.
      axis: the mesh axis that the vocabulary is sharded over, inside `jax.shard_map`;
        None if the logits have all columns.
      finite: promises that the logits of all tokens, masked ones included, are finite,
        so that no check for −inf and NaN is needed; padding columns may exist.
      implementation: the kernel's implementation; None selects it by platform.
      parts: how many equal parts of a row of logits `xla` sums apart; see
        `ava_jax.kernel.sizes.parts_of_row`.
    """

    size: int
    soft_cap: float | None = None
    axis: str | None = None
    finite: bool = False
    implementation: Implementation | None = None
    parts: int = 1
