"""Contrastive losses of embeddings, and SimCTG of hidden states."""

import dataclasses

from ava_jax.config import ContrastiveType, Weight
from ava_jax.losses import contrastive
from ava_jax.terms.base import BatchTerm, Call, Scalar


@dataclasses.dataclass(frozen=True)
class InfoNCE(BatchTerm):
    """See `losses.contrastive_infonce_loss`.

    Attributes:
      temperature: of the similarities.
    """

    temperature: float
    weight: Weight
    name: str = "contrastive_loss"
    option = "contrastive_type='infonce'"
    keys = ("contrastive_loss",)
    requires = ("embeddings",)
    accepts = ("labels",)

    def __call__(self, call: Call) -> Scalar:
        return contrastive.contrastive_infonce_loss(
            call.array("embeddings"),
            labels=call.inputs.get("labels"),
            temperature=self.temperature,
        )


@dataclasses.dataclass(frozen=True)
class Margin(BatchTerm):
    """See `losses.contrastive_margin_loss`.

    Attributes:
      margin: the distance from which on negatives cost nothing.
    """

    margin: float
    weight: Weight
    name: str = "contrastive_loss"
    option = "contrastive_type='margin'"
    keys = ("contrastive_loss",)
    requires = ("embeddings", "labels")

    def __call__(self, call: Call) -> Scalar:
        return contrastive.contrastive_margin_loss(
            call.array("embeddings"),
            labels=call.array("labels"),
            margin=self.margin,
        )


@dataclasses.dataclass(frozen=True)
class Triplet(BatchTerm):
    """See `losses.contrastive_triplet_loss`.

    Attributes:
      margin: by how much negatives should be further away than positives.
    """

    margin: float
    weight: Weight
    name: str = "contrastive_loss"
    option = "contrastive_type='triplet'"
    keys = ("contrastive_loss",)
    requires = ("embeddings", "labels")

    def __call__(self, call: Call) -> Scalar:
        return contrastive.contrastive_triplet_loss(
            call.array("embeddings"),
            labels=call.array("labels"),
            margin=self.margin,
        )


@dataclasses.dataclass(frozen=True)
class SimCTG(BatchTerm):
    """See `losses.simctg_loss`; it looks at the `hidden_states` of unmasked tokens.

    Attributes:
      margin: ρ.
    """

    margin: float
    weight: Weight
    name: str = "contrastive_loss"
    option = "contrastive_type='simctg'"
    keys = ("contrastive_loss",)
    requires = ("hidden_states",)

    def __call__(self, call: Call) -> Scalar:
        return contrastive.simctg_loss(
            call.array("hidden_states"),
            margin=self.margin,
            mask=call.tokens.active,
            segment_ids=call.tokens.segments,
        )


def contrastive_term(
    kind: ContrastiveType, temperature: float, margin: float, weight: Weight
) -> BatchTerm:
    """Returns the term of a kind."""
    if kind == "infonce":
        return InfoNCE(temperature, weight)
    return {"margin": Margin, "triplet": Triplet, "simctg": SimCTG}[kind](
        margin, weight
    )
