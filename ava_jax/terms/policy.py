"""Policy losses of reinforcement learning, as terms: one pass computes all of them."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from ava_jax.config import Settings, Weight
from ava_jax.inputs import LossInputs, Normalizers
from ava_jax.kernel.stats import TokenStats
from ava_jax.losses.arguments import check_choice, check_range
from ava_jax.losses.policy_tokens import (
    PolicyOptions,
    PolicyValues,
    check_policy_numbers,
    policy_values,
)
from ava_jax.reduce import as_float, safe_divide
from ava_jax.terms.base import Aux, Scalar, TokenInputs, TokenTerm
from ava_jax.tokens import Tokens

_ROW_MEANS = ("grpo", "sapo")
_KINDS = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
_CONSTANTS = ("old_log_probs", "ref_log_probs", "sampler_weights")


@dataclasses.dataclass(frozen=True)
class PolicyTerm(TokenTerm):
    """A policy loss whose ratios are those of tokens, see `losses.policy_loss`.

    It reads `extra_inputs`, each [B, S]: `advantages`, and if given `old_log_probs`,
    `ref_log_probs` and `sampler_weights`. The unmasked tokens are the completions'.

    Attributes:
      kind: `"grpo"`, `"bnpo"`, `"dr_grpo"`, `"dapo"`, `"cispo"` or `"sapo"`.
      clip_low: as in `losses.policy_loss`, like the eight that follow.
      clip_high: how far the ratio may move above 1.
      ratio_cap: an upper bound of the ratio.
      kl_weight: weight of the divergence from the reference.
      kl_estimator: `"k1"`, `"k2"` or `"k3"`.
      kl_importance_weighting: whether the divergence is multiplied by the ratio.
      entropy_weight: weight of the entropy.
      sapo_temperatures: of `"sapo"`.
      max_length: of `"dr_grpo"`.
      logits_temperature: the temperature that the tokens were sampled at.

    Example:
      >>> import jax.numpy as jnp
      >>> import ava_jax
      >>> from ava_jax import terms
      >>> loss_fn = ava_jax.compose([terms.PolicyTerm("dapo")], vocab_size=8)
      >>> loss, aux, _ = loss_fn(
      ...     loss_fn.init(), targets=jnp.array([[1, 2]]), logits=jnp.zeros((1, 2, 8)),
      ...     extra_inputs={"advantages": jnp.array([[1.0, 2.0]])})
      >>> round(float(loss), 4), float(aux["mean_ratio"])
      (-1.5, 1.0)

    References:
      Shao et al., DeepSeekMath, 2024 (GRPO); Yu et al., DAPO, 2025.
    """

    kind: str = "grpo"
    clip_low: float | None = None
    clip_high: float | None = None
    ratio_cap: float | None = None
    kl_weight: float = 0.0
    kl_estimator: str | None = None
    kl_importance_weighting: bool = False
    entropy_weight: float = 0.0
    sapo_temperatures: tuple[float, float] | None = None
    max_length: int | None = None
    logits_temperature: float = 1.0
    weight: Weight = 1.0
    name: str = "policy_loss"
    part = "main_loss"
    keys = ("policy_loss", "policy_kl", "clip_fraction", "mean_ratio", "policy_entropy")
    measured = ("policy_kl", "clip_fraction", "mean_ratio", "policy_entropy")
    requires = ("extra_inputs",)
    requires_extra = ("advantages",)
    accepts_extra = _CONSTANTS

    def __post_init__(self) -> None:
        if self.kind in ("luspo", "vespo"):
            raise ValueError(
                f"kind={self.kind!r} has one ratio a row, which a term of tokens "
                "cannot see: use token_log_probs and losses.policy_loss"
            )
        check_choice("kind", self.kind, _KINDS)
        if (self.max_length is not None) != (self.kind == "dr_grpo"):
            raise ValueError(
                'max_length, the longest completion, is for kind="dr_grpo", which '
                f"needs it; got kind={self.kind!r}, max_length={self.max_length}"
            )
        check_range("max_length", self.max_length, 0, inclusive=False)
        check_range("logits_temperature", self.logits_temperature, 0, inclusive=False)
        names = (field.name for field in dataclasses.fields(PolicyOptions))
        options = {name: getattr(self, name) for name in names}
        check_policy_numbers(PolicyOptions(**options), _KINDS)

    def check(self, inputs: LossInputs, settings: Settings) -> None:
        targets = inputs.get("targets")
        assert targets is not None
        given = inputs.get("extra_inputs") or {}
        if self._reads_reference and given.get("ref_log_probs") is None:
            raise ValueError(
                f"the term {self.name!r} needs extra_inputs['ref_log_probs'], [B, S], "
                "for kl_weight, kl_estimator and kl_importance_weighting"
            )
        for name in ("advantages", *_CONSTANTS):
            value = given.get(name)
            if value is not None and value.shape != targets.shape:
                raise ValueError(
                    f"extra_inputs[{name!r}] must have the shape {targets.shape} of "
                    f"targets, got {value.shape}"
                )

    @property
    def _reads_reference(self) -> bool:
        has_kind = self.kl_estimator is not None or self.kl_importance_weighting
        return has_kind or self.kl_weight != 0

    def prepare(self, tokens: Tokens) -> Float[Array, "B S"] | None:
        """Returns the sum of each row's weights, where rows have means of their own."""
        if self.kind not in _ROW_MEANS:
            return None
        totals = jnp.sum(tokens.weights, 1, keepdims=True)
        return jnp.broadcast_to(totals, tokens.weights.shape)

    def denominator(self, normalizers: Normalizers) -> Scalar:
        if self.kind in _ROW_MEANS:
            return normalizers.rows
        if self.kind == "dr_grpo":
            return normalizers.rows * as_float(self.max_length or 1)
        return normalizers.tokens

    def __call__(self, stats: TokenStats, inputs: TokenInputs) -> Float[Array, "B S"]:
        loss = self._values(stats, inputs).loss
        return loss if inputs.prepared is None else safe_divide(loss, inputs.prepared)

    def measurements(self, stats: TokenStats, inputs: TokenInputs) -> Aux:
        values = self._values(stats, inputs)
        kl = jnp.zeros_like(values.loss) if values.kl is None else values.kl
        return {
            "policy_kl": kl,
            "clip_fraction": as_float(values.is_clipped),
            "mean_ratio": values.ratio,
            "policy_entropy": stats.entropy,
        }

    def _values(self, stats: TokenStats, inputs: TokenInputs) -> PolicyValues:
        extra = inputs.extra
        return policy_values(
            -stats.nll,
            extra["advantages"],
            inputs.weights != 0,
            kind=self.kind,
            old_log_probs=extra.get("old_log_probs"),
            ref_log_probs=extra.get("ref_log_probs"),
            sampler_weights=extra.get("sampler_weights"),
            entropy=stats.entropy,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            ratio_cap=self.ratio_cap,
            kl_weight=self.kl_weight,
            kl_estimator=self.kl_estimator,
            kl_importance_weighting=self.kl_importance_weighting,
            entropy_weight=self.entropy_weight,
            sapo_temperatures=self.sapo_temperatures,
        )
