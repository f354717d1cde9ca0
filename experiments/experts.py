"""How evenly experts are used under each way of balancing them, and what it costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from ava_jax import metrics
from experiments.additions import SequenceBalance
from experiments.lab import (
    Numbers,
    Paths,
    Trained,
    add_up,
    evaluate,
    heldout_batches,
    load_text,
    train,
)
from experiments.plots import plot_dots, plot_loads
from experiments.records import Results, RunRecord, picture
from experiments.sizes import GPU, Sizes
from experiments.variants import Falling, Variant
from trainer.model.expert_load import count_choices
from trainer.model.language_model import loss_inputs
from trainer.model.layers import Batch, ModelConfig

SIZES = {
    "cpu": Sizes(
        model=ModelConfig(layers=3, width=64, heads=4, experts=8, dense_layers=1),
        steps=400,
    ),
    "gpu": dataclasses.replace(
        GPU,
        model=ModelConfig(layers=8, width=512, heads=8, experts=32, dense_layers=1),
    ),
}

BALANCED: dict[str, object] = {"use_moe_balancing": True}
AUXILIARY: dict[str, object] = {"use_auxiliary_loss": True, "router_z_weight": 0.0}
BIAS: dict[str, object] = BALANCED | {
    "moe_balancing_type": "bias",
    "bias_update_rate": 1e-3,
}
QUANTILE: dict[str, object] = BALANCED | {"moe_balancing_type": "quantile"}
VARIANTS = {
    "none": Variant(),
    "auxiliary 1e-4": Variant(AUXILIARY | {"load_balancing_weight": 1e-4}),
    "auxiliary 1e-2": Variant(AUXILIARY | {"load_balancing_weight": 1e-2}),
    "gradient": Variant(BALANCED | {"moe_balancing_type": "gradient"}),
    "bias": Variant(BIAS),
    "bias, falling rate": Variant(BIAS | {"bias_update_rate": Falling(3e-3)}),
    "bias + sequence": Variant(BIAS, (SequenceBalance(weight=1e-4),)),
    "quantile": Variant(QUANTILE),
    "quantile, momentum 0.9": Variant(QUANTILE | {"bias_momentum": 0.9}),
}
# An expert with less than this of an even share counts as dead.
DEAD = 0.1
# From this step on the load of the training batches should be even.
SETTLED = 20


def heldout_load(sizes: Sizes, trained: Trained, batches: list[Batch]) -> np.ndarray:
    """Returns how many held-out tokens chose each expert, [L, E]."""

    @jax.jit
    def count(params: optax.Params, batch: Batch) -> Int[Array, "L E"] | None:
        inputs = loss_inputs(trained.model, params, batch, trained.bias)
        return count_choices(inputs, sizes.model.experts)

    total = add_up(count(trained.params, batch) for batch in batches)
    return np.asarray(total, np.float32)


def violations(load: np.ndarray) -> Numbers:
    """Returns MaxVio of every layer, its mean, and the number of dead experts."""
    layers = {
        f"max_violation_{layer}": float(metrics.max_violation(jnp.asarray(counts)))
        for layer, counts in enumerate(load, start=1)
    }
    even = load.mean(axis=1, keepdims=True)
    dead = float(np.sum(load < DEAD * even))
    mean = float(np.mean(list(layers.values())))
    return {"max_violation": mean} | layers | {"dead_experts": dead}


def training_violation(paths: Paths) -> float:
    """Returns the mean over training of the batches' MaxVio, also over the layers.

    The first steps are left out, unless there are no others.
    """
    load = np.asarray(paths["expert_load"], float)
    settled = np.asarray(paths["step"], float) >= SETTLED
    return float(np.mean(load[settled if settled.any() else ...].max(-1) - 1))


def measure(sizes: Sizes, variant: Variant, seed: int) -> RunRecord:
    """Trains a variant and counts its experts' tokens."""
    text = load_text(sizes)
    trained = train(sizes, variant, seed, text)
    load = heldout_load(sizes, trained, heldout_batches(sizes, text))
    numbers = evaluate(sizes, trained, text) | violations(load)
    numbers["training_violation"] = training_violation(trained.paths)
    kept = ("step", "nll", "expert_load")
    return {
        "variant": "",
        "seed": seed,
        "numbers": numbers | {"step_milliseconds": trained.step_milliseconds},
        "paths": {name: trained.paths[name] for name in kept},
        "extra": {"heldout_load": load.tolist()},
    }


def plot(results: Results) -> None:
    """Draws balance and likelihood, and the load over training."""
    panels = {
        "max_violation": "MaxVio, held out",
        "training_violation": "MaxVio, training batches",
        "dead_experts": "dead experts",
        "nll": "held-out nll",
    }
    goals = {"max_violation": {"goal": 0.1}, "training_violation": {"goal": 0.05}}
    plot_dots(results, panels, picture(results), goals)
    plot_loads(results, picture(results, "load"))
