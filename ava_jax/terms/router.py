"""Mixture of experts: the router's balance and its auxiliary losses, and diversity."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ava_jax.config import Settings, Similarity, Weight, weight_at
from ava_jax.inputs import LossInputs, array
from ava_jax.losses import moe, quantile, router
from ava_jax.losses.moe import BiasBalanceState, GradientBalanceState
from ava_jax.losses.router import RouterLoad
from ava_jax.reduce import float_dtype
from ava_jax.terms.base import Aux, BatchTerm, Call, Output, Scalar, Step

Leaf = TypeVar("Leaf")


def layered_shape(
    name: str,
    given: tuple[int, ...],
    tokens: tuple[int, ...],
    num_layers: int | None = None,
) -> tuple[int, int, int]:
    """Returns the shape of a router's input as L layers of N tokens.

    Args:
      name: the argument, for the error.
      given: its shape, [N, ·], [B, S, ·], [L, N, ·] or [L, B, S, ·].
      tokens: B and S.
      num_layers: L, if it is fixed.

    Raises:
      ValueError: the shape is none of these.
    """
    batch, length = tokens
    count = batch * length
    one = ((count,), (batch, length))
    many = tuple((*given[:1], *lead) for lead in one)
    if len(given) < 2 or given[:-1] not in one + many:
        raise ValueError(
            f"{name} must be [N, ·], [B, S, ·], [L, N, ·] or [L, B, S, ·] with "
            f"N = B·S = {count}, B = {batch}, S = {length}, got {given}"
        )
    layers = 1 if given[:-1] in one else given[0]
    if num_layers not in (None, layers):
        raise ValueError(
            f"{name} must have a leading axis of num_moe_layers={num_layers} layers, "
            f"got {given}"
        )
    return layers, count, given[-1]


class RouterTerm(BatchTerm):
    """A term of `gate_logits` and `expert_indices`, layer by layer.

    Attributes:
      num_experts: E.
      num_layers: L, if every layer has a balance of its own.
    """

    num_experts: int
    num_layers: int | None
    requires = ("gate_logits", "expert_indices")
    accepts = ("router_mask",)

    def check(self, inputs: LossInputs, settings: Settings) -> None:
        gates = self._shape("gate_logits", inputs)
        choices = self._shape("expert_indices", inputs)
        if gates[-1] != self.num_experts:
            raise ValueError(
                f"gate_logits must have num_experts={self.num_experts} as its last "
                f"axis, got {array(inputs, 'gate_logits').shape}"
            )
        if gates[0] != choices[0]:
            raise ValueError(
                f"gate_logits has {gates[0]} layers, expert_indices {choices[0]}"
            )

    def _shape(self, name: str, inputs: LossInputs) -> tuple[int, int, int]:
        tokens = array(inputs, "targets").shape
        return layered_shape(name, array(inputs, name).shape, tokens, self.num_layers)

    def read(self, inputs: LossInputs) -> tuple[Array, Array]:
        """Returns gate logits [L, N, E] and chosen experts [L, N, k]."""
        gates, choices = (
            array(inputs, name).reshape(self._shape(name, inputs))
            for name in ("gate_logits", "expert_indices")
        )
        return gates, choices

    def over_layers(self, call: Call, function: Callable[..., Leaf]) -> Leaf:
        """Maps `function(gates, choices, token_weights=…)` over the layers."""
        routed = call.tokens.routed.reshape(-1)
        return jax.vmap(lambda *x: function(*x, token_weights=routed))(
            *self.read(call.inputs)
        )

    def share(self, call: Call) -> Scalar:
        return call.routed_share


class _Balancing(RouterTerm):
    """Carries the experts' load from step to step; only training steps move it."""

    option = "use_moe_balancing"
    # They come with the router's output; their similarity is a term of its own.
    accepts = ("expert_outputs", "router_mask")
    fields = ("moe_balancing",)

    def per_layer(self, function: Callable[..., Leaf]) -> Callable[..., Leaf]:
        """Maps a function of one layer's state and load over the layers, if any."""
        return function if self.num_layers is None else jax.vmap(function)

    def _zeros(self, *more: int) -> Float[Array, "..."]:
        layers = () if self.num_layers is None else (self.num_layers,)
        return jnp.zeros((*layers, *more), float_dtype())

    def load(self, call: Call) -> RouterLoad:
        """Returns the load of each layer, or their average."""
        loads = self.over_layers(call, router.router_load)
        if self.num_layers is not None:
            return loads
        return jax.tree.map(lambda x: jnp.mean(x, 0), loads)

    def finish(self, call: Call) -> Output:
        zero = jnp.zeros((), float_dtype())
        if not call.train:
            return Output(zero, zero, {})
        return Output(zero, zero, {}, self.load(call))

    def report(self, state: Any, statistics: RouterLoad | None) -> Aux:
        if statistics is None:
            return {}
        violation = self.per_layer(moe.max_violation)(statistics.counts)
        return {"moe_max_violation": jnp.max(violation)}


@dataclasses.dataclass(frozen=True)
class BiasBalancing(_Balancing):
    """Moves the routing bias against the load; it adds nothing to the loss.

    Attributes:
      num_experts: E.
      num_layers: L, if every layer has a bias of its own.
      rate: the step of the bias, a number or a schedule.
    """

    num_experts: int
    num_layers: int | None = None
    rate: Weight = 1e-3
    name: str = "moe_balancing"
    keys = ("moe_max_violation",)

    def init(self) -> dict[str, BiasBalanceState]:
        bias = self._zeros(self.num_experts)
        return {"moe_balancing": BiasBalanceState(bias=bias)}

    def update(self, state, statistics: RouterLoad, step: Step):
        def update(state: BiasBalanceState, load: RouterLoad) -> BiasBalanceState:
            rate = weight_at(self.rate, step.number)
            return moe.update_bias(state, load.counts, rate=rate)

        balance = self.per_layer(update)(state["moe_balancing"], statistics)
        return {"moe_balancing": balance}


@flax.struct.dataclass
class QuantileLoad(RouterLoad):
    """The load of an optimizer step, and what quantile balancing needs besides.

    Attributes:
      histogram: of the bias at which each token would choose each expert.
      k: experts per token.
    """

    histogram: Float[Array, "*L E bins"]
    k: int = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class QuantileBalancing(_Balancing):
    """Sets the routing bias to what even shares ask for; it adds nothing to the loss.

    `gate_logits` are the scores that the experts were chosen by, with this bias. See
    `losses.cutoff_histogram` and `losses.quantile_bias`. Layers without a bias of their
    own add up their histograms.

    Attributes:
      num_experts: E.
      num_layers: L, if every layer has a bias of its own.
      bins: of the histograms.
      momentum: the share of the old bias that is kept.

    References:
      Su, 2026, as described in Kimi K3, section 2.3.3.
    """

    num_experts: int
    num_layers: int | None = None
    bins: int = 1000
    momentum: float = 0.0
    name: str = "moe_balancing"
    keys = ("moe_max_violation",)

    def check(self, inputs: LossInputs, settings: Settings) -> None:
        super().check(inputs, settings)
        k = self._shape("expert_indices", inputs)[-1]
        if k >= self.num_experts:
            raise ValueError(
                "quantile balancing needs fewer experts per token than num_experts="
                f"{self.num_experts}, got expert_indices of {k}: if all are chosen, "
                "there is nothing to balance"
            )

    def init(self) -> dict[str, BiasBalanceState]:
        return {"moe_balancing": BiasBalanceState(bias=self._zeros(self.num_experts))}

    def finish(self, call: Call) -> Output:
        output = super().finish(call)
        if not call.train:
            return output
        scores, choices = self.read(call.inputs)
        routed, k = call.tokens.routed.reshape(-1), choices.shape[-1]

        def of_layer(scores, bias):
            return quantile.cutoff_histogram(
                scores, bias, k, bins=self.bins, token_weights=routed
            )

        own = None if self.num_layers is None else 0
        bias = call.states[self.name]["moe_balancing"].bias
        counts = jax.vmap(of_layer, (0, own))(scores, bias)
        if self.num_layers is None:
            counts = jnp.sum(counts, 0)
        load = QuantileLoad(**vars(output.statistics), histogram=counts, k=k)
        return output._replace(statistics=load)

    def update(self, state, statistics: QuantileLoad, step: Step):
        del step

        def update(bias, histogram):
            return quantile.quantile_bias(
                bias, histogram, statistics.k, momentum=self.momentum
            )

        bias = state["moe_balancing"].bias
        bias = self.per_layer(update)(bias, statistics.histogram)
        return {"moe_balancing": BiasBalanceState(bias=bias)}


@dataclasses.dataclass(frozen=True)
class GradientBalancing(_Balancing):
    """Pulls gate logits against the running load, see `losses.gradient_balance_loss`.

    Attributes:
      num_experts: E.
      num_layers: L, if every layer has a load of its own.
    """

    num_experts: int
    num_layers: int | None = None
    weight: Weight = 0.1
    name: str = "moe_balancing_term"
    keys = (
        "moe_balancing_term",
        "moe_max_violation",
        "moe_expert_balance_ratio",
        "moe_cv",
    )

    def init(self) -> dict[str, GradientBalanceState]:
        counts = self._zeros(self.num_experts)
        balance = GradientBalanceState(counts, jnp.zeros_like(counts), self._zeros())
        return {"moe_balancing": balance}

    def update(self, state, statistics: RouterLoad, step: Step):
        return {"moe_balancing": self._moved(state["moe_balancing"], statistics)}

    def _moved(self, balance: GradientBalanceState, load: RouterLoad):
        return self.per_layer(moe.update_gradient_balance)(balance, load)

    def finish(self, call: Call) -> Output:
        output = super().finish(call)
        if not call.train:
            return output
        # The loss looks at the balance after this step's load.
        before = call.states[self.name]["moe_balancing"]
        after = self._moved(before, output.statistics)
        routed = call.tokens.routed.reshape(-1)

        def of_layer(gates, balance):
            return moe.gradient_balance_loss(
                gates,
                balance,
                weight=self.weight_at(call.step),
                token_weights=routed,
            )

        gates, _ = self.read(call.inputs)
        own = None if self.num_layers is None else 0
        losses = jax.vmap(of_layer, (0, own))(gates, after)
        loss = call.routed_share * jnp.mean(losses)
        return output._replace(loss=loss, outside=loss, aux={self.name: loss})

    def report(self, state, statistics: RouterLoad | None) -> Aux:
        if statistics is None:
            return {}
        ratio = self.per_layer(moe.expert_balance_ratio)(state["moe_balancing"])
        spread = self.per_layer(moe.coefficient_of_variation)(ratio)
        own = {"moe_expert_balance_ratio": ratio, "moe_cv": jnp.mean(spread)}
        return super().report(state, statistics) | own


@dataclasses.dataclass(frozen=True)
class LoadBalancing(RouterTerm):
    """The mean over layers of `losses.auxiliary_load_balancing_loss`.

    Attributes:
      num_experts: E.
      num_layers: L, if it is fixed.
    """

    num_experts: int
    num_layers: int | None = None
    weight: Weight = 1e-4
    name: str = "aux_load_balancing"
    option = "use_auxiliary_loss"
    keys = ("aux_load_balancing",)

    def __call__(self, call: Call) -> Scalar:
        return jnp.mean(self.over_layers(call, router.auxiliary_load_balancing_loss))


@dataclasses.dataclass(frozen=True)
class RouterZLoss(RouterTerm):
    """The mean over layers of `losses.auxiliary_router_z_loss`.

    Attributes:
      num_experts: E.
      num_layers: L, if it is fixed.
    """

    num_experts: int
    num_layers: int | None = None
    weight: Weight = 1e-3
    name: str = "aux_router_z"
    option = "use_auxiliary_loss"
    keys = ("aux_router_z",)

    def __call__(self, call: Call) -> Scalar:
        def of_layer(gates, choices, token_weights):
            del choices
            return router.auxiliary_router_z_loss(gates, token_weights=token_weights)

        return jnp.mean(self.over_layers(call, of_layer))


@dataclasses.dataclass(frozen=True)
class ExpertDiversity(BatchTerm):
    """The similarity of the experts' outputs, see `losses.expert_diversity_loss`.

    Attributes:
      similarity: `"cosine"`, `"l2"` or `"dot"`.
    """

    similarity: Similarity = "cosine"
    weight: Weight = 0.01
    name: str = "diversity_loss"
    option = "use_diversity_loss"
    requires = ("expert_outputs",)
    accepts = ("router_mask",)
    keys = ("diversity_loss",)

    def __call__(self, call: Call) -> Scalar:
        outputs = call.inputs.get("expert_outputs")
        if isinstance(outputs, list | tuple):
            outputs = jnp.stack(outputs)
        assert isinstance(outputs, jax.Array)
        batch, length = call.tokens.targets.shape
        count = batch * length
        if outputs.shape[1:3] == (batch, length) and outputs.ndim > 3:
            outputs = outputs.reshape(outputs.shape[0], count, *outputs.shape[3:])
        if outputs.ndim < 3 or outputs.shape[1] != count:
            raise ValueError(
                f"expert_outputs must be [E, N, D] or [E, B, S, D] with N = B·S = "
                f"{count}, got {outputs.shape}"
            )
        return moe.expert_diversity_loss(
            outputs.reshape(*outputs.shape[:2], math.prod(outputs.shape[2:])),
            similarity=self.similarity,
            token_weights=call.tokens.routed.reshape(-1),
        )

    def share(self, call: Call) -> Scalar:
        return call.routed_share


@dataclasses.dataclass(frozen=True)
class AuxiliaryDiversity(ExpertDiversity):
    """`ExpertDiversity` as a part of the auxiliary loss, where outputs are given."""

    weight: Weight = 1e-4
    name: str = "aux_expert_diversity"
    option = "use_auxiliary_loss"
    requires = ()
    accepts = ("expert_outputs", "router_mask")
    keys = ("aux_expert_diversity",)

    def finish(self, call: Call) -> Output:
        if call.inputs.get("expert_outputs") is None:
            zero = jnp.zeros((), float_dtype())
            return Output(zero, zero, {})
        return super().finish(call)
