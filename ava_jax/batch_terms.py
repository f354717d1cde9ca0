"""Batch terms: losses of routers, experts and embeddings, not of single tokens.

They couple all the tokens of a batch, so over micro-batches they are averages weighted
by the tokens of each.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from ava_jax.config import UnifiedLossConfig
from ava_jax.inputs import LossInputs, array
from ava_jax.losses import contrastive, moe, router
from ava_jax.losses.router import RouterLoad
from ava_jax.reduce import float_dtype
from ava_jax.state import BiasBalanceState, GradientBalanceState
from ava_jax.tokens import Tokens

_DIVERSITY_IN_AUXILIARY = 1e-4

BalanceState = GradientBalanceState | BiasBalanceState
Leaf = TypeVar("Leaf")


def init_balance(config: UnifiedLossConfig) -> BalanceState | None:
    """Makes the state of expert balancing, per layer if the config says so."""
    if not config.use_moe_balancing or config.num_experts is None:
        return None
    layers = () if config.num_moe_layers is None else (config.num_moe_layers,)
    shape = (*layers, config.num_experts)
    if config.moe_balancing_type == "bias":
        return BiasBalanceState(bias=jnp.zeros(shape, float_dtype()))
    return GradientBalanceState(
        counts=jnp.zeros(shape, float_dtype()),
        scores=jnp.zeros(shape, float_dtype()),
        tokens=jnp.zeros(layers, float_dtype()),
    )


def by_layer(
    config: UnifiedLossConfig, name: str, x: Array, tokens: Tokens
) -> Shaped[Array, "L N K"]:
    """Brings router inputs of any accepted shape to [L, N, ·]."""
    batch, length = tokens.targets.shape
    shapes = (
        (batch * length,),
        (batch, length),
        (x.shape[0], batch * length),
        (x.shape[0], batch, length),
    )
    if x.ndim < 2 or x.shape[:-1] not in shapes:
        raise ValueError(
            f"{name} must be [N, ·], [B, S, ·], [L, N, ·] or [L, B, S, ·] with "
            f"N = B·S = {batch * length}, B = {batch}, S = {length}, got {x.shape}"
        )
    layered = x.shape[:-1] in shapes[2:] and x.shape[:-1] not in shapes[:2]
    layers = x.shape[0] if layered else 1
    if config.num_moe_layers not in (None, layers):
        raise ValueError(
            f"{name} must have a leading axis of num_moe_layers="
            f"{config.num_moe_layers} layers, got {x.shape}"
        )
    return x.reshape(layers, batch * length, x.shape[-1])


class Router:
    """The router's inputs of one call, checked and brought to one shape."""

    def __init__(self, config: UnifiedLossConfig, inputs: LossInputs, tokens: Tokens):
        self.config = config
        self.gates = by_layer(
            config, "gate_logits", array(inputs, "gate_logits"), tokens
        )
        self.choices = by_layer(
            config, "expert_indices", array(inputs, "expert_indices"), tokens
        )
        self.weights = tokens.weights.reshape(-1)
        if self.gates.shape[-1] != config.num_experts:
            raise ValueError(
                f"gate_logits must have num_experts={config.num_experts} as its last "
                f"axis, got {array(inputs, 'gate_logits').shape}"
            )
        if self.gates.shape[0] != self.choices.shape[0]:
            raise ValueError(
                f"gate_logits has {self.gates.shape[0]} layers, expert_indices "
                f"{self.choices.shape[0]}"
            )

    def layer_mean(self, loss: Callable[..., Array], *arrays: Array) -> Array:
        """Averages a per-layer loss over the layers."""
        return jnp.mean(
            jax.vmap(lambda *x: loss(*x, token_weights=self.weights))(*arrays)
        )

    def load(self) -> RouterLoad:
        """Returns the load of each layer, or their average."""
        loads = jax.vmap(
            lambda g, c: router.router_load(g, c, token_weights=self.weights)
        )(self.gates, self.choices)
        if self.config.num_moe_layers is not None:
            return loads
        return jax.tree.map(lambda x: jnp.mean(x, 0), loads)

    def gradient_balance(self, balance: GradientBalanceState, weight: Array) -> Array:
        """Returns the gradient-style loss, given the state after the update."""

        def loss(gates, balance):
            return moe.gradient_balance_loss(
                gates, balance, weight=weight, token_weights=self.weights
            )

        shared = None if self.config.num_moe_layers is None else 0
        return jnp.mean(jax.vmap(loss, in_axes=(0, shared))(self.gates, balance))


def updated_balance(
    config: UnifiedLossConfig,
    step: Int[Array, ""],
    state: BalanceState,
    load: RouterLoad,
) -> BalanceState:
    """Returns the balance after a step whose tokens loaded the experts so."""

    def update(state: BalanceState, load: RouterLoad) -> BalanceState:
        if isinstance(state, BiasBalanceState):
            rate = config.weight("bias_update_rate", step)
            return moe.update_bias(state, load.counts, rate=rate)
        return moe.update_gradient_balance(state, load)

    return _over_layers(config, update)(state, load)


def _over_layers(
    config: UnifiedLossConfig, function: Callable[..., Leaf]
) -> Callable[..., Leaf]:
    return function if config.num_moe_layers is None else jax.vmap(function)


def balance_report(
    config: UnifiedLossConfig, balance: BalanceState, load: RouterLoad
) -> dict[str, Array]:
    """Diagnostics of the balance after the step; the worst layer's violation."""
    violation = _over_layers(config, moe.max_violation)(load.counts)
    report = {"moe_max_violation": jnp.max(violation)}
    if isinstance(balance, GradientBalanceState):
        ratio = _over_layers(config, moe.expert_balance_ratio)(balance)
        spread = _over_layers(config, moe.coefficient_of_variation)(ratio)
        report |= {"moe_expert_balance_ratio": ratio, "moe_cv": jnp.mean(spread)}
    return report


def auxiliary_terms(
    config: UnifiedLossConfig, step: Int[Array, ""], inputs: LossInputs, tokens: Tokens
) -> dict[str, Float[Array, ""]]:
    """The router's auxiliary losses, and the experts' and embeddings' terms."""
    terms = {}
    if config.use_auxiliary_loss:
        gates = Router(config, inputs, tokens)
        terms["aux_load_balancing"] = config.weight(
            "load_balancing_weight", step
        ) * gates.layer_mean(
            router.auxiliary_load_balancing_loss, gates.gates, gates.choices
        )
        terms["aux_router_z"] = config.weight(
            "router_z_weight", step
        ) * gates.layer_mean(router.auxiliary_router_z_loss, gates.gates)
        if inputs.get("expert_outputs") is not None:
            terms["aux_expert_diversity"] = _DIVERSITY_IN_AUXILIARY * _diversity(
                config, inputs, tokens
            )
    if config.use_diversity_loss:
        weight = config.weight("diversity_weight", step)
        terms["diversity_loss"] = weight * _diversity(config, inputs, tokens)
    if config.use_contrastive_loss:
        weight = config.weight("contrastive_weight", step)
        terms["contrastive_loss"] = weight * _contrastive(config, inputs, tokens)
    return terms


def _diversity(config, inputs, tokens):
    outputs = inputs.get("expert_outputs")
    if isinstance(outputs, list | tuple):
        outputs = jnp.stack(outputs)
    batch, length = tokens.targets.shape
    if outputs.shape[1:3] == (batch, length) and outputs.ndim > 3:
        outputs = outputs.reshape(outputs.shape[0], batch * length, -1)
    if outputs.shape[1] != batch * length or outputs.ndim < 3:
        raise ValueError(
            f"expert_outputs must be [E, N, D] or [E, B, S, D] with N = B·S = "
            f"{batch * length}, got {outputs.shape}"
        )
    outputs = outputs.reshape(outputs.shape[0], batch * length, -1)
    return moe.expert_diversity_loss(
        outputs,
        similarity=config.diversity_similarity,
        token_weights=tokens.weights.reshape(-1),
    )


def _contrastive(config, inputs, tokens):
    margin = config.contrastive_margin
    if config.contrastive_type == "simctg":
        return contrastive.simctg_loss(
            array(inputs, "hidden_states"),
            margin=margin,
            mask=tokens.active,
            segment_ids=tokens.segments,
        )
    embeddings, labels = array(inputs, "embeddings"), inputs.get("labels")
    if config.contrastive_type == "infonce":
        return contrastive.contrastive_infonce_loss(
            embeddings, labels=labels, temperature=config.contrastive_temperature
        )
    if config.contrastive_type == "margin":
        return contrastive.contrastive_margin_loss(
            embeddings, labels=labels, margin=margin
        )
    return contrastive.contrastive_triplet_loss(
        embeddings, labels=labels, margin=margin
    )
