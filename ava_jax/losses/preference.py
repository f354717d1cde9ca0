"""Preference losses of sequences' log-probabilities, one per pair or row.

Each loss is unreduced: the mean, its denominator and any weights are the caller's, so
micro-batches and padding rows stay exact. So is `aux`, which has no gradient. The
reference's log-probabilities are constants.
"""

import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Bool, Float, Shaped

from ava_jax.annotations import with_checked_arrays
from ava_jax.arrays import as_weights
from ava_jax.losses.arguments import (
    Number,
    check_choice,
    check_range,
    check_read,
    is_on,
)
from ava_jax.losses.preference_kinds import PAIR_LOSSES, Pairs
from ava_jax.reduce import as_float, safe_divide

# Which kinds read an option; given to any other kind, it is an error.
_READERS = {
    "label_smoothing": ("robust", "exo_pair"),
    "discopop_temperature": ("discopop",),
}


def _report(
    chosen: Float[Array, "P"], rejected: Float[Array, "P"]
) -> dict[str, Float[Array, "P"]]:
    """Returns the rewards of pairs, their difference, and whether it is above 0."""
    aux = {
        "chosen_rewards": chosen,
        "rejected_rewards": rejected,
        "margin": chosen - rejected,
        "accuracy": as_float(chosen > rejected),
    }
    return stop_gradient(aux)


@with_checked_arrays
def sequence_log_probs(
    log_probs: Float[Array, "B S"],
    mask: Shaped[Array, "B S"],
    *,
    average: bool = False,
) -> Float[Array, "B"]:
    """Computes the log-probability of each row from those of its tokens.

    `Σ mask·log_probs`, with `average` divided by `Σ mask`.

    Args:
      log_probs: [B, S].
      mask: 1 at the tokens of the completion, [B, S], bool or numbers (a float is the
        token's weight); where it is 0 `log_probs` may hold NaN.
      average: whether to take the mean over the tokens.

    Returns:
      The log-probabilities [B], in nats; 0 for a row that is masked as a whole.

    Raises:
      ValueError: shapes do not match.
      TypeError: log-probabilities that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> losses.sequence_log_probs(
      ...     jnp.array([[-1.0, -2.0, -4.0]]), jnp.array([[0, 1, 1]])).tolist()
      [-6.0]
    """
    weights = as_weights("mask", mask)
    kept = jnp.where(weights != 0, as_float(log_probs), 0)
    sums = jnp.sum(weights * kept, axis=-1)
    return safe_divide(sums, jnp.sum(weights, axis=-1)) if average else sums


@with_checked_arrays
def dpo_loss(
    chosen: Float[Array, "P"],
    rejected: Float[Array, "P"],
    ref_chosen: Float[Array, "P"],
    ref_rejected: Float[Array, "P"],
    *,
    beta: Number = 0.1,
    kind: str = "sigmoid",
    label_smoothing: Number = 0.0,
    discopop_temperature: Number | None = None,
) -> tuple[Float[Array, "P"], dict[str, Float[Array, "P"]]]:
    """Computes the direct preference loss of each pair, against a reference.

    With `a = β(chosen − ref_chosen)`, `b = β(rejected − ref_rejected)` and `h = a − b`:

    - `"sigmoid"`: `−log σ(h)`;
    - `"hinge"`: `max(0, 1 − h)`;
    - `"ipo"`: `(h/β − 1/(2β))²`, of log-probabilities averaged over tokens;
    - `"robust"`: `(−(1 − ε)·log σ(h) + ε·log σ(−h)) / (1 − 2ε)`;
    - `"exo_pair"`: `σ(h)(log σ(h) − log(1 − ε)) + σ(−h)(log σ(−h) − log ε)`;
    - `"nca_pair"`: `−log σ(a) − ½·log σ(−a) − ½·log σ(−b)`;
    - `"bco_pair"`: `−log σ(a) − log σ(−b)`;
    - `"sppo_hard"`: `(a/β − 1/(2β))² + (b/β + 1/(2β))²`;
    - `"apo_zero"`: `1 − σ(a) + σ(b)`;
    - `"apo_down"`: `σ(a) + 1 − σ(h)`;
    - `"discopop"`: `−log σ(h)·(1 − m) + e^(−h)·m`, with `m = σ(h/τ)`.

    Args:
      chosen: log-probabilities of the preferred rows, [P].
      rejected: those of the others, [P].
      ref_chosen: those of the preferred rows under the reference, [P].
      ref_rejected: those of the others, [P].
      beta: β, above 0.
      kind: one of the above.
      label_smoothing: ε, the share of pairs labelled the wrong way round; for
        `"robust"` in [0, 0.5), for `"exo_pair"` in (0, 1) and required.
      discopop_temperature: τ for `"discopop"`; 0.05 if None.

    Returns:
      The losses [P]; and, each [P] and without a gradient, `chosen_rewards` a,
      `rejected_rewards` b, `margin` h, and `accuracy`, 1 where h > 0.

    Raises:
      ValueError: an unknown kind, an option that the kind does not read or lacks, a
        number out of its range, or shapes that differ.
      TypeError: log-probabilities that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> loss, aux = losses.dpo_loss(
      ...     jnp.array([-10.0]), jnp.array([-14.0]),
      ...     jnp.array([-11.0]), jnp.array([-12.0]), beta=0.5)
      >>> round(float(loss[0]), 4), float(aux["margin"][0])
      (0.2014, 1.5)

    References:
      Rafailov et al., Direct Preference Optimization, 2023.
      Zhao et al., SLiC-HF (`"hinge"`), 2023.
      Azar et al., A General Theoretical Paradigm (`"ipo"`), 2023.
      Chowdhury et al., Provably Robust DPO (`"robust"`), 2024.
      Ji et al., Towards Efficient Exact Optimization (`"exo_pair"`), 2024.
      Chen et al., Noise Contrastive Alignment (`"nca_pair"`), 2024.
      Jung et al., Binary Classifier Optimization (`"bco_pair"`), 2024.
      Wu et al., Self-Play Preference Optimization (`"sppo_hard"`), 2024.
      D'Oosterlinck et al., Anchored Preference Optimization (`"apo_*"`), 2024.
      Lu et al., Discovering Preference Optimization Algorithms (`"discopop"`), 2024.
    """
    _check_dpo(kind, beta, label_smoothing, discopop_temperature)
    chosen = as_float(chosen) - stop_gradient(as_float(ref_chosen))
    rejected = as_float(rejected) - stop_gradient(as_float(ref_rejected))
    scale, tau = as_float(beta), discopop_temperature
    pairs = Pairs(
        chosen=chosen,
        rejected=rejected,
        a=scale * chosen,
        b=scale * rejected,
        h=scale * (chosen - rejected),
        beta=scale,
        eps=as_float(label_smoothing),
        tau=as_float(0.05 if tau is None else tau),
    )
    return PAIR_LOSSES[kind](pairs), _report(pairs.a, pairs.b)


def _check_dpo(
    kind: str,
    beta: Number,
    label_smoothing: Number,
    discopop_temperature: Number | None,
) -> None:
    check_choice("kind", kind, PAIR_LOSSES)
    is_smoothed = is_on(label_smoothing)
    options = {
        "label_smoothing": label_smoothing if is_smoothed else None,
        "discopop_temperature": discopop_temperature,
    }
    check_read(kind, _READERS, options)
    if kind == "exo_pair" and not is_smoothed:
        raise ValueError(
            'kind="exo_pair" needs label_smoothing in (0, 1), such as 1e-3: without it '
            "the loss is infinite"
        )
    check_range("label_smoothing", label_smoothing, 0, 0.5 if kind == "robust" else 1)
    check_range("beta", beta, 0, inclusive=False)
    check_range("discopop_temperature", discopop_temperature, 0, inclusive=False)


def _log_one_minus_exp(s: Float[Array, "P"]) -> Float[Array, "P"]:
    """Computes `log(1 − e^s)` for s < 0 without cancellation (Mächler, 2012)."""
    is_near = s > -jnp.log(as_float(2))
    near = jnp.log(-jnp.expm1(jnp.where(is_near, s, -1)))
    far = jnp.log1p(-jnp.exp(jnp.where(is_near, -1, s)))
    return jnp.where(is_near, near, far)


def _log_odds(s: Float[Array, "P"]) -> Float[Array, "P"]:
    """Computes `log(p / (1 − p))` from `s = log p`, finite where p rounds to 1."""
    s = jnp.minimum(s, -jnp.finfo(s.dtype).tiny)
    return s - _log_one_minus_exp(s)


@with_checked_arrays
def orpo_loss(
    chosen: Float[Array, "P"], rejected: Float[Array, "P"], *, beta: Number = 0.1
) -> tuple[Float[Array, "P"], dict[str, Float[Array, "P"]]]:
    """Computes the odds-ratio preference loss of each pair, without a reference.

    `−β·log σ(log odds(chosen) − log odds(rejected))`, with `odds = p / (1 − p)` and
    `log p` averaged over the tokens of a row. The likelihood of the preferred rows,
    which the method trains besides, is the caller's to add.

    Args:
      chosen: mean log-probabilities of the preferred rows, [P], at most 0. At 0, where
        the odds are infinite, and above, which is rounding, a number counts as the one
        next to 0, without a gradient.
      rejected: those of the others, likewise.
      beta: β, above 0, the weight of the loss.

    Returns:
      The losses [P]; and, each [P] and without a gradient, `chosen_rewards` β·chosen,
      `rejected_rewards`, `margin`, their difference, and `accuracy`, 1 where it is
      above 0.

    Raises:
      ValueError: `beta` is not above 0, or shapes differ.
      TypeError: log-probabilities that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> loss, _ = losses.orpo_loss(
      ...     jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25])), beta=1.0)
      >>> round(float(loss[0]), 4)
      0.2877

    References:
      Hong et al., ORPO: Monolithic Preference Optimization without Reference Model,
      2024.
    """
    check_range("beta", beta, 0, inclusive=False)
    chosen, rejected, scale = as_float(chosen), as_float(rejected), as_float(beta)
    losses = -scale * log_sigmoid(_log_odds(chosen) - _log_odds(rejected))
    return losses, _report(scale * chosen, scale * rejected)


def _smoothed_logistic(
    h: Float[Array, "P"], label_smoothing: Number
) -> Float[Array, "P"]:
    """Computes `−(1 − ε)·log σ(h) − ε·log σ(−h)`."""
    eps = as_float(label_smoothing)
    return -(1 - eps) * log_sigmoid(h) - eps * log_sigmoid(-h)


@with_checked_arrays
def cpo_loss(
    chosen: Float[Array, "P"],
    rejected: Float[Array, "P"],
    *,
    beta: Number = 0.1,
    label_smoothing: Number = 0.0,
) -> tuple[Float[Array, "P"], dict[str, Float[Array, "P"]]]:
    """Computes the contrastive preference loss of each pair, without a reference.

    `−(1 − ε)·log σ(h) − ε·log σ(−h)` with `h = β(chosen − rejected)`. The likelihood of
    the preferred rows, which the method trains besides, is the caller's to add.

    Args:
      chosen: log-probabilities of the preferred rows, [P].
      rejected: those of the others, [P].
      beta: β, above 0.
      label_smoothing: ε in [0, 1), the share of pairs labelled the wrong way round.

    Returns:
      The losses [P]; and, each [P] and without a gradient, `chosen_rewards` β·chosen,
      `rejected_rewards`, `margin` h, and `accuracy`, 1 where h > 0.

    Raises:
      ValueError: a number is out of its range, or shapes differ.
      TypeError: log-probabilities that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> loss, _ = losses.cpo_loss(jnp.array([-2.0]), jnp.array([-4.0]), beta=0.5)
      >>> round(float(loss[0]), 4)
      0.3133

    References:
      Xu et al., Contrastive Preference Optimization, 2024.
    """
    check_range("beta", beta, 0, inclusive=False)
    check_range("label_smoothing", label_smoothing, 0, 1)
    a, b = as_float(beta) * as_float(chosen), as_float(beta) * as_float(rejected)
    return _smoothed_logistic(a - b, label_smoothing), _report(a, b)


@with_checked_arrays
def simpo_loss(
    chosen: Float[Array, "P"],
    rejected: Float[Array, "P"],
    *,
    beta: Number = 2.0,
    gamma: Number = 0.5,
    label_smoothing: Number = 0.0,
) -> tuple[Float[Array, "P"], dict[str, Float[Array, "P"]]]:
    """Computes the simple preference loss of each pair, which asks for a margin.

    `−(1 − ε)·log σ(h) − ε·log σ(−h)` with `h = β(chosen − rejected) − γ`, of
    log-probabilities averaged over the tokens of a row.

    Args:
      chosen: mean log-probabilities of the preferred rows, [P].
      rejected: those of the others, [P].
      beta: β, above 0.
      gamma: γ, the margin, at least 0.
      label_smoothing: ε in [0, 1), the share of pairs labelled the wrong way round.

    Returns:
      The losses [P]; and, each [P] and without a gradient, `chosen_rewards` β·chosen,
      `rejected_rewards`, `margin`, their difference without γ, and `accuracy`, 1 where
      it is above 0.

    Raises:
      ValueError: a number is out of its range, or shapes differ.
      TypeError: log-probabilities that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> loss, _ = losses.simpo_loss(jnp.array([-1.0]), jnp.array([-2.0]))
      >>> round(float(loss[0]), 4)
      0.2014

    References:
      Meng et al., SimPO: Simple Preference Optimization, 2024.
    """
    check_range("beta", beta, 0, inclusive=False)
    check_range("gamma", gamma, 0)
    check_range("label_smoothing", label_smoothing, 0, 1)
    a, b = as_float(beta) * as_float(chosen), as_float(beta) * as_float(rejected)
    return _smoothed_logistic(a - b - as_float(gamma), label_smoothing), _report(a, b)


@with_checked_arrays
def kto_loss(
    log_probs: Float[Array, "B"],
    ref_log_probs: Float[Array, "B"],
    desirable: Bool[Array, "B"],
    kl: Float[Array, ""] | Float[Array, "B"] | float | int | None = None,
    *,
    beta: Number = 0.1,
    desirable_weight: Number = 1.0,
    undesirable_weight: Number = 1.0,
) -> tuple[Float[Array, "B"], dict[str, Float[Array, "B"]]]:
    """Computes the Kahneman-Tversky loss of each row, which needs no pairs.

    `weight · (1 − σ(±β(log_probs − ref_log_probs − kl)))`, + for desirable rows.

    Args:
      log_probs: log-probabilities of the rows, [B].
      ref_log_probs: those under the reference, [B].
      desirable: whether a row is a good answer, bool [B].
      kl: the divergence of the policy from the reference that rewards are compared
        with, a number or one per row [B]; a constant. None is 0, which compares with
        the reference itself.
      beta: β, above 0.
      desirable_weight: weight of the desirable rows, at least 0.
      undesirable_weight: weight of the others, at least 0.

    Returns:
      The losses [B], and `rewards` [B], `β(log_probs − ref_log_probs)`, without a
      gradient.

    Raises:
      ValueError: a number is out of its range, or shapes differ.
      TypeError: log-probabilities that are not floating point, or `desirable` that is
        not bool.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> loss, _ = losses.kto_loss(
      ...     jnp.array([-10.0, -10.0]), jnp.array([-12.0, -12.0]),
      ...     jnp.array([True, False]), 1.0, beta=1.0)
      >>> [round(float(x), 4) for x in loss]
      [0.2689, 0.7311]

    References:
      Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization, 2024.
    """
    center = stop_gradient(as_float(0 if kl is None else kl))
    if center.shape not in ((), log_probs.shape):
        raise ValueError(
            f"kl must be a number or have the shape {log_probs.shape} of log_probs, "
            f"got {center.shape}"
        )
    check_range("beta", beta, 0, inclusive=False)
    check_range("desirable_weight", desirable_weight, 0)
    check_range("undesirable_weight", undesirable_weight, 0)
    ratio = as_float(log_probs) - stop_gradient(as_float(ref_log_probs))
    gain = as_float(beta) * (ratio - center)
    sign = jnp.where(desirable, -1.0, 1.0)
    weight = jnp.where(
        desirable, as_float(desirable_weight), as_float(undesirable_weight)
    )
    rewards = stop_gradient(as_float(beta) * ratio)
    return weight * sigmoid(sign * gain), {"rewards": rewards}
