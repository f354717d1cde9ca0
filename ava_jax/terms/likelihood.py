"""The main loss's terms: cross-entropy, focal loss, z-loss; and token diversity."""

import dataclasses

from jaxtyping import Array, Float

from ava_jax.config import Settings, Weight
from ava_jax.inputs import LossInputs
from ava_jax.kernel.stats import TokenStats
from ava_jax.losses import likelihood
from ava_jax.terms.base import Call, Output, Scalar, TokenInputs, TokenTerm


@dataclasses.dataclass(frozen=True)
class CrossEntropy(TokenTerm):
    """The cross-entropy with label smoothing, see `losses.smoothed_cross_entropy`.

    It has no entry in `aux` of its own: it is what `main_loss` starts from.

    Attributes:
      label_smoothing: ε in [0, 1).
    """

    label_smoothing: float = 0.0
    weight: Weight = 1.0
    name: str = "cross_entropy"
    part = "main_loss"

    def __call__(self, stats: TokenStats, inputs: TokenInputs) -> Float[Array, "B S"]:
        return likelihood.smoothed_cross_entropy(stats, self.label_smoothing)

    def finish(self, call: Call, mean: Scalar) -> Output:
        return super().finish(call, mean)._replace(aux={})


@dataclasses.dataclass(frozen=True)
class FocalLoss(TokenTerm):
    """The focal loss in place of the cross-entropy, see `losses.focal_cross_entropy`.

    Attributes:
      alpha: α, a number or one per class.
      gamma: γ ≥ 0.
    """

    alpha: float | tuple[float, ...] = 1.0
    gamma: float = 2.0
    weight: Weight = 1.0
    name: str = "focal_loss"
    part = "main_loss"
    keys = ("focal_loss",)

    def check(self, inputs: LossInputs, settings: Settings) -> None:
        size = settings.vocab_size
        if isinstance(self.alpha, tuple) and len(self.alpha) != size:
            raise ValueError(
                f"the term {self.name!r}: alpha must be a number or one per class "
                f"(vocab_size={size}), got {len(self.alpha)} numbers"
            )

    def __call__(self, stats: TokenStats, inputs: TokenInputs) -> Float[Array, "B S"]:
        return likelihood.focal_cross_entropy(
            stats, inputs.targets, self.alpha, self.gamma
        )


@dataclasses.dataclass(frozen=True)
class ZLoss(TokenTerm):
    """The squared log-normaliser, see `losses.log_z_squared`."""

    weight: Weight
    name: str = "z_loss"
    part = "main_loss"
    keys = ("z_loss",)

    def __call__(self, stats: TokenStats, inputs: TokenInputs) -> Float[Array, "B S"]:
        return likelihood.log_z_squared(stats)


@dataclasses.dataclass(frozen=True)
class TokenDiversity(TokenTerm):
    """How far predictions are from uniform, see `losses.token_diversity`.

    Attributes:
      vocab_size: V.
    """

    vocab_size: int
    weight: Weight
    name: str = "token_diversity"
    part = "ngram_penalty"
    keys = ("token_diversity", "ngram_penalty")

    def __call__(self, stats: TokenStats, inputs: TokenInputs) -> Float[Array, "B S"]:
        return likelihood.token_diversity(stats, self.vocab_size)
