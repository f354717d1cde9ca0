"""Distillation from a teacher as terms: student and teacher in one pass."""

import dataclasses

import jax.numpy as jnp
from jax.lax import PrecisionLike, stop_gradient
from jaxtyping import Array, Bool, Float, Int

from ava_jax.arrays import as_ids
from ava_jax.config import Settings, Weight
from ava_jax.inputs import LossInputs, check_float, width_of
from ava_jax.kernel.divergence import divergence
from ava_jax.kernel.logits import at_temperature
from ava_jax.kernel.passes import Columns, to_width
from ava_jax.kernel.stats import TokenStats, Vocabulary
from ava_jax.losses.distillation import (
    divergence_with_rest,
    log_one_minus_sum,
    top_k_divergence,
)
from ava_jax.ranges import check_fields
from ava_jax.reduce import along_axis, as_float, float_dtype, wider
from ava_jax.terms.base import LogitsTerm, TokenInputs, TokenTerm

_FORMS = ("teacher_hidden_states", "teacher_logits")


@dataclasses.dataclass(frozen=True)
class Distillation(LogitsTerm):
    """The divergence from a teacher's distribution, see `ava_jax.distillation_loss`.

    The teacher is `extra_inputs["teacher_hidden_states"]` [B, S, D'] with
    `teacher_lm_head` [D', V], or `extra_inputs["teacher_logits"]` [B, S, V].

    Attributes:
      beta: β in [0, 1]: 0 is `KL(q‖p)`, 1 is `KL(p‖q)`.
      logits_temperature: T of both distributions; the divergence is multiplied by T².
      teacher_logit_soft_cap: of the teacher's logits, or None.

    Example:
      >>> import jax.numpy as jnp
      >>> import ava_jax
      >>> from ava_jax import terms
      >>> loss_fn = ava_jax.compose(
      ...     [terms.CrossEntropy(), terms.Distillation(weight=0.5)], vocab_size=8)
      >>> z = jnp.zeros((1, 2, 8))
      >>> loss, aux, _ = loss_fn(loss_fn.init(), targets=jnp.array([[1, 2]]), logits=z,
      ...                        extra_inputs={"teacher_logits": z})
      >>> round(float(loss), 4), float(aux["distillation"])
      (2.0794, 0.0)

    References:
      Hinton et al., Distilling the Knowledge in a Neural Network, 2015; Agarwal et al.,
      On-Policy Distillation of Language Models, 2024 (β).
    """

    beta: float = 0.0
    logits_temperature: float = 1.0
    teacher_logit_soft_cap: float | None = None
    weight: Weight = 1.0
    name: str = "distillation"
    part = "main_loss"
    option = "terms.Distillation"
    accepts = ("teacher_lm_head", "teacher_lm_head_bias")
    accepts_extra = _FORMS
    columns_extra = ("teacher_logits",)

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self, inputs: LossInputs, settings: Settings) -> None:
        targets = inputs.get("targets")
        assert targets is not None
        extra = inputs.get("extra_inputs") or {}
        given = [name for name in _FORMS if extra.get(name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"the term {self.name!r} needs one of teacher_hidden_states [B, S, D'] "
                f"and teacher_logits [B, S, V], got {given or 'neither'}"
            )
        head = inputs.get("teacher_lm_head")
        bias = inputs.get("teacher_lm_head_bias")
        size = settings.vocab_size
        if given == ["teacher_logits"]:
            logits = extra["teacher_logits"]
            check_float("teacher_logits", logits, targets.shape, 3, vocab_size=size)
            if head is not None or bias is not None:
                raise ValueError(
                    "teacher_lm_head and its bias are for teacher_hidden_states; with "
                    "teacher_logits leave them out"
                )
            return
        hidden = extra["teacher_hidden_states"]
        check_float("teacher_hidden_states", hidden, targets.shape, 3)
        if head is None:
            raise ValueError(
                "teacher_hidden_states need teacher_lm_head [D', V], the teacher's own"
            )
        check_float("teacher_lm_head", head, (), 2, vocab_size=size)
        if head.shape[0] != hidden.shape[-1]:
            raise ValueError(
                f"teacher_lm_head must be [D', V] with D'={hidden.shape[-1]}, the "
                f"width of teacher_hidden_states, got {head.shape}"
            )
        if bias is not None and bias.shape != head.shape[1:]:
            raise ValueError(
                f"teacher_lm_head_bias must be [V] with V={head.shape[1]}, the width "
                f"of teacher_lm_head, got {bias.shape}"
            )

    def whole(self, inputs: LossInputs) -> dict[str, Columns]:
        """Returns the teacher's projection and its bias, if there are any.

        They get as many columns as the student's logits have, padding included.
        """
        width = width_of(inputs)
        named = {
            "head": inputs.get("teacher_lm_head"),
            "bias": inputs.get("teacher_lm_head_bias"),
        }
        return {
            name: Columns(to_width(stop_gradient(x), width))
            for name, x in named.items()
            if x is not None
        }

    def of_logits(
        self,
        logits: Float[Array, "B S V"],
        inputs: TokenInputs,
        vocabulary: Vocabulary,
        precision: PrecisionLike,
    ) -> Float[Array, "B S"]:
        active, temperature = inputs.weights != 0, None
        if self.logits_temperature != 1:
            temperature = as_float(self.logits_temperature)
        student = at_temperature(logits, active, vocabulary, temperature)
        of_teacher = vocabulary._replace(soft_cap=self.teacher_logit_soft_cap)
        teacher = at_temperature(
            self._teacher(inputs, precision), active, of_teacher, temperature
        )
        value = divergence(vocabulary, self.beta, student, teacher, active)
        return self.logits_temperature**2 * value

    def _teacher(self, inputs: TokenInputs, precision) -> Float[Array, "B S V"]:
        """Returns the teacher's logits of a block."""
        given = inputs.extra.get("teacher_logits")
        if isinstance(given, Columns):
            return stop_gradient(given.value)
        hidden = stop_gradient(inputs.extra["teacher_hidden_states"])
        head = inputs.whole["head"].value
        dtype = wider(hidden.dtype, head.dtype)
        z = jnp.einsum(
            "bsd,dv->bsv",
            hidden.astype(dtype),
            head.astype(dtype),
            precision=precision,
            preferred_element_type=float_dtype(),
        )
        bias = inputs.whole.get("bias")
        return z if bias is None else z + along_axis(as_float(bias.value), z.ndim)


@dataclasses.dataclass(frozen=True)
class TopKDistillation(TokenTerm):
    """The divergence from a teacher's top k classes, see `losses.top_k_divergence`.

    It reads `extra_inputs["teacher_ids"]`, distinct ids [B, S, k], and
    `extra_inputs["teacher_log_probs"]` [B, S, k], the log-probabilities at T. Ids
    outside the vocabulary are left out.

    Attributes:
      tail: whether all other classes are one class of their own.
      logits_temperature: T of the student; the divergence is multiplied by T².

    References:
      Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """

    vocab_size: int
    tail: bool = True
    logits_temperature: float = 1.0
    weight: Weight = 1.0
    name: str = "distillation"
    part = "main_loss"
    requires = ("extra_inputs",)
    requires_extra = ("teacher_ids", "teacher_log_probs")
    accepts_extra = ()

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self, inputs: LossInputs, settings: Settings) -> None:
        targets = inputs.get("targets")
        assert targets is not None
        extra = inputs.get("extra_inputs") or {}
        ids, log_probs = extra["teacher_ids"], extra["teacher_log_probs"]
        if self.vocab_size != settings.vocab_size:
            raise ValueError(
                f"the term {self.name!r} has vocab_size={self.vocab_size}, the loss "
                f"{settings.vocab_size}: give both the same"
            )
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(f"teacher_ids must be integers, got {ids.dtype}")
        check_float("teacher_log_probs", log_probs, targets.shape, 3)
        if ids.shape != log_probs.shape:
            raise ValueError(
                f"teacher_ids must have the shape {log_probs.shape} of "
                f"teacher_log_probs, got {ids.shape}"
            )

    def candidates(self, inputs: TokenInputs) -> Int[Array, "B S K"]:
        return as_ids(inputs.extra["teacher_ids"])

    def __call__(self, stats: TokenStats, inputs: TokenInputs) -> Float[Array, "B S"]:
        log_probs = stats.candidates[self.name] - stats.log_sum[..., None]
        ids = as_ids(inputs.extra["teacher_ids"])
        is_id = (ids >= 0) & (ids < self.vocab_size)
        teacher = stop_gradient(as_float(inputs.extra["teacher_log_probs"]))
        active = (inputs.weights != 0)[..., None]
        teacher = jnp.where(active & is_id, teacher, -jnp.inf)
        if self.tail:
            rest = self._log_rest(stats, teacher != -jnp.inf)
            value = divergence_with_rest(log_probs, teacher, rest)
        else:
            value = top_k_divergence(log_probs, teacher, tail=False)
        return self.logits_temperature**2 * value

    def _log_rest(
        self, stats: TokenStats, known: Bool[Array, "B S K"]
    ) -> Float[Array, "B S"]:
        """Computes `log(1 − Σ p)` over the known classes.

        If the most probable class is one of them, the others' probabilities are taken
        from the sum without it: 1 − p, as a difference, may be a rounding error.
        """
        is_top = stats.candidate_is_top[self.name] & known
        without = jnp.any(is_top, -1)
        others = stats.log_sum_without_queried_top
        whole = jnp.where(without, others, stats.log_sum)
        relative = stats.candidates[self.name] - whole[..., None]
        shares = jnp.where(known & ~is_top, relative, -jnp.inf)
        return whole - stats.log_sum + log_one_minus_sum(shares)
