"""Non-finite steps: skipped and counted on the device, explained on the host."""

import math
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from trainer.errors import TrainingError
from trainer.report.metrics import Record

T = TypeVar("T")

# Sums of other entries, and numbers derived from them: they name no culprit.
SUMS = ("total_loss", "main_loss", "mtp_loss", "perplexity", "grad_norm")


class Skips(NamedTuple):
    """How many steps were skipped: in all, and since the last good one."""

    total: Int[Array, ""]
    in_a_row: Int[Array, ""]

    @classmethod
    def none(cls) -> "Skips":
        """Before the first step."""
        return cls(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def after(self, is_good: Bool[Array, ""]) -> "Skips":
        """Counts one more step."""
        skipped = jnp.where(is_good, 0, 1).astype(jnp.int32)
        return Skips(self.total + skipped, (self.in_a_row + 1) * skipped)


def is_finite(tree: optax.Params) -> Bool[Array, ""]:
    """Whether every number of a tree is finite."""
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))


# optax.apply_if_finite checks the gradient alone, and leaves out the loss state.
def choose(is_good: Bool[Array, ""], new: T, old: T) -> T:
    """Returns the new tree after a good step, the old one after a skipped step."""
    return jax.tree.map(lambda a, b: jnp.where(is_good, a, b), new, old)


class SkipGuard:
    """Watches the records of the steps; stops after too many skipped ones.

    Args:
      most: how many steps in a row may be skipped.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._first: tuple[int, str] | None = None

    def check(self, step: int, record: Record) -> str | None:
        """Returns a warning about a step, or None.

        Raises:
          TrainingError: too many steps in a row were skipped.
        """
        in_a_row = int(record["skipped_in_a_row"])
        if in_a_row == 0:
            self._first = None
            return None
        culprit = find_culprit(record)
        if self._first is None:
            self._first = (step, culprit)
        if in_a_row <= self._most:
            return f"step {step} was skipped: not finite is {culprit}"
        first, culprit = self._first
        raise TrainingError(
            f"{in_a_row} steps in a row were skipped, up to step {step}; what was not "
            f"finite first, at step {first}, is {culprit}. The last checkpoint stays: "
            "begin with a new --out and a lower --learning-rate, or allow more with "
            "--max-skipped-steps"
        )


def find_culprit(record: Record) -> str:
    """Returns the terms that are not finite, or what else was not."""
    bad = [name for name, value in record.items() if not math.isfinite(value)]
    terms = [name for name in bad if name not in SUMS]
    if terms:
        return ", ".join(terms)
    if bad:
        return "the gradient" if bad == ["grad_norm"] else bad[0]
    return "the parameters after the step"


def check_targets(step: int, record: Record) -> None:
    """Refuses targets outside of the vocabulary.

    Raises:
      TrainingError: a target lies outside the vocabulary.
    """
    if record["num_invalid_targets"] > 0:
        raise TrainingError(
            f"step {step}: {record['num_invalid_targets']:.0f} targets lie outside the "
            "vocabulary: the tokens and the tokenizer do not belong together (empty "
            "the --cache folder)"
        )
