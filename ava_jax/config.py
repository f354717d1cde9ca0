"""The frozen configuration of the unified loss, checked when it is built."""

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.lax import PrecisionLike
from jaxtyping import Array, Float, Int

from ava_jax.aliases import suggestion
from ava_jax.kernel.platforms import Implementation
from ava_jax.ranges import WEIGHTS, check_fields
from ava_jax.reduce import as_float

Weight = float | optax.Schedule

PrimaryLossType = Literal["standard", "deepseek", "adaptive_mtp"]
MTPType = Literal["parallel", "sequential", "adaptive", "deepseek"]
PenaltySource = Literal["predictions", "targets"]
BalancingType = Literal["gradient", "bias", "quantile"]
ContrastiveType = Literal["infonce", "margin", "triplet", "simctg"]
Similarity = Literal["cosine", "l2", "dot"]


def weight_at(weight: Weight, step: Int[Array, ""]) -> Float[Array, ""]:
    """Returns a number, or a schedule's value at the step."""
    return as_float(jnp.asarray(weight(step) if callable(weight) else weight))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The part of a config that no term owns.

    Attributes:
      vocab_size: V.
      hidden_size: D, if it is to be checked.
      ignore_index: a target id that carries no weight.
      pad_token_id: target id that is padding where no attention mask is given.
      eos_token_id: the end-of-sequence id, which may be the padding too.
      mask_boundaries: see `UnifiedLossConfig`.
      logit_soft_cap: of every logit, or None.
      chunk_size: see `UnifiedLossConfig`.
      block_size: likewise.
      implementation: likewise.
      precision: likewise.
    """

    vocab_size: int
    hidden_size: int | None
    ignore_index: int
    pad_token_id: int | None
    eos_token_id: int | None
    mask_boundaries: bool
    logit_soft_cap: float | None
    chunk_size: int | None
    block_size: int | None
    implementation: Implementation | None
    precision: PrecisionLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnifiedLossConfig:
    """Which terms the unified loss has, and their constants.

    Every field whose name ends in `_weight`, and `bias_update_rate`, may be an optax
    schedule `step -> number`, evaluated at `state.step`. A config is hashable.

    By default the main loss is that of `softmax(z/T)`, and T moves: decode and evaluate
    with `fold_temperature(lm_head, state)`. Read at T = 1, such a model has about three
    times its perplexity. `adaptive_temperature=False` keeps T at 1.

    Args:
      vocab_size: V, the number of classes; further columns of the logits are padding.
      hidden_size: D, required for `mtp_type="parallel"`.
      primary_loss_type: `"standard"` (T = 1), `"deepseek"` (T from the state) or
        `"adaptive_mtp"`.
      ignore_index: a target id that carries no weight.
      initial_temperature: the temperature of the first step.
      adaptive_temperature: whether the temperature follows the recent losses.
      min_temperature: lower bound of the adaptive temperature.
      max_temperature: upper bound of the adaptive temperature.
      temperature_rate: by how much the temperature moves in a step.
      temperature_heat_threshold: coefficient of variation above which it rises.
      temperature_cool_threshold: coefficient of variation below which it falls.
      temperature_history: how many recent losses are kept.
      temperature_min_history: how many losses must be known before it moves.
      label_smoothing: mass ε in [0, 1) given to the other V−1 classes.
      use_focal_loss: replaces the cross-entropy of the main loss by the focal loss.
      focal_alpha: weight of the focal loss, a number or one per class.
      focal_gamma: focusing exponent γ ≥ 0.
      z_loss_weight: weight of mean(log_z²), part of the main loss.
      use_mtp: adds a multi-token-prediction loss to the primary loss.
      mtp_type: `"parallel"` (heads with matrices of their own; alias `"deepseek"`),
        `"sequential"` (depths, shared head) or `"adaptive"` (logits and confidences).
      num_future_tokens: K, the number of heads or depths.
      mtp_weight: weight of the multi-token-prediction loss.
      use_confidence_weighting: scales the adaptive heads by the mean confidence.
      stop_confidence_gradient: cuts the gradient through that weight.
      confidence_reg_strength: weight of the confidence regulariser.
      penalty_source: `"predictions"` (penalties have a gradient) or `"targets"`
        (the PyTorch numbers, which have none).
      use_ngram_penalty: turns on the n-gram term and the token diversity.
      ngram_size: n, the length of a repeated n-gram.
      ngram_max_matches: how many earlier matches of a context are penalized.
      ngram_penalty_weight: weight of both.
      use_immediate_repetition_penalty: turns on the penalty of repeating a token.
      immediate_repetition_weight: its weight.
      unlikelihood_weight: weight of token unlikelihood; 0 turns it off.
      contrastive_token_weight: weight of the contrastive token loss; 0 turns it off.
      contrastive_token_window: how many targets before a token it looks at.
      eos_token_id: the end-of-sequence id; turns on the early-EOS penalty.
      pad_token_id: target id that is padding where no attention mask is given.
      mask_boundaries: of packed rows, leaves out the first target of each segment but a
        row's first: it is predicted from the document before. The loss is then that of
        documents in rows of their own.
      min_sequence_length: positions below it are early for an EOS.
      eos_penalty_weight: weight of the early-EOS penalty, part of the main loss.
      num_experts: E, required by the mixture-of-experts terms.
      num_moe_layers: keeps one balance per layer (inputs then need the leading layer
        axis L); without it, layers are averaged into one.
      use_moe_balancing: turns expert balancing on.
      moe_balancing_type: `"gradient"`, `"bias"` or `"quantile"`.
      gradient_balance_weight: weight of gradient-style balancing.
      bias_update_rate: step u of the routing bias, for `"bias"`.
      balancing_bins: bins of the histograms of `"quantile"`.
      bias_momentum: share in [0, 1) of the old bias that `"quantile"` keeps.
      use_auxiliary_loss: turns on load balancing, router z-loss and, with expert
        outputs, expert diversity.
      load_balancing_weight: weight of the load balancing.
      router_z_weight: weight of the router z-loss.
      use_diversity_loss: turns on the similarity of expert outputs.
      diversity_weight: its weight.
      diversity_similarity: `"cosine"`, `"l2"` or `"dot"`.
      use_contrastive_loss: turns on a contrastive loss of `embeddings`
        (`hidden_states` for `"simctg"`).
      contrastive_type: `"infonce"`, `"margin"`, `"triplet"` or `"simctg"`.
      contrastive_weight: its weight.
      contrastive_temperature: temperature of `"infonce"`.
      contrastive_margin: margin of the other three.
      logit_soft_cap: every logit z becomes cap·tanh(z/cap), on both paths.
      chunk_size: tokens of a row whose logits the fused path makes at a time; `None`
        chooses by device and shape.
      block_size: tokens of a row whose logits are reduced at a time; `None` chooses.
      implementation: the kernel's, `"reference"`, `"cpu"`, `"xla"` or `"mosaic_gpu"`
        (H100 and H200); `None` follows the platform of the lowering.
      precision: of the three products with `lm_head`, see `jax.lax.Precision`; by
        default a TPU multiplies float32 in bfloat16.

    Raises:
      TypeError: a field has the wrong type.
      ValueError: a field is out of its range, or a term lacks a field it needs.

    Example:
      >>> from ava_jax import UnifiedLossConfig
      >>> UnifiedLossConfig(vocab_size=50257, label_smoothing=0.05).num_future_tokens
      3
    """

    vocab_size: int
    hidden_size: int | None = None
    primary_loss_type: PrimaryLossType = "deepseek"
    ignore_index: int = -100
    initial_temperature: float = 1.0
    adaptive_temperature: bool = True
    min_temperature: float = 0.5
    max_temperature: float = 2.0
    temperature_rate: float = 0.01
    temperature_heat_threshold: float = 0.1
    temperature_cool_threshold: float = 0.05
    temperature_history: int = 100
    temperature_min_history: int = 10
    label_smoothing: float = 0.1
    use_focal_loss: bool = False
    focal_alpha: float | tuple[float, ...] = 1.0
    focal_gamma: float = 2.0
    z_loss_weight: Weight = 0.0
    use_mtp: bool = False
    mtp_type: MTPType = "parallel"
    num_future_tokens: int = 3
    mtp_weight: Weight = 0.1
    use_confidence_weighting: bool = True
    stop_confidence_gradient: bool = False
    confidence_reg_strength: float = 0.01
    penalty_source: PenaltySource = "predictions"
    use_ngram_penalty: bool = True
    ngram_size: int = 4
    ngram_max_matches: int = 8
    ngram_penalty_weight: Weight = 0.1
    use_immediate_repetition_penalty: bool = True
    immediate_repetition_weight: Weight = 0.5
    unlikelihood_weight: Weight = 0.0
    contrastive_token_weight: Weight = 0.0
    contrastive_token_window: int = 60
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    mask_boundaries: bool = False
    min_sequence_length: int = 20
    eos_penalty_weight: Weight = 0.05
    num_experts: int | None = None
    num_moe_layers: int | None = None
    use_moe_balancing: bool = False
    moe_balancing_type: BalancingType = "gradient"
    gradient_balance_weight: Weight = 0.1
    bias_update_rate: Weight = 1e-3
    balancing_bins: int = 1000
    bias_momentum: float = 0.0
    use_auxiliary_loss: bool = False
    load_balancing_weight: Weight = 1e-4
    router_z_weight: Weight = 1e-3
    use_diversity_loss: bool = False
    diversity_weight: Weight = 0.01
    diversity_similarity: Similarity = "cosine"
    use_contrastive_loss: bool = False
    contrastive_type: ContrastiveType = "infonce"
    contrastive_weight: Weight = 0.1
    contrastive_temperature: float = 0.07
    contrastive_margin: float = 0.5
    logit_soft_cap: float | None = None
    chunk_size: int | None = None
    block_size: int | None = None
    implementation: Implementation | None = None
    precision: PrecisionLike = None

    def __post_init__(self) -> None:
        if self.mtp_type == "deepseek":
            object.__setattr__(self, "mtp_type", "parallel")
        is_list = isinstance(self.focal_alpha, Sequence)
        is_list &= not isinstance(self.focal_alpha, str)
        if is_list or hasattr(self.focal_alpha, "shape"):
            alpha = tuple(float(a) for a in jnp.ravel(jnp.asarray(self.focal_alpha)))
            object.__setattr__(self, "focal_alpha", alpha)
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name))
        _check_ranges(self)
        _check_needs(self)

    @property
    def settings(self) -> Settings:
        """The fields that no term owns."""
        names = (field.name for field in dataclasses.fields(Settings))
        return Settings(**{name: getattr(self, name) for name in names})

    def weight(self, name: str, step: Int[Array, ""]) -> Float[Array, ""]:
        """Returns the field `name`, a weight or a rate, at the given step.

        Args:
          name: a field that may be a schedule.
          step: the optimizer step, an int32 scalar.

        Returns:
          The number, or the schedule's value at the step.

        Example:
          >>> import jax.numpy as jnp, optax
          >>> from ava_jax import UnifiedLossConfig
          >>> schedule = optax.linear_schedule(0.0, 1.0, 10)
          >>> config = UnifiedLossConfig(vocab_size=8, mtp_weight=schedule)
          >>> float(config.weight("mtp_weight", jnp.asarray(5)))
          0.5
        """
        value: Weight = getattr(self, name)
        return weight_at(value, step)

    def is_on(self, name: str) -> bool:
        """Says whether the field `name`, a weight or a rate, can be other than 0."""
        value = getattr(self, name)
        return callable(value) or value != 0


def _fields_of(kind: str) -> tuple[str, ...]:
    wanted = {"bool": bool, "int": int, "float": float}.get(kind)
    return tuple(
        f.name for f in dataclasses.fields(UnifiedLossConfig) if f.type is wanted
    )


_OPTIONAL_INTS = (
    "hidden_size",
    "eos_token_id",
    "pad_token_id",
    "num_experts",
    "num_moe_layers",
    "chunk_size",
    "block_size",
)
_CHOICES = {
    "primary_loss_type": PrimaryLossType,
    "mtp_type": MTPType,
    "penalty_source": PenaltySource,
    "moe_balancing_type": BalancingType,
    "diversity_similarity": Similarity,
    "contrastive_type": ContrastiveType,
    "implementation": Implementation,
}


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_type(name: str, value: object) -> None:
    if name in _CHOICES:
        allowed = get_args(_CHOICES[name])
        if name == "implementation":
            allowed = (*allowed, None)
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        return
    if name == "precision":
        _check_precision(value)
        return
    if name in _fields_of("bool"):
        good, wanted = isinstance(value, bool), "True or False"
    elif name in _OPTIONAL_INTS:
        good, wanted = value is None or _is_int(value), "an int or None"
    elif name in _fields_of("int"):
        good, wanted = _is_int(value), "an int"
    elif name in WEIGHTS:
        good = _is_real(value) or callable(value)
        wanted = "a number or a schedule (a function of the step)"
    elif name == "focal_alpha":
        good = _is_real(value) or isinstance(value, tuple)
        wanted = "a number or one number per class"
    elif name == "logit_soft_cap":
        good, wanted = value is None or _is_real(value), "a number or None"
    else:
        good, wanted = _is_real(value), "a number"
    if not good:
        raise TypeError(
            f"{name} must be {wanted}, got {value!r} ({type(value).__name__})"
        )


def _check_precision(value: Any) -> None:
    """Raises on what `jax.lax.dot` does not take, or what cannot be hashed."""
    one = jnp.ones((1, 1))
    try:
        hash(value)
        jax.eval_shape(lambda x: lax.dot(x, x, precision=value), one)
    except (TypeError, ValueError) as error:
        raise ValueError(
            'precision must be None, "default", "high", "highest" or another value '
            f"that jax.lax.dot takes, got {value!r}"
        ) from error


def _check_ranges(config: UnifiedLossConfig) -> None:
    check_fields(config)
    for name in ("eos_token_id", "pad_token_id"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < config.vocab_size:
            raise ValueError(
                f"{name} must be in [0, vocab_size={config.vocab_size}), got {value}"
            )
    if config.min_temperature > config.max_temperature:
        raise ValueError(
            f"min_temperature={config.min_temperature} is above "
            f"max_temperature={config.max_temperature}"
        )
    low, high = config.min_temperature, config.max_temperature
    moves = config.primary_loss_type == "deepseek" and config.adaptive_temperature
    if moves and not low <= config.initial_temperature <= high:
        raise ValueError(
            f"initial_temperature={config.initial_temperature} is not between "
            f"min_temperature={low} and max_temperature={high}: widen these, or set "
            "adaptive_temperature=False for a temperature that does not move"
        )
    cool, heat = config.temperature_cool_threshold, config.temperature_heat_threshold
    if cool > heat:
        raise ValueError(
            f"temperature_cool_threshold={cool} is above "
            f"temperature_heat_threshold={heat}"
        )
    if config.temperature_min_history > config.temperature_history:
        raise ValueError(
            f"temperature_min_history={config.temperature_min_history} is above "
            f"temperature_history={config.temperature_history}, so the temperature "
            "would never move"
        )


def _check_needs(config: UnifiedLossConfig) -> None:
    if config.use_mtp and config.mtp_type == "parallel" and config.hidden_size is None:
        raise ValueError(
            "hidden_size required for multi-token prediction: pass hidden_size=D, the "
            "width of hidden_states"
        )
    adaptive_twice = config.use_mtp and config.mtp_type == "adaptive"
    if adaptive_twice and config.primary_loss_type == "adaptive_mtp":
        raise ValueError(
            'primary_loss_type="adaptive_mtp" already contains the adaptive heads, '
            'which mtp_type="adaptive" would count again: set use_mtp=False'
        )
    for term in ("use_moe_balancing", "use_auxiliary_loss"):
        if getattr(config, term) and config.num_experts is None:
            raise ValueError(f"{term} needs num_experts, got None")
    alpha = config.focal_alpha
    if isinstance(alpha, tuple) and len(alpha) != config.vocab_size:
        raise ValueError(
            f"focal_alpha must be a number or one per class "
            f"(vocab_size={config.vocab_size}), got {len(alpha)} numbers"
        )


def config_from_mapping(
    mapping: Mapping[str, Any], overrides: Mapping[str, Any]
) -> UnifiedLossConfig:
    """Builds a config from the guide's keys; an unknown key names the nearest one."""
    known = [field.name for field in dataclasses.fields(UnifiedLossConfig)]
    values = {**mapping, **overrides}
    for key in values:
        if key not in known:
            hint = suggestion(key, known)
            raise ValueError(f"unknown config key {key!r}; {hint}")
    if "vocab_size" not in values:
        raise ValueError("vocab_size is required: pass the number of classes")
    return UnifiedLossConfig(**values)
