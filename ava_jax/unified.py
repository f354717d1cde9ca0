"""The unified loss: assembles every term from a frozen config.

This is the only place that knows all the terms. A call is `accumulate`, then `commit`;
over micro-batches their losses, gradients and stats add up in between.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Integer, Shaped

from ava_jax.assemble import (
    RESERVED_NAMES,
    Aux,
    Call,
    StepStats,
    adaptive_prefix,
    assemble,
)
from ava_jax.batch_terms import balance_report, init_balance, updated_balance
from ava_jax.config import UnifiedLossConfig, config_from_mapping
from ava_jax.inputs import LossInputs, Normalizers, check_inputs, measure, tokens_of
from ava_jax.kernel.sharding import Layout, make_layout, with_auto_axes
from ava_jax.reduce import float_dtype
from ava_jax.state import AdaptiveMTPState, LossState
from ava_jax.temperature import init_history, updated_temperature
from ava_jax.token_terms import ExtraTerm, updated_extra


@dataclasses.dataclass(frozen=True)
class UnifiedLoss:
    """The unified loss of one config; pure, frozen and hashable.

    `loss = main + mtp + repetition penalties + balancing + auxiliary terms`, each times
    its weight. Made by `unified_loss` or `create_unified_loss`.

    Attributes:
      config: which terms it has.
      extra_terms: the user's own token terms.
      layout: how batches and the vocabulary lie on a mesh, if the loss is to know.
    """

    config: UnifiedLossConfig
    extra_terms: tuple[ExtraTerm, ...] = ()
    layout: Layout | None = None

    def init(self) -> LossState:
        """Returns the state of step 0.

        Example:
          >>> import ava_jax
          >>> loss_fn = ava_jax.create_unified_loss({"vocab_size": 8})
          >>> int(loss_fn.init().step)
          0
        """
        config = self.config
        deepseek = config.primary_loss_type == "deepseek"
        temperature = jnp.full((), config.initial_temperature, float_dtype())
        return LossState(
            step=jnp.zeros((), jnp.int32),
            temperature=temperature if deepseek else None,
            loss_history=init_history(config) if deepseek else None,
            adaptive_mtp=_zero_sums() if adaptive_prefix(config) else None,
            moe_balancing=init_balance(config),
            extra={term.name: term.init() for term in self.extra_terms},
        )

    def __call__(
        self,
        state: LossState,
        *,
        train: bool = True,
        normalizers: Normalizers | None = None,
        **inputs: Unpack[LossInputs],
    ) -> tuple[Float[Array, ""], Aux, LossState]:
        """Computes the loss of a batch and the state after it.

        Args:
          state: from `init` or the step before.
          train: `False` changes no state and leaves out the train-only terms.
          normalizers: denominators other than the batch's own.
          **inputs: the arrays, see `LossInputs`.

        Returns:
          The loss, a float32 scalar; `aux`, a flat dict of arrays, weights applied to
          the entries that are part of the loss; the new state. A batch in which no
          token counts, or whose loss is not finite, changes nothing.

        Raises:
          TypeError: an unknown argument, or a wrong dtype.
          ValueError: an argument is missing, contradicts another or does not fit.

        Example:
          >>> import jax.numpy as jnp, ava_jax
          >>> loss_fn = ava_jax.create_unified_loss({"vocab_size": 8})
          >>> loss, aux, state = loss_fn(loss_fn.init(), logits=jnp.zeros((1, 4, 8)),
          ...                            targets=jnp.array([[1, 2, 3, 4]]))
          >>> round(float(aux["nll"]), 4), int(state.step)
          (2.0794, 1)
        """
        loss, _, stats = self.accumulate(
            state, train=train, normalizers=normalizers, **inputs
        )
        after = self.commit(state, stats) if train else state
        return loss, self.summary(after, stats), after

    def normalizers(
        self,
        *,
        targets: Integer[Array, "*window S"],
        attention_mask: Shaped[Array, "*window S"] | None = None,
        segment_ids: Integer[Array, "*window S"] | None = None,
    ) -> Normalizers:
        """Measures the denominators of an optimizer step's whole window of rows.

        Cheap: integers only, no model. Pass the result to `accumulate` for each
        micro-batch of the window.

        Args:
          targets: all rows of the window, with any leading axes.
          attention_mask: likewise.
          segment_ids: likewise.

        Returns:
          The denominators.

        Example:
          >>> import jax.numpy as jnp, ava_jax
          >>> loss_fn = ava_jax.create_unified_loss({"vocab_size": 8})
          >>> n = loss_fn.normalizers(targets=jnp.ones((4, 2, 5), int))
          >>> float(n.tokens)
          40.0
        """
        window: LossInputs = {
            "targets": targets,
            "attention_mask": attention_mask,
            "segment_ids": segment_ids,
        }

        def count(window: LossInputs) -> Normalizers:
            width = targets.shape[-1]
            rows = jax.tree.map(lambda x: x.reshape(-1, width), window)
            tokens = tokens_of(self.config, rows)
            return measure(self.config, tokens, self.config.num_future_tokens)

        return with_auto_axes(count, window)

    def accumulate(
        self,
        state: LossState,
        *,
        train: bool = True,
        normalizers: Normalizers | None = None,
        **inputs: Unpack[LossInputs],
    ) -> tuple[Float[Array, ""], Aux, StepStats]:
        """Computes one micro-batch's share of the window's loss.

        Losses, gradients and stats of the micro-batches add up to the window's. Balance
        terms, contrastive losses and the confidence weight couple the whole batch: each
        micro-batch computes its own, and they are averaged by tokens. The load that
        moves the routing bias is that of all micro-batches.

        Args:
          state: the state before the optimizer step, the same for all micro-batches.
          train: as in a plain call.
          normalizers: from `normalizers`, over the window.
          **inputs: one micro-batch, see `LossInputs`.

        Returns:
          The loss and `aux` of the micro-batch, as shares of the window's, and the
          stats. Once added up, `summary` gives the window's `aux` and `commit` the new
          state.

        Raises:
          TypeError: an unknown argument, or a wrong dtype.
          ValueError: an argument is missing, contradicts another or does not fit.

        Example:
          >>> import jax, jax.numpy as jnp, ava_jax
          >>> loss_fn = ava_jax.create_unified_loss({"vocab_size": 8})
          >>> state, targets = loss_fn.init(), jnp.ones((2, 1, 5), int)
          >>> n = loss_fn.normalizers(targets=targets)
          >>> loss, stats = 0.0, None
          >>> for micro in targets:
          ...     part, _, own = loss_fn.accumulate(
          ...         state, targets=micro, logits=jnp.zeros((1, 5, 8)), normalizers=n)
          ...     loss = loss + part
          ...     stats = own if stats is None else jax.tree.map(jnp.add, stats, own)
          >>> round(float(loss), 4), int(loss_fn.commit(state, stats).step)
          (2.0794, 1)
        """
        check_inputs(self.config, inputs)
        share = functools.partial(self._share, train)
        loss, stats = with_auto_axes(share, state, normalizers, inputs)
        return loss, self.summary(state, stats), stats

    def _share(
        self,
        train: bool,
        state: LossState,
        normalizers: Normalizers | None,
        inputs: LossInputs,
    ) -> tuple[Float[Array, ""], StepStats]:
        """The loss and stats of checked inputs."""
        tokens = tokens_of(self.config, inputs)
        if normalizers is None:
            normalizers = measure(self.config, tokens, self._num_heads(inputs))
        call = Call(
            self.config,
            self.extra_terms,
            state,
            inputs,
            tokens,
            normalizers,
            train,
            self.layout,
        )
        return assemble(call)

    def commit(self, state: LossState, stats: StepStats) -> LossState:
        """Returns the state after an optimizer step.

        Args:
          state: the state before the step.
          stats: added up over the step's micro-batches.

        Returns:
          The new state; the old one if no token counted or the loss is not finite.
        """
        stats = lax.stop_gradient(stats)
        new = dataclasses.replace(state, step=state.step + 1)
        if state.temperature is not None and state.loss_history is not None:
            temperature, history = updated_temperature(
                self.config,
                state.temperature,
                state.loss_history,
                stats.aux["main_loss"],
            )
            new = dataclasses.replace(
                new, temperature=temperature, loss_history=history
            )
        prefix = adaptive_prefix(self.config)
        if state.adaptive_mtp is not None and prefix is not None:
            sums = _added_sums(state.adaptive_mtp, prefix, stats.aux)
            new = dataclasses.replace(new, adaptive_mtp=sums)
        if state.moe_balancing is not None and stats.load is not None:
            balance = updated_balance(
                self.config, state.step, state.moe_balancing, stats.load
            )
            new = dataclasses.replace(new, moe_balancing=balance)
        extra = {
            name: updated_extra(term, state.extra[name], stats.extra[name])
            for name, term in ((term.name, term) for term in self.extra_terms)
        }
        new = dataclasses.replace(new, extra=extra)
        counts = (stats.weight != 0) & jnp.isfinite(stats.aux["total_loss"])
        return jax.tree.map(lambda a, b: jnp.where(counts, a, b), new, state)

    def summary(self, state: LossState, stats: StepStats) -> Aux:
        """Returns the `aux` of a step from its added-up stats.

        Args:
          state: the state after the step.
          stats: added up over the step's micro-batches.

        Returns:
          The additive entries, and what is derived from them or from the state:
          `perplexity`, `temperature` and the expert balance.
        """
        aux = dict(stats.aux)
        aux["perplexity"] = jnp.exp(aux["nll"])
        if state.temperature is not None:
            aux["temperature"] = state.temperature
        if state.moe_balancing is not None and stats.load is not None:
            aux |= balance_report(self.config, state.moe_balancing, stats.load)
        return aux

    def _num_heads(self, inputs: LossInputs) -> int:
        given = inputs.get("additional_logits")
        count = 0 if given is None else len(given)
        return max(self.config.num_future_tokens, count)


def _zero_sums() -> AdaptiveMTPState:
    return AdaptiveMTPState(
        primary_loss=jnp.zeros((), float_dtype()),
        additional_loss=jnp.zeros((), float_dtype()),
        confidence_reg=jnp.zeros((), float_dtype()),
        confidence=jnp.zeros((), float_dtype()),
        count=jnp.zeros((), jnp.int32),
    )


def _added_sums(sums: AdaptiveMTPState, prefix: str, aux: Aux) -> AdaptiveMTPState:
    return AdaptiveMTPState(
        primary_loss=sums.primary_loss + aux[f"{prefix}_primary_loss"],
        additional_loss=sums.additional_loss + aux[f"{prefix}_additional_loss"],
        confidence_reg=sums.confidence_reg + aux[f"{prefix}_confidence_reg"],
        confidence=sums.confidence + aux[f"{prefix}_avg_confidence"],
        count=sums.count + 1,
    )


def unified_loss(
    config: UnifiedLossConfig,
    extra_terms: Sequence[ExtraTerm] = (),
    *,
    mesh: Mesh | None = None,
    batch_axes: str | Sequence[str] = (),
    sequence_axis: str | None = None,
    vocab_axis: str | None = None,
) -> UnifiedLoss:
    """Assembles the unified loss of a config.

    With a mesh, the pass over the vocabulary runs on every device's own tokens and its
    own slice of the vocabulary; per token, a few numbers and the gradient of the hidden
    state cross the wire. Without one, XLA decides; the numbers are the same.

    Args:
      config: which terms it has.
      extra_terms: token terms of your own, see `ExtraTerm`.
      mesh: the mesh that the arguments of the loss are sharded over.
      batch_axes: its axes that share the rows, B, such as `("data", "fsdp")`.
      sequence_axis: its axis that shares each row's tokens, S.
      vocab_axis: its axis that shares the vocabulary: the columns of `lm_head` or of
        the logits. V need not be a multiple of its size.

    Returns:
      A frozen, hashable `UnifiedLoss`.

    Raises:
      TypeError: an extra term lacks a method or is not hashable.
      ValueError: an extra term's name is taken; an axis is not the mesh's, or is given
        twice or without a mesh.

    Example:
      >>> import ava_jax
      >>> config = ava_jax.UnifiedLossConfig(vocab_size=8, label_smoothing=0.0)
      >>> loss_fn = ava_jax.unified_loss(config)
      >>> loss_fn == ava_jax.unified_loss(config)
      True
    """
    terms = tuple(extra_terms)
    seen = set(RESERVED_NAMES)
    for term in terms:
        for method in ("name", "init", "apply"):
            if not hasattr(term, method):
                raise TypeError(f"extra term {term!r} lacks {method!r}, see ExtraTerm")
        if term.name in seen:
            raise ValueError(f"extra term name {term.name!r} is taken; choose another")
        seen.add(term.name)
        hash(term)
    layout = make_layout(mesh, batch_axes, sequence_axis, vocab_axis)
    return UnifiedLoss(config, terms, layout)


def create_unified_loss(
    config: Mapping[str, Any] | None = None,
    *,
    mesh: Mesh | None = None,
    batch_axes: str | Sequence[str] = (),
    sequence_axis: str | None = None,
    vocab_axis: str | None = None,
    **overrides: Any,
) -> UnifiedLoss:
    """Assembles the unified loss from the guide's keys.

    Args:
      config: a mapping with the fields of `UnifiedLossConfig`, from a JSON or YAML
        file, say.
      mesh: as for `unified_loss`, like the axes that follow.
      batch_axes: axes that share the rows.
      sequence_axis: the axis that shares each row's tokens.
      vocab_axis: the axis that shares the vocabulary.
      **overrides: fields that replace the mapping's.

    Returns:
      A frozen, hashable `UnifiedLoss`.

    Raises:
      TypeError: a field has the wrong type.
      ValueError: an unknown key, which names the nearest one, or a bad value.

    Example:
      >>> import ava_jax
      >>> loss_fn = ava_jax.create_unified_loss({"vocab_size": 8}, label_smoothing=0.0)
      >>> loss_fn.config.label_smoothing
      0.0
    """
    return unified_loss(
        config_from_mapping(config or {}, overrides),
        mesh=mesh,
        batch_axes=batch_axes,
        sequence_axis=sequence_axis,
        vocab_axis=vocab_axis,
    )
