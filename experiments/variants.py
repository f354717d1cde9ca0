"""A variant of an experiment: fields of the loss, and other changes of the run."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import optax
from jaxtyping import Array, Float, Int

import ava_jax
from experiments.sizes import Sizes
from trainer.data.text import TextData
from trainer.model.language_model import LanguageModel
from trainer.model.layers import Batch

Fields = Mapping[str, object]
OwnParams = dict[str, Array]
Report = dict[str, Array]


class StepContext(NamedTuple):
    """One training step, as an addition sees it.

    Attributes:
      model: the model.
      params: its parameters.
      batch: what it was applied to.
      inputs: what it returned, the arguments of the loss.
      aux: the report of the loss.
      bias: of the routers.
      step: the number of the step.
      key: of this step.
    """

    model: LanguageModel
    params: optax.Params
    batch: Batch
    inputs: ava_jax.LossInputs
    aux: Mapping[str, Array]
    bias: Float[Array, "L E"] | None
    step: Int[Array, ""]
    key: Array


class Addition(Protocol):
    """A change of the objective that a loss config cannot express."""

    @property
    def name(self) -> str:
        """The key of its trained parameters."""
        ...

    def init(self) -> OwnParams:
        """Returns parameters of its own to train, if it has any."""
        ...

    def apply(
        self, own: OwnParams, loss: Float[Array, ""], context: StepContext
    ) -> tuple[Float[Array, ""], Report]:
        """Returns the new objective, and what to report."""
        ...


class Falling(NamedTuple):
    """A field that falls linearly to 0 over all steps.

    Attributes:
      start: its value in the first step.
    """

    start: float


class Late(NamedTuple):
    """A field that is 0 in the first steps and then constant.

    Attributes:
      value: its value in the later steps.
      start: the share of all steps before it has that value.
    """

    value: float
    start: float


def over_steps(value: object, steps: int) -> object:
    """Returns the schedule of a field that changes over the steps, or its value."""
    if isinstance(value, Falling):
        return optax.linear_schedule(value.start, 0.0, steps)
    if isinstance(value, Late):
        parts = [optax.constant_schedule(x) for x in (0.0, value.value)]
        return optax.join_schedules(parts, [round(value.start * steps)])
    return value


@dataclasses.dataclass(frozen=True)
class Variant:
    """A training objective.

    Attributes:
      fields: of the loss, over those of the plain cross-entropy.
      additions: further changes, applied one after the other.
      confidence_threshold: from where on adaptive heads are trained; see
        `LanguageModel`.
      seeds: it is run with at most this many.
    """

    fields: Fields = dataclasses.field(default_factory=dict)
    additions: tuple[Addition, ...] = ()
    confidence_threshold: float = 0.5
    seeds: int = 3

    def config(self, sizes: Sizes, text: TextData) -> ava_jax.UnifiedLossConfig:
        """Returns the loss, joined with what the data and the model decide."""
        derived = {
            "vocab_size": text.vocab_size,
            "hidden_size": sizes.model.width,
            "eos_token_id": text.eos,
            "num_experts": sizes.model.experts or None,
            "num_moe_layers": sizes.model.expert_layers or None,
        }
        own = {
            name: over_steps(value, sizes.steps) for name, value in self.fields.items()
        }
        return ava_jax.create_unified_loss({**PLAIN, **own, **derived}).config


# The cross-entropy alone; what a variant adds, its name says.
PLAIN: Fields = {
    "primary_loss_type": "standard",
    "adaptive_temperature": False,
    "label_smoothing": 0.0,
    "use_ngram_penalty": False,
    "use_immediate_repetition_penalty": False,
    "unlikelihood_weight": 0.0,
    "eos_penalty_weight": 0.0,
}
