"""The unified loss: a list of terms, their state, and what they add up to.

A call is `accumulate`, then `commit`; over micro-batches their losses, gradients and
stats add up in between.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import PrecisionLike
from jax.sharding import Mesh
from jaxtyping import Array, Float, Integer, Shaped

from ava_jax.annotations import with_checked_arrays
from ava_jax.arrays import check_weights
from ava_jax.assemble import StepStats, assemble, count_normalizers, plan_of
from ava_jax.checks import check_inputs, only_read
from ava_jax.config import Settings, UnifiedLossConfig, config_from_mapping
from ava_jax.inputs import LossInputs, Normalizers, array, read_arrays, tokens_of
from ava_jax.kernel.platforms import Implementation
from ava_jax.kernel.sharding import Layout, make_layout, run_whole
from ava_jax.state import LossState, check_state, states_of, with_states
from ava_jax.terms.base import Aux, Call, Step, Term, aux_of, first_state, new_state
from ava_jax.terms.listing import built_in, distinct, not_reserved, terms_of
from ava_jax.terms.user import TermLike, as_term


@dataclasses.dataclass(frozen=True)
class UnifiedLoss:
    """The weighted sum of a list of terms; pure, frozen and hashable.

    Made by `unified_loss`, `create_unified_loss` or `compose`.

    Attributes:
      settings: the vocabulary, and how passes over it go.
      terms: the terms.
      layout: how batches and the vocabulary lie on a mesh; None leaves it to XLA.
      flat_config: the config that the terms were made from, if any.
    """

    settings: Settings
    terms: tuple[Term, ...]
    layout: Layout | None = None
    flat_config: UnifiedLossConfig | None = None

    def __new__(cls, *args: Any, **fields: Any) -> "UnifiedLoss":
        unknown = fields.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise TypeError(
                f"UnifiedLoss has no field {min(unknown)!r}: make one with "
                f"ava_jax.create_unified_loss({min(unknown)}=…) or ava_jax.compose"
            )
        return super().__new__(cls)

    @property
    def config(self) -> UnifiedLossConfig:
        """The config that the terms were made from."""
        if self.flat_config is None:
            raise AttributeError(
                "this loss was composed from terms and has no config: look at its "
                "terms and its settings"
            )
        return self.flat_config

    def init(self) -> LossState:
        """Returns the state of step 0.

        Example:
          >>> import ava_jax
          >>> loss_fn = ava_jax.create_unified_loss({"vocab_size": 8})
          >>> int(loss_fn.init().step)
          0
        """
        state = LossState(step=jnp.zeros((), jnp.int32))
        first = {t.name: first_state(t, t.init()) for t in self.terms}
        return with_states(state, self.terms, first)

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
          the entries that are part of the loss; the new state. A batch without
          an unmasked token, or whose loss is not finite, changes nothing.

        Raises:
          TypeError: an unknown argument, or a wrong dtype.
          ValueError: an argument is missing, or does not fit, or nothing reads it.

        Example:
          >>> import jax, jax.numpy as jnp, ava_jax
          >>> loss_fn = ava_jax.create_unified_loss({"vocab_size": 8})
          >>> loss, aux, state = jax.jit(loss_fn)(
          ...     loss_fn.init(), logits=jnp.zeros((1, 4, 8)),
          ...     targets=jnp.array([[1, 2, 3, 4]]))
          >>> round(float(aux["nll"]), 4), int(state.step)
          (2.0794, 1)
        """
        loss, _, stats = self.accumulate(
            state, train=train, normalizers=normalizers, **inputs
        )
        after = self.commit(state, stats) if train else state
        return loss, self.summary(after, stats), after

    def select(self, inputs: LossInputs) -> LossInputs:
        """Returns the arguments that this loss reads, out of all that a model offers.

        A call refuses an argument that nothing in the loss reads. A training loop that
        serves many losses passes its arguments through this first.

        Args:
          inputs: arguments of a call, see `LossInputs`.

        Returns:
          Those that the main logits are made of or that a term reads; likewise of the
          entries of `extra_inputs`.

        Raises:
          ValueError: there is nothing to make the main logits of.

        Example:
          >>> import jax.numpy as jnp, ava_jax
          >>> loss_fn = ava_jax.create_unified_loss({"vocab_size": 8})
          >>> inputs = {"targets": jnp.array([[1]]), "logits": jnp.zeros((1, 1, 8)),
          ...           "hidden_states": jnp.zeros((1, 1, 4))}
          >>> list(loss_fn.select(inputs))
          ['targets', 'logits']
        """
        return only_read(self.terms, inputs)

    @with_checked_arrays
    def normalizers(
        self,
        *,
        targets: Integer[Array, "*window S"],
        attention_mask: Shaped[Array, "*window S"] | None = None,
        segment_ids: Integer[Array, "*window S"] | None = None,
        router_mask: Shaped[Array, "*window S"] | None = None,
    ) -> Normalizers:
        """Counts the denominators of an optimizer step's whole window of rows.

        Cheap: integers only, no model. Pass the result to `accumulate` for each
        micro-batch of the window.

        Args:
          targets: all rows of the window, with any leading axes.
          attention_mask: likewise.
          segment_ids: likewise.
          router_mask: likewise.

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
            "router_mask": router_mask,
        }
        check_weights(attention_mask=attention_mask, router_mask=router_mask)

        return run_whole(_count_window, (self,), read_arrays(window))

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
          ValueError: an argument is missing, or does not fit, or nothing reads it.

        Example:
          >>> import jax, jax.numpy as jnp, ava_jax
          >>> loss_fn = ava_jax.create_unified_loss({"vocab_size": 8})
          >>> state, targets = loss_fn.init(), jnp.ones((2, 1, 5), int)
          >>> n = jax.jit(loss_fn.normalizers)(targets=targets)
          >>> accumulate, loss, stats = jax.jit(loss_fn.accumulate), 0.0, None
          >>> for micro in targets:
          ...     part, _, own = accumulate(
          ...         state, targets=micro, logits=jnp.zeros((1, 5, 8)), normalizers=n)
          ...     loss = loss + part
          ...     stats = own if stats is None else jax.tree.map(jnp.add, stats, own)
          >>> round(float(loss), 4), int(loss_fn.commit(state, stats).step)
          (2.0794, 1)
        """
        check_state(state, _form_of_state(self))
        if not isinstance(normalizers, Normalizers | None):
            raise TypeError(
                "normalizers must be what loss_fn.normalizers returns, or None, got "
                f"{type(normalizers).__name__}"
            )
        check_inputs(self.settings, self.terms, inputs)
        arrays = state, normalizers, read_arrays(inputs)
        loss, stats = run_whole(UnifiedLoss._share, (self, train), *arrays)
        return loss, self.summary(state, stats), stats

    def _share(
        self,
        train: bool,
        state: LossState,
        normalizers: Normalizers | None,
        inputs: LossInputs,
    ) -> tuple[Float[Array, ""], StepStats]:
        """The loss and stats of checked inputs."""
        tokens = tokens_of(self.settings, inputs)
        if normalizers is None:
            normalizers = count_normalizers(self.terms, tokens, inputs)
        call = Call(
            inputs,
            tokens,
            normalizers,
            states_of(state, self.terms),
            state.step,
            train,
            self.settings,
            plan_of(self.settings, self.layout, inputs, tokens),
        )
        return assemble(self.terms, call)

    def commit(self, state: LossState, stats: StepStats) -> LossState:
        """Returns the state after an optimizer step.

        Args:
          state: the state before the step.
          stats: added up over the step's micro-batches.

        Returns:
          The new state; the old one if the weights are 0 or the loss is not finite.
        """
        check_state(state, _form_of_state(self))
        _check_stats(stats)
        stats = lax.stop_gradient(stats)
        step = Step(state.step, stats.aux["main_loss"])
        states = states_of(state, self.terms)
        for term in self.terms:
            if (statistics := stats.terms.get(term.name)) is not None:
                before = states[term.name]
                after = term.update(before, statistics, step)
                states[term.name] = new_state(term, before, after)
        new = dataclasses.replace(state, step=state.step + 1)
        new = with_states(new, self.terms, states)
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
        check_state(state, _form_of_state(self))
        _check_stats(stats)
        aux = dict(stats.aux)
        aux["perplexity"] = jnp.exp(aux["nll"])
        states = states_of(state, self.terms)
        for term in self.terms:
            report = term.report(states[term.name], stats.terms.get(term.name))
            aux |= aux_of(term, "report", report)
        return aux


def _check_stats(stats: Any) -> None:
    if not isinstance(stats, StepStats):
        raise TypeError(
            f"stats must be what accumulate returned, got {type(stats).__name__}"
        )


@functools.lru_cache(256)
def _form_of_state(loss_fn: UnifiedLoss) -> LossState:
    return jax.eval_shape(loss_fn.init)


def _count_window(loss_fn: UnifiedLoss, window: LossInputs) -> Normalizers:
    width = array(window, "targets").shape[-1]
    rows = jax.tree.map(lambda x: x.reshape(-1, width), window)
    tokens = tokens_of(loss_fn.settings, rows)
    return count_normalizers(loss_fn.terms, tokens, rows)


def unified_loss(
    config: UnifiedLossConfig,
    extra_terms: Sequence[TermLike] = (),
    *,
    mesh: Mesh | None = None,
    batch_axes: str | Sequence[str] = (),
    sequence_axis: str | None = None,
    vocab_axis: str | None = None,
) -> UnifiedLoss:
    """Assembles the unified loss of a config.

    With a mesh, the pass over the vocabulary runs on every device's own tokens and its
    own slice of the vocabulary; devices exchange a few numbers per token and the
    gradient of the hidden states. Without one, XLA decides; the numbers are the same.

    Args:
      config: which terms it has.
      extra_terms: terms of your own, see `TokenTerm` and `BatchTerm`.
      mesh: the mesh that the arguments of the loss are sharded over.
      batch_axes: its axes that share the rows, B, such as `("data", "fsdp")`.
      sequence_axis: its axis that shares each row's tokens, S.
      vocab_axis: its axis that shares the vocabulary: the columns of `lm_head` or of
        the logits. V need not be a multiple of its size.

    Returns:
      A frozen, hashable `UnifiedLoss`.

    Raises:
      TypeError: an extra term is no term or is not hashable.
      ValueError: an extra term's name is taken; an axis is not the mesh's, or is given
        twice or without a mesh.

    Example:
      >>> import ava_jax
      >>> config = ava_jax.UnifiedLossConfig(vocab_size=8, label_smoothing=0.0)
      >>> loss_fn = ava_jax.unified_loss(config)
      >>> loss_fn == ava_jax.unified_loss(config)
      True
    """
    if not isinstance(config, UnifiedLossConfig):
        raise TypeError(
            f"config must be a UnifiedLossConfig, got {type(config).__name__}: pass a "
            "dict to create_unified_loss"
        )
    extra = not_reserved(tuple(map(as_term, extra_terms)))
    layout = make_layout(mesh, batch_axes, sequence_axis, vocab_axis)
    terms = distinct((*terms_of(config), *extra))
    return UnifiedLoss(config.settings, terms, layout, config)


def compose(
    terms: Sequence[TermLike],
    *,
    vocab_size: int,
    ignore_index: int = -100,
    pad_token_id: int | None = None,
    eos_token_id: int | None = None,
    mask_boundaries: bool = False,
    logit_soft_cap: float | None = None,
    chunk_size: int | None = None,
    block_size: int | None = None,
    implementation: Implementation | None = None,
    precision: PrecisionLike = None,
    mesh: Mesh | None = None,
    batch_axes: str | Sequence[str] = (),
    sequence_axis: str | None = None,
    vocab_axis: str | None = None,
) -> UnifiedLoss:
    """Assembles a loss from a list of terms, without the flat config.

    `loss = Σ_i weight_i · term_i`; `aux["main_loss"]` sums up the terms whose `part` is
    `"main_loss"`.

    Args:
      terms: of `ava_jax.terms`, and your own.
      vocab_size: V; further columns of the logits are padding.
      ignore_index: a target id that carries no weight.
      pad_token_id: target id that is padding where no attention mask is given.
      eos_token_id: the end-of-sequence id, if it is the padding too.
      mask_boundaries: as in `UnifiedLossConfig`.
      logit_soft_cap: every logit z becomes cap·tanh(z/cap).
      chunk_size: as in `UnifiedLossConfig`, like the three that follow.
      block_size: tokens of a row whose logits are reduced at a time.
      implementation: of the kernel.
      precision: of the products with `lm_head`.
      mesh: as for `unified_loss`, like the axes that follow.
      batch_axes: axes that share the rows.
      sequence_axis: the axis that shares each row's tokens.
      vocab_axis: the axis that shares the vocabulary.

    Returns:
      A frozen, hashable `UnifiedLoss`.

    Raises:
      TypeError: an object is no term or is not hashable.
      ValueError: there are no terms, a term's name is one that `aux` uses already, or
        two of them have the same name or state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import ava_jax
      >>> from ava_jax import terms
      >>> loss_fn = ava_jax.compose(
      ...     [terms.CrossEntropy(0.1), terms.ZLoss(1e-4)], vocab_size=8)
      >>> loss, aux, _ = jax.jit(loss_fn)(
      ...     loss_fn.init(), logits=jnp.zeros((1, 4, 8)),
      ...     targets=jnp.array([[1, 2, 3, 4]]))
      >>> round(float(loss), 4), round(float(aux["z_loss"]), 6)
      (2.0799, 0.000432)
    """
    if not terms:
        raise ValueError("a loss needs at least one term, such as terms.CrossEntropy()")
    config = UnifiedLossConfig(
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        mask_boundaries=mask_boundaries,
        logit_soft_cap=logit_soft_cap,
        chunk_size=chunk_size,
        block_size=block_size,
        implementation=implementation,
        precision=precision,
    )
    layout = make_layout(mesh, batch_axes, sequence_axis, vocab_axis)
    listed = distinct(not_reserved(tuple(map(as_term, terms)), tuple(built_in())))
    return UnifiedLoss(config.settings, listed, layout)


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
    if not isinstance(config, Mapping | None):
        raise TypeError(
            f"config must be a dict of the guide's keys, got {type(config).__name__}"
        )
    return unified_loss(
        config_from_mapping(config or {}, overrides),
        mesh=mesh,
        batch_axes=batch_axes,
        sequence_axis=sequence_axis,
        vocab_axis=vocab_axis,
    )
