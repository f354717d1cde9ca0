"""Policy losses token by token: ratios, bounds, divergence from a reference.

All numbers of the policy that generated the tokens, of the reference and of the rewards
are constants: only `log_probs` and `entropy` get gradients. Masked positions may hold
anything, NaN included.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Num, Shaped

from ava_jax.annotations import with_checked_arrays
from ava_jax.arrays import as_weights
from ava_jax.losses.arguments import (
    Number,
    check_choice,
    check_floating,
    check_range,
    check_read,
    check_same_shape,
    is_on,
)
from ava_jax.reduce import as_float

_TOKEN_KINDS = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
# Which kinds read an option; given to any other kind, it is an error.
_READERS = {
    "ratio_cap": _CLIPPED,
    "sapo_temperatures": ("sapo",),
}


@flax.struct.dataclass
class PolicyValues:
    """The values of a policy loss at each token.

    Attributes:
      loss: `policy_loss + kl_weight · kl − entropy_weight · entropy`.
      policy_loss: the part made of the advantages, times the sampler's weights.
      kl: the estimated divergence from the reference; None without `ref_log_probs`.
      ratio: r.
      is_clipped: whether a bound has replaced the ratio, so that it has no gradient;
        for a bound that the kind does not clip at, whether the ratio is beyond it.
    """

    loss: Float[Array, "*n"]
    policy_loss: Float[Array, "*n"]
    kl: Float[Array, "*n"] | None
    ratio: Float[Array, "*n"]
    is_clipped: Bool[Array, "*n"]


@dataclasses.dataclass(frozen=True)
class PolicyOptions:
    """The options of a policy loss that act on each token; None is the default."""

    kind: str
    clip_low: Number | None
    clip_high: Number | None
    ratio_cap: Number | None
    kl_weight: Number
    kl_estimator: str | None
    kl_importance_weighting: bool
    entropy_weight: Number
    sapo_temperatures: tuple[Number, Number] | None


@dataclasses.dataclass(frozen=True)
class PolicyTokens:
    """The arrays of a policy loss, with 0 at masked positions.

    Attributes:
      weights: the mask as numbers.
      advantages: A.
      log_probs: those of the policy, with a gradient.
      log_ratio: `log_probs − old_log_probs`.
      ref_log_probs: those of the reference, if given.
      sampler_weights: if given; 1 at masked positions.
      entropy: if given, with a gradient.
    """

    weights: Float[Array, "*n"]
    advantages: Float[Array, "*n"]
    log_probs: Float[Array, "*n"]
    log_ratio: Float[Array, "*n"]
    ref_log_probs: Float[Array, "*n"] | None
    sampler_weights: Float[Array, "*n"] | None
    entropy: Float[Array, "*n"] | None


def read_policy_tokens(
    log_probs: Float[Array, "*n"],
    advantages: Num[Array, "*#n"],
    mask: Shaped[Array, "*n"] | None,
    constants: dict[str, Float[Array, "*n"] | None],
    entropy: Float[Array, "*n"] | None,
) -> PolicyTokens:
    """Zeroes masked positions before any arithmetic, and stops the constants."""
    check_floating("log_probs", log_probs)
    arrays = {"mask": mask, "entropy": entropy, **constants}
    check_same_shape("log_probs", log_probs.shape, **arrays)
    weights = jnp.ones_like(as_float(log_probs))
    if mask is not None:
        weights = as_weights("mask", mask)
    unmasked = weights != 0

    def clean(x: Num[Array, "*#n"], masked: int = 0) -> Float[Array, "*n"]:
        return jnp.where(unmasked, as_float(x), masked)

    def constant(name: str, masked: int = 0) -> Float[Array, "*n"] | None:
        x = constants[name]
        return None if x is None else stop_gradient(clean(x, masked))

    kept = clean(log_probs)
    old = constant("old_log_probs")
    return PolicyTokens(
        weights=stop_gradient(weights),
        advantages=stop_gradient(clean(advantages)),
        log_probs=kept,
        log_ratio=kept - (stop_gradient(kept) if old is None else old),
        ref_log_probs=constant("ref_log_probs"),
        sampler_weights=constant("sampler_weights", masked=1),
        entropy=None if entropy is None else clean(entropy),
    )


def check_policy_options(
    options: PolicyOptions, tokens: PolicyTokens, kinds: tuple[str, ...]
) -> None:
    """Raises on options that are unread, out of range, or lack their array."""
    check_policy_numbers(options, kinds)
    needed = {
        "kl_weight": is_on(options.kl_weight),
        "kl_estimator": options.kl_estimator is not None,
        "kl_importance_weighting": options.kl_importance_weighting,
    }
    for name, is_given in needed.items():
        if is_given and tokens.ref_log_probs is None:
            raise ValueError(
                f"{name} needs ref_log_probs, the reference's log-probabilities "
                f"{tokens.log_probs.shape}"
            )
    if is_on(options.entropy_weight) and tokens.entropy is None:
        raise ValueError(
            "entropy_weight needs entropy, that of the policy at each token, "
            f"{tokens.log_probs.shape}"
        )


def check_policy_numbers(options: PolicyOptions, kinds: tuple[str, ...]) -> None:
    """Raises on options that are unread, out of range or contradict each other."""
    check_choice("kind", options.kind, kinds)
    check_read(options.kind, _READERS, vars(options))
    check_choice("kl_estimator", options.kl_estimator or "k3", ("k1", "k2", "k3"))
    check_range("clip_low", options.clip_low, 0, 1, through=True)
    is_bound = options.kind != "cispo"
    check_range("clip_high", options.clip_high, 0, inclusive=is_bound)
    check_range("ratio_cap", options.ratio_cap, 0, inclusive=False)
    for temperature in options.sapo_temperatures or ():
        check_range("sapo_temperatures", temperature, 0, inclusive=False)
    check_range("kl_weight", options.kl_weight, 0)
    check_range("entropy_weight", options.entropy_weight)
    is_plain_k1 = options.kl_estimator == "k1" and not options.kl_importance_weighting
    if is_plain_k1 and is_on(options.kl_weight):
        raise ValueError(
            'kl_estimator="k1" with kl_weight has a gradient that does not depend on '
            'the reference: use "k2", whose gradient is that of the divergence, or '
            "kl_importance_weighting=True; kl_weight=0 only reports k1"
        )


def _bounded_exp(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Computes `e^x`, at most the square root of the largest float, with its slope."""
    bound = jnp.log(jnp.asarray(jnp.finfo(x.dtype).max, x.dtype)) / 2
    return jnp.exp(x - stop_gradient(jnp.maximum(x - bound, 0)))


def _clipped_loss(
    ratio: Float[Array, "*n"], advantages: Float[Array, "*n"], options: PolicyOptions
) -> tuple[Float[Array, "*n"], Bool[Array, "*n"]]:
    """Computes `−min(min(r, ratio_cap)·A, c·A)`, and where a bound was taken for r."""
    low = as_float(0.2 if options.clip_low is None else options.clip_low)
    high = as_float(0.2 if options.clip_high is None else options.clip_high)
    capped = ratio
    if options.ratio_cap is not None:
        capped = jnp.minimum(ratio, as_float(options.ratio_cap))
    clipped = jnp.clip(ratio, 1 - low, 1 + high)
    own = ratio * advantages
    surrogate = jnp.minimum(capped * advantages, clipped * advantages)
    # At a bound the ratio itself is taken, so that it keeps its whole gradient there.
    is_clipped = surrogate != own
    return -jnp.where(is_clipped, stop_gradient(surrogate), own), is_clipped


def _is_beyond(ratio: Float[Array, "*n"], options: PolicyOptions) -> Bool[Array, "*n"]:
    """Marks ratios beyond the given bounds, for a kind that does not clip at them."""
    is_beyond = jnp.zeros_like(ratio, dtype=bool)
    if options.clip_low is not None:
        is_beyond |= ratio < 1 - as_float(options.clip_low)
    if options.clip_high is not None and options.kind != "cispo":
        is_beyond |= ratio > 1 + as_float(options.clip_high)
    return is_beyond


def _soft_gate_loss(
    ratio: Float[Array, "*n"], advantages: Float[Array, "*n"], options: PolicyOptions
) -> Float[Array, "*n"]:
    """Computes `−4/τ · σ(τ(r − 1)) · A`, the loss of `"sapo"`."""
    positive, other = map(as_float, options.sapo_temperatures or (1.0, 1.05))
    temperature = jnp.where(advantages > 0, positive, other)
    gate = jax.nn.sigmoid(temperature * (ratio - 1))
    return -4 / temperature * gate * advantages


def _divergence(
    tokens: PolicyTokens, ratio: Float[Array, "*n"], options: PolicyOptions
) -> Float[Array, "*n"] | None:
    """Computes the estimate of the divergence from the reference."""
    if tokens.ref_log_probs is None:
        return None
    d = tokens.ref_log_probs - tokens.log_probs
    if options.kl_estimator == "k1":
        kl = -d
    elif options.kl_estimator == "k2":
        kl = d**2 / 2
    else:
        kl = _bounded_exp(d) - d - 1
    return ratio * kl if options.kl_importance_weighting else kl


def values_of(
    tokens: PolicyTokens,
    options: PolicyOptions,
    row_weight: Float[Array, "*n"] | None = None,
) -> PolicyValues:
    """Computes the values per token; `row_weight` is the φ of `"vespo"`."""
    ratio = _bounded_exp(tokens.log_ratio)
    is_clipped = _is_beyond(ratio, options)
    if row_weight is not None:
        policy = -row_weight * tokens.advantages * tokens.log_probs
    elif options.kind == "cispo":
        cap = as_float(5.0 if options.clip_high is None else options.clip_high)
        is_clipped |= ratio > cap
        weight = stop_gradient(jnp.minimum(ratio, cap))
        policy = -weight * tokens.advantages * tokens.log_probs
    elif options.kind == "sapo":
        policy = _soft_gate_loss(ratio, tokens.advantages, options)
    else:
        policy, is_clipped = _clipped_loss(ratio, tokens.advantages, options)
    if tokens.sampler_weights is not None and row_weight is None:
        policy = tokens.sampler_weights * policy
    kl, loss = _divergence(tokens, ratio, options), policy
    if kl is not None and is_on(options.kl_weight):
        loss += as_float(options.kl_weight) * kl
    if tokens.entropy is not None and is_on(options.entropy_weight):
        loss -= as_float(options.entropy_weight) * tokens.entropy
    return PolicyValues(loss, policy, kl, ratio, is_clipped)


@with_checked_arrays
def policy_values(
    log_probs: Float[Array, "*n"],
    advantages: Num[Array, "*n"],
    mask: Shaped[Array, "*n"] | None = None,
    *,
    kind: str = "grpo",
    old_log_probs: Float[Array, "*n"] | None = None,
    ref_log_probs: Float[Array, "*n"] | None = None,
    sampler_weights: Float[Array, "*n"] | None = None,
    entropy: Float[Array, "*n"] | None = None,
    clip_low: Number | None = None,
    clip_high: Number | None = None,
    ratio_cap: Number | None = None,
    kl_weight: Number = 0.0,
    kl_estimator: str | None = None,
    kl_importance_weighting: bool = False,
    entropy_weight: Number = 0.0,
    sapo_temperatures: tuple[Number, Number] | None = None,
) -> PolicyValues:
    """Computes the values of a policy loss token by token, without any mean.

    With `r = exp(log_probs − old_log_probs)`, and its formula and options as in
    `policy_loss`. No token sees another one, so the arrays may be any block of tokens.

    Args:
      log_probs: of the generated tokens, [...].
      advantages: A of each token, [...].
      mask: [...], bool or numbers; where it is 0 the arrays may hold NaN, and the
        values are those of zeros. Otherwise it changes nothing here. None is all ones.
      kind: `"grpo"`, `"bnpo"`, `"dr_grpo"`, `"dapo"` (which are one here), `"cispo"`
        or `"sapo"`.
      old_log_probs, ref_log_probs, sampler_weights, entropy: as in `policy_loss`, each
        [...].
      clip_low, clip_high, ratio_cap, kl_weight, kl_estimator, kl_importance_weighting,
        entropy_weight, sapo_temperatures: as in `policy_loss`.

    Returns:
      The values per token, each [...].

    Raises:
      ValueError: as `policy_loss`; `"luspo"` and `"vespo"` see whole rows.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> values = losses.policy_values(
      ...     jnp.log(jnp.array([0.9, 0.5])), jnp.ones(2),
      ...     old_log_probs=jnp.log(jnp.array([0.5, 0.5])))
      >>> [round(float(x), 4) for x in values.loss], values.is_clipped.tolist()
      ([-1.2, -1.0], [True, False])
    """
    options = PolicyOptions(
        kind=kind,
        clip_low=clip_low,
        clip_high=clip_high,
        ratio_cap=ratio_cap,
        kl_weight=kl_weight,
        kl_estimator=kl_estimator,
        kl_importance_weighting=kl_importance_weighting,
        entropy_weight=entropy_weight,
        sapo_temperatures=sapo_temperatures,
    )
    if kind in ("luspo", "vespo"):
        raise ValueError(f"kind={kind!r} sees whole rows: use policy_loss")
    constants = {
        "old_log_probs": old_log_probs,
        "ref_log_probs": ref_log_probs,
        "sampler_weights": sampler_weights,
    }
    check_same_shape("log_probs", log_probs.shape, advantages=advantages)
    tokens = read_policy_tokens(log_probs, advantages, mask, constants, entropy)
    check_policy_options(options, tokens, _TOKEN_KINDS)
    return values_of(tokens, options)
